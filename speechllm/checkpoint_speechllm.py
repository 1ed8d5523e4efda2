"""Saving and loading a SpeechLLM: two kinds of checkpoint, one loader.

*Full*: every weight in `model.safetensors`, self-contained.
*Projector-only*: the trained weights in `projector.safetensors` (and `adapter/` for a PEFT adapter), while `config.json`
names the frozen encoder and LLM and pins them to revisions. Loading takes those two from where they lie and merges.

1. Nothing is ever initialised at random behind the user's back: a tensor that is missing or has another shape, a base
   model that cannot be found or has changed since, is a `CheckpointError` that names it.
2. Weights are read and written as safetensors only; pickled ones are refused with the way to convert them. A folder is
   complete or untouched: files are written beside it, then moved.
"""

import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from .base_models_speechllm import (
    BASE_OPTIONS,
    LOADING,
    CheckpointError,
    add_audio_token,
    base_weights,
    copy_generation_config,
    explained,
    keep_unquantized,
    optional_file,
    pin_revision,
    refuse_incomplete,
    refuse_pickled,
)
from .configuration_speechllm import SpeechLLMConfig, SpeechLLMProjectorConfig
from .pushing_speechllm import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    PROJECTOR_WEIGHTS,
    SpeechLLMPushMixin,
)


HUB_FILES = (
    "audio_speechllm.py",
    "base_models_speechllm.py",
    "chat_speechllm.py",
    "checkpoint_speechllm.py",
    "configuration_speechllm.py",
    "encoder_speechllm.py",
    "generation_speechllm.py",
    "handler.py",
    "language_speechllm.py",
    "modeling_speechllm.py",
    "pipeline_speechllm.py",
    "processing_speechllm.py",
    "projector_speechllm.py",
    "pushing_speechllm.py",
)
PICKLED_ADAPTER_WEIGHTS = "adapter_model.bin"
OWN_WEIGHTS = re.compile(r"(projector|model(-\d{5}-of-\d{5})?)\.safetensors|model\.safetensors\.index\.json")
HUB_OPTIONS = (*BASE_OPTIONS, "revision", "subfolder")
SAMPLED = 8  # rows of a base model's matrix, to see whether it has changed


class SpeechLLMCheckpointMixin(SpeechLLMPushMixin):
    """`from_pretrained`, `from_speech_text_pretrained` and `save_pretrained` of the SpeechLLM classes."""

    is_self_contained = False  # loaded from a full checkpoint, whose base models may be nowhere near
    _is_resized = False  # its LLM has another vocabulary than the base model
    base_samples: ClassVar[dict[str, torch.Tensor]] = {}  # of the base models, as they were loaded

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
            projector: settings of `SpeechLLMProjectorConfig`, e.g. `num_queries=2`; also `token`, `cache_dir`,
                `local_files_only` and `force_download`, for both repositories.

        Raises:
            CheckpointError: if either model cannot be found or lacks a weight.
            TypeError: if there is no such option.
        """
        dtype = projector.pop("torch_dtype", None) or dtype
        hub = {name: projector.pop(name) for name in BASE_OPTIONS if name in projector}
        known = [name for name in SpeechLLMProjectorConfig.__annotations__ if name != "model_type"]
        if unknown := sorted(projector.keys() - set(known)):
            raise TypeError(f"There is no option {unknown[0]!r}. The projector's settings are {', '.join(known)}.")
        bases, configs = {}, {}
        text_id = os.fspath(text_id)
        given = {"speech": (os.fspath(speech_id), speech_revision), "text": (text_id, text_revision)}
        for name, (base_id, revision) in given.items():
            with explained(f"the {name} model {base_id!r}", remedy="Check the id or path."):
                configs[name] = AutoConfig.from_pretrained(base_id, revision=revision, **hub)
                base_id = os.path.abspath(base_id) if os.path.isdir(base_id) else base_id
                bases[name] = {"id": base_id, "revision": pin_revision(base_id, revision, **hub)}
        with explained(f"the tokenizer of {text_id!r}", remedy="Put the LLM's tokenizer files beside its weights."):
            tokenizer = AutoTokenizer.from_pretrained(text_id, revision=text_revision, **hub)
            text_config = configs["text"].get_text_config(decoder=True)
            if len(tokenizer) < text_config.vocab_size / 2:  # without its files, Transformers makes an empty one
                raise ValueError(f"it has {len(tokenizer)} tokens, and the LLM's vocabulary {text_config.vocab_size}.")
        config = SpeechLLMConfig(
            speech_config=configs["speech"],
            text_config=text_config,
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
        model = cls._merge(config, trained=None, dtype=dtype, hub=hub, **options)
        if model.can_generate():
            with explained("the LLM's generation settings", remedy=""):
                copy_generation_config(model, bases["text"], tokenizer, **hub)
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
        # Not for the configuration, which would take "auto" for the dtype of the weights.
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or dtype
        if not isinstance(config, PreTrainedConfig):
            with explained(f"the checkpoint {path}", remedy="Check the id or path."):
                config, kwargs = cls.config_class.from_pretrained(
                    config or path, return_unused_kwargs=True, **{**kwargs, **hub}
                )
        weights = optional_file(path, PROJECTOR_WEIGHTS, **hub)
        rest = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        if dtype is not None:
            rest["dtype"] = dtype
        if rest.get("quantization_config") is not None:
            rest["quantization_config"] = keep_unquantized(rest["quantization_config"])
        if weights is not None:
            with explained(f"the trained weights {weights}", remedy="Download or train them again."):
                trained = load_file(weights)
            of_bases = {name: hub[name] for name in BASE_OPTIONS if name in hub}
            model, info = cls._merge(config, trained, *args, output_loading_info=True, hub=of_bases, **rest)
            if model.can_generate() and optional_file(path, GENERATION_CONFIG_NAME, **hub) is not None:
                model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        else:
            refuse_pickled(path, f"the checkpoint {path}", **hub)
            with explained(f"the checkpoint {path}", remedy="Download or save it again."):
                model, info = super().from_pretrained(path, *args, config=config, **{**rest, **hub, **LOADING})
            refuse_incomplete(info, f"The checkpoint {path}")
            model.freeze()  # loading makes every parameter trainable
            model.is_self_contained = True
        model.name_or_path = str(path)
        model.loaded_from = {name: hub[name] for name in ("revision", "subfolder") if name in hub}
        subfolder = "/".join(filter(None, [hub.pop("subfolder", ""), ADAPTER_FOLDER]))
        if (adapter := optional_file(path, ADAPTER_CONFIG, subfolder=subfolder, **hub)) is not None:
            names = (ADAPTER_WEIGHTS, PICKLED_ADAPTER_WEIGHTS)
            refuse_pickled(path, f"the adapter of {path}", *names, subfolder=subfolder, **hub)
            model.load_trained_adapter(Path(adapter).parent)
        return (model, info) if output_loading_info else model

    @classmethod
    def _merge(cls, config, trained: dict[str, torch.Tensor] | None, *args, hub, output_loading_info=False, **kwargs):
        """Frozen weights from the base models, trained weights from `trained` (`None`: a fresh projector)."""
        if not config.base_models:
            raise CheckpointError(
                "This projector-only checkpoint does not say which speech encoder and LLM it belongs to (config.json "
                "lacks `base_models`). Use the config.json that it was saved with."
            )
        dtype = kwargs.pop("dtype", "auto")
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        kwargs.update(LOADING, dtype=dtype, state_dict={**base_weights(config, dtype, **hub), **(trained or {})})
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # a report on random weights would be wrong: see the check below
        try:
            model, info = super().from_pretrained(None, *args, config=config, **kwargs)
        finally:
            logging.set_verbosity(level)
        if trained is None:
            info["missing_keys"] = {key for key in info["missing_keys"] if "projector." not in key}
            model.base_model.projector.float()  # `_keep_in_fp32_modules_strict` is for weights that are loaded
        refuse_incomplete(info, "The merge of base models and trained weights")
        model.name_or_path = ""  # Transformers writes "None"
        model.freeze()  # loading makes every parameter trainable
        model.base_samples = model._sample_base()
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
            kind: `"full"`, `"projector"`, or `None`: full where the model came from a full checkpoint or its base
                models are trained, changed (as by merging an adapter) or not pinned, projector-only otherwise.
            state_dict: weights to save instead of the model's own (as `Trainer` passes).

        Raises:
            CheckpointError: if the folder cannot be written; what was there before is then untouched.
            ValueError: if a projector-only checkpoint or the adapters' kind would lose trained weights.
        """
        if kind not in (None, "full", "projector"):
            raise ValueError(f"kind is {kind!r}; use 'full', 'projector' or None.")
        if kind == "projector" and not self.config.base_models:
            raise ValueError("A projector-only checkpoint needs `config.base_models`; save with kind='full'.")
        base_is_trained = self._base_is_trained()
        if kind == "projector" and base_is_trained:
            raise ValueError(
                "A projector-only checkpoint would lose the trained weights of the speech encoder or the LLM (some of "
                "their parameters require a gradient or have changed, or the vocabulary was resized); save with kind='full'."
            )
        if kind is None:
            whole = self.is_self_contained or base_is_trained or not self.config.base_models
            kind = "full" if whole else "projector"
        if not is_main_process:
            return
        state, adapter = _split_adapter(self, self.state_dict() if state_dict is None else state_dict)
        with replaced_folder(save_directory) as folder:
            if kind == "projector":
                prefix = self._headless_prefix()
                trained = {prefix + key: value.contiguous() for key, value in state.items() if "projector." in key}
                save_file(trained, folder / PROJECTOR_WEIGHTS, metadata={"format": "pt"})
                self.config.dtype = str(self._frozen_dtype()).split(".")[-1]
                self.config.architectures = [type(self).__name__]
                self.config.save_pretrained(folder)
                _edit_config(folder / "config.json", quantization_config=None)  # that was for loading only
                if self.can_generate():
                    self.generation_config.save_pretrained(folder)
            else:
                has_adapter, self._hf_peft_config_loaded = getattr(self, "_hf_peft_config_loaded", False), False
                try:
                    super().save_pretrained(folder, state_dict=state, **kwargs)
                finally:
                    self._hf_peft_config_loaded = has_adapter
                # `PreTrainedModel.dtype` is that of the first parameter, which may be the projector's float32.
                _edit_config(folder / "config.json", dtype=str(self._frozen_dtype()).split(".")[-1])
            if adapter is not None:
                adapter_config, adapter_state = adapter
                adapter_config.save_pretrained(folder / ADAPTER_FOLDER)
                save_file(adapter_state, folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            copy_hub_files(folder)
        if push_to_hub:
            names = ("commit_message", "create_pr", "max_shard_size", "private", "revision", "token")
            options = {name: kwargs[name] for name in names if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).resolve().name, kind=kind, **options)

    def load_trained_weights(self, folder: str | os.PathLike) -> None:
        """Load the trained weights (projector, adapter) of a projector-only checkpoint into this model.

        Raises:
            CheckpointError: if the file is missing, corrupt, or does not fit this model.
        """
        path = Path(folder) / PROJECTOR_WEIGHTS
        with explained(f"the trained weights {path}", remedy="Resume from another checkpoint."):
            trained = load_file(path)
        trained = {key.removeprefix(self._headless_prefix()): value for key, value in trained.items()}
        own = {key: value for key, value in self.state_dict().items() if "projector." in key}
        missing = own.keys() - trained.keys()
        reshaped = {key for key in own.keys() & trained.keys() if own[key].shape != trained[key].shape}
        refuse_incomplete({"missing_keys": missing, "mismatched_keys": reshaped}, f"The checkpoint {folder}")
        self.load_state_dict(trained, strict=False)
        if (Path(folder) / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file():
            self.load_trained_adapter(Path(folder) / ADAPTER_FOLDER)

    def load_trained_adapter(self, folder: str | os.PathLike) -> None:
        """Add the PEFT adapter saved in `folder` (or load its weights where the model already has that adapter)."""
        try:
            from peft import PeftConfig, set_peft_model_state_dict
        except ImportError as error:
            raise CheckpointError(f"The checkpoint has a PEFT adapter ({folder}). Run `pip install peft`.") from error
        with explained(f"the adapter {folder}", remedy="Download or train it again."):
            weights = load_file(Path(folder) / ADAPTER_WEIGHTS)
            if not getattr(self, "peft_config", None):
                trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
                self.add_adapter(PeftConfig.from_pretrained(folder))
                adapter_dtype = next(iter(weights.values())).dtype
                for name, parameter in self.named_parameters():
                    if "lora_" in name:  # as it was trained, which may be finer than the LLM's dtype
                        parameter.data = parameter.data.to(adapter_dtype)
                for parameter in trained:  # PEFT froze all but the adapter
                    parameter.requires_grad_(True)
                self.train(self.training)  # new layers come in training mode
            (name,) = self.peft_config
            result = set_peft_model_state_dict(self, weights, adapter_name=name)
        refuse_incomplete(
            {"missing_keys": [key for key in result.missing_keys if "lora_" in key]}, f"The adapter {folder}"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any):
        rows = len(self.get_input_embeddings().weight)
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._is_resized |= len(embeddings.weight) != rows
        return embeddings

    def _base_is_trained(self) -> bool:
        found = self._sample_base() if self.base_samples else {}
        changed = any(
            not torch.equal(sample.to(found[name].dtype), found[name])
            for name, sample in self.base_samples.items()
            if name in found
        )
        return (
            changed
            or self._is_resized
            or any(
                parameter.requires_grad and "projector." not in name and "lora_" not in name
                for name, parameter in self.named_parameters()
            )
        )

    def _sample_base(self) -> dict[str, torch.Tensor]:
        """A few values of each matrix of the base models: those that are merged with an adapter change everywhere. (Not of
        weights that are quantised, split over processes, or not there.)"""
        found = {}
        for name, weight in self.named_parameters():
            whole = type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.device.type != "meta"
            if whole and weight.ndim == 2 and weight.numel() and "projector." not in name and "lora_" not in name:
                name = name.replace(".base_layer.", ".").removeprefix(self._headless_prefix())
                found[name] = weight.detach()[:: max(1, len(weight) // SAMPLED), 0].cpu().clone()
        return found

    def _headless_prefix(self) -> str:
        """What the names in `projector.safetensors` have before those of this model."""
        return f"{self.base_model_prefix}." if self.base_model is self else ""

    def _frozen_dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype


# ---- adapters ------------------------------------------------------------------------------------------------------


def _split_adapter(model, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], tuple | None]:
    """A state dict -> the weights under the names of a model without adapter, and the adapter's (config, weights)."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return state, None
    from_peft = {name: str(getattr(config.peft_type, "value", config.peft_type)) for name, config in configs.items()}
    if len(configs) > 1 or set(from_peft.values()) != {"LORA"}:
        raise ValueError(
            f"The model has the adapters {from_peft}; one LoRA adapter can be saved with a checkpoint. Delete or merge "
            "the others first (`delete_adapter`, `merge_and_unload`)."
        )
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise CheckpointError("The model has a PEFT adapter; saving it needs `pip install peft`.") from error
    ((name, config),) = configs.items()
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(
            "The adapter is merged into the LLM's weights and still there: it would be applied twice after loading. Unmerge "
            "it (`unmerge_adapter`), or merge it for good (`merge_and_unload`)."
        )
    weights = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    weights = {key: value.contiguous() for key, value in weights.items()}
    plain = {}
    for key, value in state.items():
        if "lora_" not in key and ".original_module." not in key:
            # A part trained as a whole beside the adapter (`modules_to_save`) is saved in the place of the original.
            plain[key.replace(f".modules_to_save.{name}.", ".").replace(".base_layer.", ".")] = value
    return plain, (config, weights)


# ---- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def replaced_folder(folder: str | os.PathLike):
    """A temporary folder whose files replace those in `folder` when the block ends well, and vanish when it does not.
    Weights of an earlier save that the new one does not have are removed; files of other names are left alone."""
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
        saved = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
        own = [path for path in folder.glob("*.safetensors*") if OWN_WEIGHTS.fullmatch(path.name)]
        own += [folder / ADAPTER_FOLDER / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        for path in own:
            if path.relative_to(folder) not in saved:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or it holds other files
            (folder / ADAPTER_FOLDER).rmdir()
        for path in saved:
            (folder / path).parent.mkdir(exist_ok=True)
            os.replace(temporary / path, folder / path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot save to {folder}: {error}. Free some space or choose another folder; nothing half-written is left."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_hub_files(folder: str | os.PathLike) -> None:
    """Put the code that loads a checkpoint beside it, for `trust_remote_code=True`."""
    # Where this code itself came from a checkpoint, Transformers fetched the files that it saw imported, so all must be.
    from .handler import EndpointHandler  # noqa: F401
    from .modeling_speechllm import SpeechLLMModel  # noqa: F401
    from .pipeline_speechllm import SpeechLLMPipeline  # noqa: F401
    from .processing_speechllm import SpeechLLMProcessor  # noqa: F401

    for name in HUB_FILES:
        shutil.copyfile(Path(__file__).with_name(name), Path(folder) / name)


def _edit_config(path: Path, **values: Any) -> None:
    """Set entries of a saved configuration, or remove those that are `None`."""
    config = {**json.loads(path.read_text()), **values}
    for name, value in values.items():
        if value is None:
            config.pop(name)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
