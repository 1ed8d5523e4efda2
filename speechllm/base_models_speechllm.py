"""The frozen parts of a SpeechLLM as they come from elsewhere: pinned, loaded whole, or refused.

A projector-only checkpoint names its speech encoder and its LLM by repository id or folder and pins each to a revision:
a commit, or a fingerprint of a folder's weights. Loading goes through Transformers' own loaders, so every renaming or
fusing that a base model needs happens, and raises a `CheckpointError` if a weight is missing or is not the pinned one.
Only safetensors are read: opening a pickled `.bin` can run any code. Of a repository that has no others, the Hub's own
conversion is taken where there is one; else it is refused with the way to convert it.
"""

import copy
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AddedToken, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.models.whisper.modeling_whisper import WhisperModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_speechllm import AUDIO_TOKEN, SpeechLLMConfig


logger = logging.get_logger(__name__)

SAMPLED_BYTES = 1 << 16  # of each end of a tensor, for the fingerprint of a folder
# What is missing or reshaped is ours to refuse, by name.
LOADING = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
# SpecAugment's mask vector is used in training only and is absent from many encoders' checkpoints.
UNUSED_IN_EVALUATION = "masked_spec_embed"
# How files of the Hub are fetched, for a checkpoint and for its base models alike
BASE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
CONVERTER = "SFconvertbot"  # the Hub's account that offers repositories their pickled weights as safetensors
CONVERSION = "https://huggingface.co/spaces/safetensors/convert"  # where it is asked to


class CheckpointError(OSError):
    """A checkpoint that cannot be read or written; the message says which part, why and what to do."""


@contextmanager
def explained(what: str, remedy: str, weights_of: str | os.PathLike | None = None, **hub: Any):
    """Turn a loader's failure into one sentence: what could not be loaded, why, what to do.

    Args:
        weights_of: folder or Hub id (with `hub`, its `revision`) whose weights are loaded, and may be pickled.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        found = None
        if weights_of is not None:
            with suppress(OSError, ValueError):  # a place that cannot be looked at is what the loader complains of
                found = pickled_only(weights_of, **hub)
        if found:
            raise CheckpointError(_way_to_convert(weights_of, what, found)) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"Cannot load {what}: {reason} {remedy}".strip()) from error


def optional_file(model: str | os.PathLike, name: str, subfolder: str = "", **hub: Any) -> str | None:
    """The path of a file that a checkpoint (folder or Hub id) may lack; `None` if it does. Offline, what is not in the
    cache counts as absent. (`cached_file` of Transformers takes a Hub that cannot be reached for an absent file.)

    Args:
        hub: `revision`, `token`, `cache_dir` and the like.

    Raises:
        CheckpointError: if nobody can tell, because the Hub cannot be reached or fails.
        HFValidationError, RepositoryNotFoundError: if there is no such checkpoint.
    """
    if os.path.isdir(model):
        path = Path(model) / subfolder / name
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(str(model), name, subfolder=subfolder or None, **hub)
    except RemoteEntryNotFoundError:
        return None
    except RepositoryNotFoundError:
        raise
    except (LocalEntryNotFoundError, HTTPError) as error:
        if is_offline_mode() or hub.get("local_files_only"):
            return None
        place = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
        path = "/".join(filter(None, [subfolder, name]))
        if try_to_load_from_cache(str(model), path, **place) is _CACHED_NO_EXIST:
            return None
        cause = error.__cause__ or error
        status = f"it answered {cause.response.status_code}" if isinstance(cause, HfHubHTTPError) else str(cause)
        raise CheckpointError(
            f"Cannot tell whether {model} has a file {path}: the Hub cannot be asked ({status}). Try again later, or set "
            "HF_HUB_OFFLINE=1 to do with the files that are in the cache."
        ) from error


def pickled_only(
    model: str | os.PathLike, weights: str = SAFE_WEIGHTS_NAME, pickled: str = WEIGHTS_NAME, **hub: Any
) -> str | None:
    """The name of a checkpoint's pickled weights, if it has such and no safetensors."""

    def first(name: str) -> str | None:
        names = (name, f"{name}.index.json")
        return next((name for name in names if optional_file(model, name, **hub) is not None), None)

    return None if first(weights) else first(pickled)


def refuse_pickled(model: str | os.PathLike, what: str, *names: str, **hub: Any) -> None:
    """Raise if the weights of `what` are pickled only.

    Args:
        names: of the weights' file and of its pickled kind, where they are not Transformers' own.

    Raises:
        CheckpointError: which says how to convert them.
    """
    if found := pickled_only(model, *names, **hub):
        raise CheckpointError(_way_to_convert(model, what, found))


def _way_to_convert(model: str | os.PathLike, what: str, found: str) -> str:
    stem = found.removesuffix(".index.json").removesuffix(".bin")
    ask = "" if os.path.isdir(model) else f"The Hub converts them on request: {CONVERSION}. Or download them. "
    return (
        f"Cannot load {what}: its weights ({found}) are pickled, and opening them can run any code; only safetensors are "
        f"read. {ask}If you trust their origin, convert them in their folder once: "
        "safetensors.torch.save_file({name: tensor.contiguous().clone() for file in "
        f"glob.glob('{stem}*.bin') for name, tensor in torch.load(file, weights_only=True).items()}}, "
        f"'{stem.replace('pytorch_model', 'model')}.safetensors', metadata={{'format': 'pt'}})"
    )


def add_audio_token(tokenizer) -> int:
    """Give the tokenizer the audio placeholder, behind all of its own tokens, and return its id."""
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


def keep_unquantized(quantization_config: Any) -> Any:
    """A quantization configuration (or its dict) that leaves the speech encoder, the projector and the LM head as they
    are: they are small, and the encoder's frames and the projector's weights are what the model was trained on."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.deepcopy(quantization_config)
    name = "modules_to_not_convert"
    name = "llm_int8_skip_modules" if hasattr(quantization_config, "llm_int8_skip_modules") else name  # bitsandbytes
    kept = getattr(quantization_config, name, None) or []
    # Names are matched from their start: with and without a head above the headless model.
    setattr(quantization_config, name, [*kept, r"(model\.)?(speech_encoder|projector)", "head"])
    return quantization_config


def pin_revision(model_id: str, revision: str | None, **hub: Any) -> str | None:
    """The commit that a repository's revision stands for (where its weights are pickled, that of their conversion), or a
    fingerprint of a local folder's weights: a hash of each safetensors file's name, size and header, and of both ends of
    each of its tensors. (Training or merging an adapter changes whole tensors; hashing all of a large model would take
    longer than loading it.)"""
    if not os.path.isdir(model_id):
        commit = extract_commit_hash(cached_file(model_id, "config.json", revision=revision, **hub), None)
        offline = is_offline_mode() or hub.get("local_files_only")
        return (None if offline else converted_commit(model_id, commit, hub.get("token"))) or commit
    digest = hashlib.sha256()
    for path in sorted(Path(model_id).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), size))
            digest.update(f"{path.name} {size} ".encode() + header)
            for tensor in json.loads(header).values():
                if "data_offsets" not in tensor:  # the file's metadata
                    continue
                start, end = (8 + len(header) + offset for offset in tensor["data_offsets"])
                for position in (start, max(start, end - SAMPLED_BYTES)):
                    file.seek(position)
                    digest.update(file.read(min(SAMPLED_BYTES, end - position)))
    return "sha256:" + digest.hexdigest()


def converted_commit(model_id: str, commit: str, token: str | None = None) -> str | None:
    """Of a repository with pickled weights alone, the commit at which the Hub's converter offers these very weights as
    safetensors, in a pull request of its own; `None` if there is none, or nobody can tell."""
    hub = HfApi(token=token)

    def weights(revision: str, ending: str) -> dict[str, str]:
        files = hub.list_repo_tree(model_id, revision=revision)
        return {file.path: file.blob_id for file in files if file.path.endswith(ending)}

    with suppress(HfHubHTTPError, HTTPError, OSError):  # a mirror, say, which has no pull requests
        if weights(commit, ".safetensors") or not (pickled := weights(commit, ".bin")):
            return None
        for request in hub.get_repo_discussions(model_id, author=CONVERTER, discussion_type="pull_request"):
            offered = hub.model_info(model_id, revision=request.git_reference).sha
            if request.author == CONVERTER and weights(offered, ".bin") == pickled and weights(offered, ".safetensors"):
                logger.warning("%s has pickled weights alone; its conversion %s is used.", model_id, request.url)
                return offered
    return None


def base_weights(config: SpeechLLMConfig, dtype: torch.dtype, **hub: Any) -> dict[str, torch.Tensor]:
    """State dict of the frozen parts under the SpeechLLM's names, fetched with these `BASE_OPTIONS`."""
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
            with explained(what, remedy="Download or copy it again."):
                found = pin_revision(base["id"], None)
            if found != revision:
                raise CheckpointError(
                    f"Cannot load {what}: its weights are not those that the checkpoint was trained with (pinned "
                    f"{revision[:19]}...). Restore the original files, or train again on the new ones."
                )
        options = {"dtype": dtype, "revision": hub_revision(base), **LOADING, **hub}
        remedy = "Check the id or path and the network; see `base_models` in config.json."
        with explained(what, remedy, weights_of=base["id"], revision=options["revision"], **hub):
            if name == "text":
                model, info = AutoModelForCausalLM.from_pretrained(base["id"], **options)
                prefix = f"{model.base_model_prefix}."
                rename = {prefix: "model.language_model.", "": "head."}
            elif config.is_whisper:
                model, info = WhisperModel.from_pretrained(base["id"], **options)
                model, rename = model.encoder, {"": "model.speech_encoder."}
                info["missing_keys"] = {key for key in info["missing_keys"] if key.startswith("encoder.")}
            else:
                model, info = AutoModel.from_pretrained(base["id"], **options)
                rename = {"": "model.speech_encoder."}
        refuse_incomplete(info, f"{what[0].upper()}{what[1:]}")
        for key, value in model.state_dict().items():
            if key in info["missing_keys"]:  # initialised at random
                value = torch.zeros_like(value)
            old = next(old for old in rename if key.startswith(old))
            weights[rename[old] + key.removeprefix(old)] = value
    return weights


def copy_generation_config(model, base: dict[str, str], tokenizer, **hub: Any) -> None:
    """The LLM's generation settings, with end-of-text and padding ids from its tokenizer where it has none, and with the
    token that ends an answer in its chat template, which fine-tuning teaches."""
    revision = hub_revision(base)
    if optional_file(base["id"], GENERATION_CONFIG_NAME, revision=revision, **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(base["id"], revision=revision, **hub)
    else:  # as with many LLMs
        model.generation_config = GenerationConfig.from_model_config(model.config.text_config)
    settings = model.generation_config
    settings.eos_token_id = tokenizer.eos_token_id if settings.eos_token_id is None else settings.eos_token_id
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if (end := _end_of_turn(tokenizer)) not in (None, *ends):
        settings.eos_token_id = [*(token for token in ends if token is not None), end]
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _end_of_turn(tokenizer) -> int | None:
    """The special token, if it is one, that ends an answer in the chat template. (Of base LLMs it is often none of their
    own ends of text.)"""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    except Exception:  # there is no template, or one that wants another chat
        return None
    last = tokenizer(text, add_special_tokens=False).input_ids[-1]
    added = tokenizer.added_tokens_decoder
    return last if last in tokenizer.all_special_ids or (last in added and added[last].special) else None


def hub_revision(base: dict[str, str]) -> str | None:
    """The `revision` to give to a loader: none for folders, whose revision is a fingerprint."""
    return None if os.path.isdir(base["id"]) else base["revision"]


def refuse_incomplete(info: dict[str, Any], what: str) -> None:
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
