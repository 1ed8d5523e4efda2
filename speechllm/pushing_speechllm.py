"""`model.push_to_hub(...)`: a checkpoint that others can load, as one commit on the Hub.

What is pushed names nothing of this machine: a projector-only checkpoint whose encoder or LLM is a folder here is refused,
and a full one forgets where they came from. The card is the one that the model came with, made to speak of the new
repository, or, where it came without one (as from a trainer) and the package is installed, a new one.
"""

import glob
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import HfApi, ModelCard

from .base_models_speechllm import CheckpointError, optional_file


PROJECTOR_WEIGHTS = "projector.safetensors"
ADAPTER_FOLDER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
CARD, SUMMARY = "README.md", "training_summary.json"
# What a card says of the repository's kind of weights: the Hub's `base_model_relation`, and a sentence.
KIND_IN_CARD = {
    "projector": (
        "adapter",
        "This repository holds the trained weights only; the speech encoder and the LLM are fetched from their own "
        "repositories, at\nthe commits they are pinned to.",
    ),
    "full": ("finetune", "This repository holds all weights."),
}
SHOWN_IN_CARD = re.compile(r"\b(?:images|examples)/[^\n\"'()\[\]/]+")


class SpeechLLMPushMixin:
    """`push_to_hub` of the SpeechLLM classes."""

    loaded_from: ClassVar[dict[str, str]] = {}  # revision and subfolder of `name_or_path`, where they were given
    training_summary: ClassVar[dict[str, Any] | None] = None  # of a trainer's run since then

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
        commit_description: str | None = None,
        tags: str | list[str] | None = None,
    ):
        """Upload the checkpoint with its processor, its training summary, and a card with the plots and recordings that
        it shows. A card that the model came with stays as it was, but for this repository's name and kind of weights;
        else, or if the model was trained since, one is written, for which the package must be installed.

        Args:
            kind: see `save_pretrained`.
            processor: default: that of the checkpoint which the model was loaded from, or of its base models.
            tags: further ones, for the card.

        Returns:
            `huggingface_hub.CommitInfo` of the one commit, which also removes weights of the other kind.

        Raises:
            CheckpointError: if nobody else could load it, or a private upload would be public.
        """
        from .processing_speechllm import SpeechLLMProcessor  # which imports the module that imports this one

        source = self.name_or_path
        if processor is None and source:
            processor = SpeechLLMProcessor.from_pretrained(source, token=token, **self.loaded_from)
        elif processor is None:
            processor = SpeechLLMProcessor.from_config(self.config, token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, kind=kind, max_shard_size=max_shard_size)
            processor.save_pretrained(folder)
            if self.training_summary is None:
                self._bring(SUMMARY, folder, token)
            else:
                (Path(folder) / SUMMARY).write_text(
                    json.dumps(self.training_summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
            forget_this_machine(folder)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.model_info(repo_id).private:
                raise CheckpointError(
                    f"{repo_id} exists already and is public. Make it private in its settings, or leave out `private`."
                )
            self._add_card(Path(folder), repo_id, token)
            if tags and (card_path := Path(folder) / CARD).is_file():
                card = ModelCard.load(card_path)
                card.data.tags = [*(card.data.tags or []), *([tags] if isinstance(tags, str) else tags)]
                card.save(card_path)
            return upload_checkpoint(api, folder, repo_id, commit_message, revision, create_pr, commit_description)

    def _bring(self, name: str, folder: str | Path, token: str | None = None) -> bool:
        """Copy a file from where the model was loaded; whether it was there."""
        source = self.name_or_path
        path = optional_file(source, name, token=token, **self.loaded_from) if source else None
        if path is not None:
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(folder) / name)
        return path is not None

    def _add_card(self, folder: Path, repo_id: str, token: str | None) -> None:
        if self.training_summary is None and self._bring(CARD, folder, token):
            card = (folder / CARD).read_text(encoding="utf-8")
            for name in sorted(set(SHOWN_IN_CARD.findall(card))):
                self._bring(name, folder, token)
            kind = "projector" if (folder / PROJECTOR_WEIGHTS).is_file() else "full"
            (folder / CARD).write_text(card_for(repo_id, kind, card), encoding="utf-8")
            return
        try:
            from speechllm.hub.card import write_card
        except ImportError:  # this code came with a checkpoint, and the package, which can write cards, is not here
            return
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8")) if (folder / SUMMARY).is_file() else {}
        write_card(folder, repo_id, summary, self.config.base_models or summary.get("base_models", {}))


def card_for(repo_id: str, kind: str, card: str) -> str:
    """A repository's card as that of another one, with perhaps another kind of weights (`"projector"` or `"full"`)."""
    if named := re.search(r'from_pretrained\("([^"\n]+)", trust_remote_code', card):
        card = re.sub(rf"(?<![\w.-]){re.escape(named[1])}(?![\w-]|\.\w)", repo_id, card)
    card = re.sub(r"(?m)^(model-index:\n- name: |model_name: ).*$", rf"\g<1>{repo_id.rpartition('/')[2]}", card)
    relation, sentence = KIND_IN_CARD[kind]
    for old_relation, old_sentence in KIND_IN_CARD.values():
        card = card.replace(old_sentence, sentence)
        card = card.replace(f"\nbase_model_relation: {old_relation}\n", f"\nbase_model_relation: {relation}\n")
    return card


def upload_checkpoint(
    api: HfApi,
    folder: str | Path,
    repo_id: str,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
    description: str | None = None,
):
    """One commit after which the repository's weights and code are those of `folder`, and no others."""
    if revision is not None and not create_pr and not revision.startswith("refs/"):  # as of an open pull request
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Exact names, since the client's `*` would match in every folder.
    stale = [glob.escape(path) for path in api.list_repo_files(repo_id, revision=revision) if _is_replaced(path)]
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        commit_description=description,
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
