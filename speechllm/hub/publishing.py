"""From a checkpoint to a repository on the Hub.

1. `prepare_folder` makes the folder that is pushed, and nothing else ever is: weights in safetensors, the package's own
   code, processor, generation settings, chat template, handler, training summary, plots and card. No optimiser state, no
   logs, no paths of this machine.
2. `publish` uploads it as one commit that also removes what an earlier one left of the other kind of weights.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..base_models_speechllm import base_weights, refuse_pickled
from ..checkpoint_speechllm import ADAPTER_FOLDER, PROJECTOR_WEIGHTS, copy_hub_files
from ..configuration_speechllm import SpeechLLMConfig
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..processing_speechllm import SpeechLLMProcessor
from ..pushing_speechllm import forget_this_machine, refuse_local_bases, upload_checkpoint
from .card import write_card
from .merging import cast_frozen, merge_adapter
from .training_summary import read_summary, write_summary


EXAMPLES = "examples"


class PublishingError(OSError):
    """A checkpoint that cannot be published, or a Hub that does not take it; the message says why and what to do."""


def prepare_folder(
    model: str | Path,
    target: str | Path,
    repo_id: str,
    *,
    kind: str = "projector",
    merge_lora: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    license: str | None = None,
    languages: Sequence[str] = (),
    examples: Sequence[str | Path] = (),
) -> Path:
    """Write what `repo_id` is to hold into `target`, a new or empty folder.

    Args:
        model: folder of a checkpoint.
        kind: `"projector"` (trained weights, and where the frozen ones are) or `"full"`.
        merge_lora: fold the adapter into the LLM; the checkpoint is then full, in bfloat16.
        dtype: of the frozen parts of a full checkpoint; default: as they are. The projector stays in float32.
        license, languages: for the card; the languages default to those of the training data.
        examples: recordings to publish with the model, for the card's widget.

    Raises:
        CheckpointError, PublishingError: if the checkpoint cannot be read, or cannot be published as this kind.
    """
    model, target = Path(model), Path(target)
    if not (model / "config.json").is_file():
        raise PublishingError(
            f"{model} is not a checkpoint: there is no config.json in it. Give the folder of a model."
        )
    if missing := [path for path in map(Path, examples) if not path.is_file()]:
        raise PublishingError(f"{missing[0]}: there is no such recording. Correct --example.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PublishingError(f"{target} exists and is not an empty folder. Choose another, or remove it.")
    is_projector_only = (model / PROJECTOR_WEIGHTS).is_file()
    if not is_projector_only:
        refuse_pickled(model, f"the checkpoint {model}")
    config = SpeechLLMConfig.from_pretrained(model)
    kind = "full" if merge_lora else kind
    if kind == "projector":
        refuse_local_bases(config.base_models)
    target.mkdir(parents=True, exist_ok=True)
    try:
        if merge_lora or dtype is not None or is_projector_only != (kind == "projector"):
            _convert(model, target, kind, merge_lora, dtype, max_shard_size)
        else:
            _copy_weights(model, target)
        forget_this_machine(target)
        SpeechLLMProcessor.from_pretrained(model).save_pretrained(target)
        copy_hub_files(target)
        if summary := read_summary(model):
            write_summary(target, summary)
        for path in map(Path, examples):
            (target / EXAMPLES).mkdir(exist_ok=True)
            shutil.copyfile(path, target / EXAMPLES / path.name)
        base_models = config.base_models or summary.get("base_models", {})
        write_card(target, repo_id, summary, base_models, license=license, languages=languages)
    except BaseException:
        shutil.rmtree(target)  # nothing half-made is left to be pushed by hand
        raise
    return target


def _convert(model: Path, target: Path, kind: str, merge_lora: bool, dtype: torch.dtype | None, shards: str) -> None:
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(model)
    if merge_lora:
        merge_adapter(loaded, dtype or torch.bfloat16)
    elif dtype is not None:
        cast_frozen(loaded, dtype)
    if kind == "projector":
        _refuse_other_frozen_weights(loaded)
    options = {"max_shard_size": shards} if kind == "full" else {}
    loaded.save_pretrained(target, kind=kind, **options)


def _refuse_other_frozen_weights(model) -> None:
    """A projector-only checkpoint has the base models' weights; refuse if this model's are others."""
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    bases = base_weights(model.config, model.get_input_embeddings().weight.dtype)
    other = sorted(name for name, value in bases.items() if name in state and not torch.equal(state[name], value))
    if other:
        raise PublishingError(
            f"{model.name_or_path} differs from its base models in {len(other)} frozen tensor(s), e.g. {other[0]}, which a "
            "projector-only checkpoint would lose. Publish it with --full."
        )


def _copy_weights(model: Path, target: Path) -> None:
    names = [PROJECTOR_WEIGHTS] if (model / PROJECTOR_WEIGHTS).is_file() else [SAFE_WEIGHTS_NAME]
    if (model / SAFE_WEIGHTS_INDEX_NAME).is_file() and names == [SAFE_WEIGHTS_NAME]:
        index = json.loads((model / SAFE_WEIGHTS_INDEX_NAME).read_text())
        names = [SAFE_WEIGHTS_INDEX_NAME, *sorted(set(index["weight_map"].values()))]
    if not all((model / name).is_file() for name in names):
        raise PublishingError(
            f"{model} lacks {', '.join(n for n in names if not (model / n).is_file())}. Save it again."
        )
    if (model / GENERATION_CONFIG_NAME).is_file():
        names.append(GENERATION_CONFIG_NAME)
    for name in ("config.json", *names):
        shutil.copyfile(model / name, target / name)
    if (model / ADAPTER_FOLDER).is_dir():
        (target / ADAPTER_FOLDER).mkdir()
        for path in (model / ADAPTER_FOLDER).iterdir():
            if path.suffix in (".json", ".safetensors"):
                shutil.copyfile(path, target / ADAPTER_FOLDER / path.name)


# ---- uploading -----------------------------------------------------------------------------------------------------


def publish(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a prepared folder, in one commit, and return the commit's address.

    Raises:
        PublishingError: if the Hub refuses or cannot be reached, or a private upload would become public.
    """
    api = HfApi()
    with explained_refusal(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PublishingError(
                f"{repo_id} exists already and is public. Make it private in its settings, or leave out --private."
            )
        return upload_checkpoint(api, folder, repo_id, "Upload SpeechLLM", revision).commit_url


@contextmanager
def explained_refusal(repo_id: str) -> Iterator[None]:
    """Turn the client's errors into one sentence: what the Hub said, or that it cannot be reached."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise PublishingError(f"{repo_id} was not uploaded: HF_HUB_OFFLINE is set. Unset it.") from None
    except (HTTPError, ConnectionError, RuntimeError) as error:
        cause = error.__cause__ if type(error) is RuntimeError else error  # the client wraps what befalls large files
        if not isinstance(cause, HTTPError | ConnectionError):
            raise
        if not isinstance(cause, HfHubHTTPError):
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise PublishingError(
                f"{repo_id} was not uploaded: {constants.ENDPOINT} cannot be reached ({reason}). Check the network; "
                "--dry-run works without it."
            ) from error
        status = cause.response.status_code
        if status in (401, 403, 404):
            who = "The token in use is not allowed to write there" if get_token() else "You are not logged in"
            raise PublishingError(
                f"{repo_id} was not uploaded: the Hub answered {status}. {who}. Run `hf auth login` with a token that "
                "may write, or choose a namespace of yours."
            ) from error
        reason = cause.server_message or str(cause).strip().splitlines()[0]
        raise PublishingError(
            f"{repo_id} was not uploaded: the Hub answered {status} ({reason}). Correct that, or try again later."
        ) from error
