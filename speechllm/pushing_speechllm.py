"""`model.push_to_hub(...)`: a checkpoint that others can load, as one commit on the Hub.

What is pushed names nothing of this machine: a projector-only checkpoint whose encoder or LLM is a folder here is refused,
and a full one forgets where they came from.
"""

import glob
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import HfApi

from .base_models_speechllm import CheckpointError, optional_file


PROJECTOR_WEIGHTS = "projector.safetensors"
ADAPTER_FOLDER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
COMPANIONS = (
    "README.md",
    "training_summary.json",
)  # what travels with a checkpoint besides weights, code and processor


class SpeechLLMPushMixin:
    """`push_to_hub` of the SpeechLLM classes."""

    loaded_from: ClassVar[dict[str, str]] = {}  # revision and subfolder of `name_or_path`, where they were given

    def push_to_hub(
        self,
        repo_id: str,
        *,
        kind: str | None = None,
        processor: Any = None,
        commit_message: str = "Upload SpeechLLM",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
    ):
        """Upload the checkpoint with its processor and, where the folder or repository that it was loaded from has them,
        its card and training summary. (`speechllm publish` writes a card.)

        Args:
            kind: see `save_pretrained`.
            processor: default: that of the checkpoint which the model was loaded from, or of its base models.

        Returns:
            `huggingface_hub.CommitInfo` of the one commit, which also removes weights of the other kind.

        Raises:
            CheckpointError: if nobody else could load it.
        """
        from .processing_speechllm import SpeechLLMProcessor  # which imports the module that imports this one

        source = self.name_or_path
        if processor is None and source:
            processor = SpeechLLMProcessor.from_pretrained(source, **self.loaded_from)
        elif processor is None:
            processor = SpeechLLMProcessor.from_config(self.config)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, kind=kind, max_shard_size=max_shard_size)
            processor.save_pretrained(folder)
            for name in COMPANIONS if source else ():
                if (path := optional_file(source, name, **self.loaded_from)) is not None:
                    shutil.copyfile(path, Path(folder) / name)
            forget_this_machine(folder)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return upload_checkpoint(api, folder, repo_id, commit_message, revision, create_pr)


def upload_checkpoint(
    api: HfApi, folder: str | Path, repo_id: str, message: str, revision: str | None = None, create_pr: bool = False
):
    """One commit after which the repository's weights and code are those of `folder`, and no others."""
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Exact names, since the client's `*` would match in every folder.
    stale = [glob.escape(path) for path in api.list_repo_files(repo_id, revision=revision) if _is_replaced(path)]
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=stale,
    )


def _is_replaced(path: str) -> bool:
    """Whether a repository's file is one of those that every upload brings or does without: weights and code."""
    return path.startswith(f"{ADAPTER_FOLDER}/") or bool(
        re.fullmatch(r"[^/]+(\.safetensors(\.index\.json)?|_speechllm\.py)", path)
    )


def is_local(base: dict[str, str]) -> bool:
    """Whether a base model is a folder: these are pinned to a fingerprint, repositories to a commit."""
    return (base.get("revision") or "").startswith("sha256:")


def forget_this_machine(folder: str | Path) -> None:
    """Take out of a checkpoint's configurations where it was loaded from, and base models that are folders.

    Raises:
        CheckpointError: if the checkpoint is projector-only and so needs them.
    """
    folder = Path(folder)
    for path in (folder / "config.json", folder / ADAPTER_FOLDER / ADAPTER_CONFIG):
        if path.is_file():
            values = json.loads(path.read_text(), object_hook=_without_places)
            bases = values.get("base_models") or {}
            if (folder / PROJECTOR_WEIGHTS).is_file() and path.name == "config.json":
                refuse_local_bases(bases)
            elif any(map(is_local, bases.values())):
                values["base_models"] = None
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if name == "base_model_name_or_path" else v for name, v in values.items() if name != "_name_or_path"
    }


def refuse_local_bases(base_models: dict[str, dict[str, str]] | None) -> None:
    """Raise unless a projector-only checkpoint with these base models could be loaded elsewhere."""
    if not base_models:
        raise CheckpointError(
            "The checkpoint does not say which speech encoder and LLM its projector belongs to (config.json lacks "
            "`base_models`). Publish it in full (--full, or kind='full')."
        )
    for part, base in base_models.items():
        if is_local(base):
            raise CheckpointError(
                f"The {part} model {base['id']} is a folder on this machine, so nobody else could load a projector-only "
                "checkpoint. Publish it in full (--full, or kind='full'), or train on the repository it is a copy of."
            )
