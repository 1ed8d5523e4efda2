"""Saving and loading a SpeechLLM: two kinds of checkpoint, one loader.

*Full*: every weight in `model.safetensors`, self-contained.
*Projector-only*: the trained weights in `projector.safetensors` (and `adapter/` for PEFT adapters), while `config.json`
names the frozen encoder and LLM and pins them to revisions. Loading takes those two from where they lie and merges.

1. Frozen weights come through Transformers' own loaders, so every renaming or fusing that a base model needs happens.
2. Nothing is ever initialised at random behind the user's back: a tensor that is missing or has another shape, a base
   model that cannot be found or has changed since, is a `CheckpointError` that names it.
3. Only safetensors are read and written. A folder is complete or untouched: files are written beside it, then moved.
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.whisper.modeling_whisper import WhisperModel
from transformers.utils import logging
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_speechllm import AUDIO_TOKEN, SpeechLLMConfig, SpeechLLMProjectorConfig


PROJECTOR_WEIGHTS = "projector.safetensors"
ADAPTER_FOLDER = "adapter"
HUB_FILES = (
    "audio_speechllm.py",
    "checkpoint_speechllm.py",
    "configuration_speechllm.py",
    "modeling_speechllm.py",
    "processing_speechllm.py",
)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# SpecAugment's mask vector is used in training only and is absent from many encoders' checkpoints.
UNUSED_IN_EVALUATION = ("masked_spec_embed",)


class CheckpointError(OSError):
    """A checkpoint that cannot be read or written; the message says which part, why and what to do."""


class SpeechLLMCheckpointMixin:
    """`from_pretrained`, `from_speech_text_pretrained` and `save_pretrained` of the SpeechLLM classes."""

    @classmethod
    def from_speech_text_pretrained(
        cls,
        speech_id: str | os.PathLike,
        text_id: str | os.PathLike,
        *,
        speech_revision: str | None = None,
        text_revision: str | None = None,
        speech_layer: int | None = None,
        context_seconds: float = 0.5,
        config_options: dict[str, Any] | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        **projector: Any,
    ):
        """A new SpeechLLM from a pretrained speech encoder and a pretrained causal LM, with a fresh projector.

        Args:
            speech_id, text_id: repository ids or local folders, pinned to `speech_revision` and `text_revision` (a
                branch or tag is resolved to its commit; a folder is pinned to a fingerprint of its weights).
            speech_layer, context_seconds, config_options: see `SpeechLLMConfig`.
            dtype: of the frozen parts; default: that of the LLM's checkpoint. The projector stays in float32.
            projector: settings of `SpeechLLMProjectorConfig`, e.g. `num_queries=2`.

        Raises:
            CheckpointError: if either model cannot be found or lacks a weight.
        """
        bases = {
            "speech": {"id": os.fspath(speech_id), "revision": speech_revision},
            "text": {"id": os.fspath(text_id), "revision": text_revision},
        }
        configs = {}
        for name, base in bases.items():
            with _explained(f"the {name} model {base['id']!r}", remedy="Check the id or path."):
                configs[name] = AutoConfig.from_pretrained(base["id"], revision=base["revision"])
            base["revision"] = pin_revision(base["id"], base["revision"])
        tokenizer = AutoTokenizer.from_pretrained(bases["text"]["id"], revision=text_revision)
        config = SpeechLLMConfig(
            speech_config=configs["speech"],
            text_config=configs["text"].get_text_config(decoder=True),
            projector_config=SpeechLLMProjectorConfig(**projector),
            speech_layer=speech_layer,
            audio_token_id=add_audio_token(tokenizer),
            context_seconds=context_seconds,
            base_models=bases,
            **(config_options or {}),
        )
        options = {"device_map": device_map, "attn_implementation": attn_implementation}
        options = {name: value for name, value in options.items() if value is not None}
        dtype = dtype if dtype not in (None, "auto") else configs["text"].dtype or torch.float32
        model = cls._merge(config, trained=None, dtype=dtype, **options)
        if model.can_generate():
            with _explained("the LLM's generation settings", remedy=""):
                _copy_generation_config(model, bases["text"], tokenizer)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, for full and projector-only checkpoints alike.

        Raises:
            CheckpointError: if a weight is missing or has another shape, or a pinned base model cannot be found.
        """
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(
                None, *args, config=config, output_loading_info=output_loading_info, **kwargs
            )
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(
                config or path, return_unused_kwargs=True, **{**kwargs, **hub}
            )
        # Files of optional parts: absent ones are None.
        find = {**hub, "_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        weights = cached_file(path, PROJECTOR_WEIGHTS, **find)
        rest = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        if weights is not None:
            with _explained(f"the trained weights {weights}", remedy="Download or train them again."):
                trained = load_file(weights)
            model, info = cls._merge(config, trained, *args, output_loading_info=True, **rest)
        else:
            with _explained(f"the checkpoint {path}", remedy="Download or save it again."):
                model, info = super().from_pretrained(
                    path, *args, config=config, output_loading_info=True, use_safetensors=True,
                    ignore_mismatched_sizes=True, **{**rest, **hub},
                )  # fmt: skip
            _refuse_incomplete(info, f"The checkpoint {path}")
        model.name_or_path = str(path)
        subfolder = "/".join(filter(None, [hub.pop("subfolder", ""), ADAPTER_FOLDER]))
        if (adapter := cached_file(path, "adapter_config.json", **{**find, "subfolder": subfolder})) is not None:
            cached_file(path, "adapter_model.safetensors", subfolder=subfolder, **hub)
            model.load_trained_adapter(Path(adapter).parent)
        return (model, info) if output_loading_info else model

    @classmethod
    def _merge(cls, config, trained: dict[str, torch.Tensor] | None, *args, output_loading_info=False, **kwargs):
        """Frozen weights from the base models, trained weights from `trained` (`None`: a fresh projector)."""
        if not config.base_models:
            raise CheckpointError(
                "This projector-only checkpoint does not say which speech encoder and LLM it belongs to (config.json "
                "lacks `base_models`). Use the config.json that it was saved with."
            )
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        weights = {**_base_weights(config, dtype), **(trained or {})}
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # a report on random weights would be wrong: see the check below
        try:
            model, info = super().from_pretrained(
                None, *args, config=config, state_dict=weights, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True, **kwargs,
            )  # fmt: skip
        finally:
            logging.set_verbosity(level)
        if trained is None:
            info["missing_keys"] = {key for key in info["missing_keys"] if "projector." not in key}
        _refuse_incomplete(info, "The merge of base models and trained weights")
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        kind: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint that loads with `trust_remote_code=True` where this package is not installed.

        Args:
            kind: `"full"`, `"projector"`, or `None`: projector-only where the frozen parts are indeed frozen and
                pinned to base models, full otherwise.
            state_dict: weights to save instead of the model's own (as `Trainer` passes).

        Raises:
            CheckpointError: if the folder cannot be written; what was there before is then untouched.
        """
        if kind not in (None, "full", "projector"):
            raise ValueError(f"kind is {kind!r}; use 'full', 'projector' or None.")
        if kind == "projector" and not self.config.base_models:
            raise ValueError("A projector-only checkpoint needs `config.base_models`; save with kind='full'.")
        if kind is None:
            kind = "projector" if self.config.base_models and not self._base_is_trained() else "full"
        if not is_main_process:
            return
        state, adapters = _split_adapters(self, self.state_dict() if state_dict is None else state_dict)
        with replaced_folder(save_directory) as folder:
            if kind == "projector":
                trained = {key: value.contiguous() for key, value in state.items() if "projector." in key}
                save_file(trained, folder / PROJECTOR_WEIGHTS, metadata={"format": "pt"})
                self.config.dtype = str(self._frozen_dtype()).split(".")[-1]
                self.config.architectures = [type(self).__name__]
                self.config.save_pretrained(folder)
                if self.can_generate():
                    self.generation_config.save_pretrained(folder)
            else:
                has_adapter, self._hf_peft_config_loaded = getattr(self, "_hf_peft_config_loaded", False), False
                try:
                    super().save_pretrained(folder, state_dict=state, **kwargs)
                finally:
                    self._hf_peft_config_loaded = has_adapter
                _set_dtype(folder / "config.json", self._frozen_dtype())
            for name, (adapter_config, adapter_state) in adapters.items():
                target = folder / ADAPTER_FOLDER if name == "default" else folder / ADAPTER_FOLDER / name
                target.mkdir(parents=True)
                adapter_config.save_pretrained(target)
                save_file(adapter_state, target / "adapter_model.safetensors", metadata={"format": "pt"})
            copy_hub_files(folder)
        if push_to_hub:
            self._upload(save_directory, **kwargs)

    def _upload(self, folder, repo_id=None, commit_message=None, private=None, token=None, **kwargs) -> None:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id or Path(folder).name, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message or "Upload SpeechLLM")

    def load_trained_weights(self, folder: str | os.PathLike) -> None:
        """Load the trained weights (projector, adapter) of a projector-only checkpoint into this model.

        Raises:
            CheckpointError: if the file is missing, corrupt, or does not fit this model.
        """
        path = Path(folder) / PROJECTOR_WEIGHTS
        with _explained(f"the trained weights {path}", remedy="Resume from another checkpoint."):
            trained = load_file(path)
        own = {key: value for key, value in self.state_dict().items() if "projector." in key}
        if not all("model." + key in trained or key in trained for key in own):
            trained = {key.removeprefix("model."): value for key, value in trained.items()}
        missing = own.keys() - trained.keys()
        reshaped = {key for key in own.keys() & trained.keys() if own[key].shape != trained[key].shape}
        _refuse_incomplete({"missing_keys": missing, "mismatched_keys": reshaped}, f"The checkpoint {folder}")
        self.load_state_dict(trained, strict=False)
        if (Path(folder) / ADAPTER_FOLDER / "adapter_config.json").is_file():
            self.load_trained_adapter(Path(folder) / ADAPTER_FOLDER)

    def load_trained_adapter(self, folder: str | os.PathLike) -> None:
        """Add the PEFT adapter saved in `folder` (or load its weights where the model already has that adapter)."""
        try:
            from peft import PeftConfig, set_peft_model_state_dict
        except ImportError as error:
            raise CheckpointError(f"The checkpoint has a PEFT adapter ({folder}). Run `pip install peft`.") from error
        with _explained(f"the adapter {folder}", remedy="Download or train it again."):
            if not getattr(self, "_hf_peft_config_loaded", False):
                self.add_adapter(PeftConfig.from_pretrained(folder))
            result = set_peft_model_state_dict(self, load_file(Path(folder) / "adapter_model.safetensors"))
        _refuse_incomplete(
            {"missing_keys": [key for key in result.missing_keys if "lora_" in key]}, f"The adapter {folder}"
        )

    def _base_is_trained(self) -> bool:
        return any(
            parameter.requires_grad and "projector." not in name and "lora_" not in name
            for name, parameter in self.named_parameters()
        )

    def _frozen_dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype


# ---- base models ---------------------------------------------------------------------------------------------------


def add_audio_token(tokenizer) -> int:
    """Give the tokenizer the audio placeholder, behind all of its own tokens, and return its id."""
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


def pin_revision(model_id: str, revision: str | None) -> str | None:
    """The commit that a repository's revision stands for, or a fingerprint of a local folder's weights: a hash of each
    safetensors file's name, size, header and first and last MiB."""
    if not os.path.isdir(model_id):
        return extract_commit_hash(cached_file(model_id, "config.json", revision=revision), None)
    digest = hashlib.sha256()
    for path in sorted(Path(model_id).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} ".encode() + file.read(min(header, size)) + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return "sha256:" + digest.hexdigest()


def _base_weights(config: SpeechLLMConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State dict of the frozen parts under the SpeechLLM's names."""
    weights = {}
    for name, base in config.base_models.items():
        what, revision = f"the frozen {name} model {base['id']!r}", base.get("revision")
        local = os.path.isdir(base["id"])
        if revision is not None and revision.startswith("sha256:"):
            if not local:
                raise CheckpointError(
                    f"Cannot load {what}: there is no such folder. The checkpoint holds trained weights only; put the "
                    "folder back, set `base_models` in config.json to where it is now, or use a full checkpoint."
                )
            if pin_revision(base["id"], None) != revision:
                raise CheckpointError(
                    f"Cannot load {what}: its weights are not those that the checkpoint was trained with (pinned "
                    f"{revision[:19]}...). Restore the original files, or train again on the new ones."
                )
        options = {"dtype": dtype, "output_loading_info": True, "revision": None if local else revision}
        with _explained(what, remedy="Check the id or path and the network; see `base_models` in config.json."):
            if name == "text":
                model, info = AutoModelForCausalLM.from_pretrained(base["id"], **options)
                prefix = f"{model.base_model_prefix}."
                rename = {prefix: "model.language_model.", "": "head."}
            elif config.is_whisper:
                model, info = WhisperModel.from_pretrained(base["id"], **options)
                model, rename = model.encoder, {"": "model.speech_encoder."}
            else:
                model, info = AutoModel.from_pretrained(base["id"], **options)
                rename = {"": "model.speech_encoder."}
        _refuse_incomplete(info, f"{what[0].upper()}{what[1:]}")
        for key, value in model.state_dict().items():
            old = next(old for old in rename if key.startswith(old))
            weights[rename[old] + key.removeprefix(old)] = value
    return weights


def _copy_generation_config(model, base: dict[str, str], tokenizer) -> None:
    """The LLM's generation settings, with end-of-text and padding ids from its tokenizer where it has none."""
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(base["id"], revision=_hub_revision(base))
    except OSError:  # the LLM comes without a generation_config.json, as many do
        model.generation_config = GenerationConfig.from_model_config(model.config.text_config)
    settings = model.generation_config
    settings.eos_token_id = tokenizer.eos_token_id if settings.eos_token_id is None else settings.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _hub_revision(base: dict[str, str]) -> str | None:
    return None if os.path.isdir(base["id"]) else base["revision"]


def _refuse_incomplete(info: dict[str, Any], what: str) -> None:
    """Raise if loading left a tensor without its weights."""
    missing = sorted(key for key in info["missing_keys"] if not key.endswith(UNUSED_IN_EVALUATION))
    reshaped = sorted(str(key if isinstance(key, str) else key[0]) for key in info.get("mismatched_keys", ()))
    for problem, names in (("lacks", missing), ("has another shape than the configuration says for", reshaped)):
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(
                f"{what} {problem} {len(names)} tensor(s): {listed}. Loading would leave random weights in their "
                "place. Use the config.json and weights that were saved together, or download them again."
            )


# ---- adapters ------------------------------------------------------------------------------------------------------


def _split_adapters(model, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, tuple]]:
    """A state dict -> the weights under the names of a model without adapters, and each adapter's (config, weights)."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return state, {}
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise CheckpointError("The model has PEFT adapters; saving it needs `pip install peft`.") from error
    adapters = {}
    for name, adapter_config in configs.items():
        tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=name)
        adapters[name] = (adapter_config, {k: v.contiguous() for k, v in tensors.items() if "projector." not in k})
    plain = {}
    for key, value in state.items():
        if "lora_" in key or ".original_module." in key:
            continue
        for name in configs:  # a part trained as a whole beside the adapter (`modules_to_save`)
            key = key.replace(f".modules_to_save.{name}.", ".")
        plain[key.replace(".base_layer.", ".")] = value
    return plain, adapters


# ---- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def replaced_folder(folder: str | os.PathLike):
    """A temporary folder whose files replace those in `folder` when the block ends well, and vanish when it does not.
    Weights of an earlier save that the new one does not have are removed."""
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"Cannot save to {folder}: it is a file. Choose a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    except OSError as error:
        raise CheckpointError(
            f"Cannot save to {folder}: {error.strerror}. Choose a folder that is writable."
        ) from error
    try:
        yield temporary
        for path in [*folder.glob("*.safetensors*"), folder / ADAPTER_FOLDER]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists() and not (temporary / path.name).exists():
                path.unlink()
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot save to {folder}: {error}. Free some space or choose another folder; nothing half-written is left."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_hub_files(folder: str | os.PathLike) -> None:
    """Put the code that loads a checkpoint beside it, for `trust_remote_code=True`."""
    for name in HUB_FILES:
        shutil.copyfile(Path(__file__).with_name(name), Path(folder) / name)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """`PreTrainedModel.dtype` is that of the first parameter, which may be the projector's float32."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "dtype": str(dtype).split(".")[-1]}, indent=2, sort_keys=True) + "\n")


@contextmanager
def _explained(what: str, remedy: str):
    """Turn a loader's failure into one sentence: what could not be loaded, why, what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"Cannot load {what}: {str(error).strip().splitlines()[0]} {remedy}".strip()) from error
