"""Base models as repositories in this process's Hub cache (offline), and checkpoints trained on them."""

import shutil

import huggingface_hub.constants
import pytest
import transformers.utils.hub
from tiny_training import save_base_models
from trained_checkpoints import adapt, pretrain


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a speech encoder, which has a card, and of an LLM."""
    folder = tmp_path_factory.mktemp("bases")
    save_base_models(folder)
    (folder / "speech/README.md").write_text("---\nlicense: mit\n---\nA tiny encoder.\n")
    return folder


@pytest.fixture(scope="session")
def cached(bases, tmp_path_factory):
    """The base models as `org/speech` and `org/llm`."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("speech", "llm"):
        repository = cache / f"models--org--{name}"
        shutil.copytree(bases / name, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(COMMIT)
    with pytest.MonkeyPatch.context() as patch:
        for module in (huggingface_hub.constants, transformers.utils.hub):
            if hasattr(module, "HF_HUB_CACHE"):
                patch.setattr(module, "HF_HUB_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def pretrained(cached, tmp_path_factory):
    """A projector-only checkpoint after contrastive pretraining."""
    return pretrain(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def adapted(pretrained, tmp_path_factory):
    """That checkpoint after fine-tuning with LoRA."""
    return adapt(tmp_path_factory.mktemp("adapted"), pretrained)
