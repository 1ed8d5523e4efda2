"""Fill the caches of what the frozen parts make of a data set: encoder frames, and text-side states of the LLM.

Each process takes its share of the items; all of them see the whole cache afterwards. With `mixed_precision`, the states
are computed as in training, under autocast.
"""

import hashlib
import json
import socket
import uuid

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..audio_speechllm import AudioError
from ..data.feature_cache import FeatureCache, audio_key, fingerprint, text_key
from ..data.items import AlignmentItems
from ..data.schema import Row, SetAside
from ..modeling_speechllm import SpeechLLMModel
from ..objectives import masked_mean
from ..processing_speechllm import SpeechLLMProcessor


def _autocast_dtype(mixed_precision: str, weights: torch.dtype) -> torch.dtype | None:
    """What autocast computes in; `None`: as the weights say, which is also so where they have that dtype."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return None if dtype == weights else dtype


def _autocast(device: torch.device, mixed_precision: str, weights: torch.dtype) -> torch.autocast:
    dtype = _autocast_dtype(mixed_precision, weights)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def frame_cache(
    folder: str, model: SpeechLLMModel, processor: SpeechLLMProcessor, mixed_precision: str = "no"
) -> FeatureCache:
    """The cache of this encoder's frames, empty or not."""
    config = model.config
    depends_on = {
        "what": "encoder frames",
        "encoder": fingerprint(model.speech_encoder),
        "configuration": {k: v for k, v in config.speech_config.to_dict().items() if not k.startswith("_")},
        "feature_extractor": {k: v for k, v in processor.feature_extractor.to_dict().items() if k != "mel_filters"},
        "layer": config.speech_layer,
        "context_seconds": config.context_seconds,
        "segment_seconds": processor.segment_seconds,
        "attention": model.speech_encoder.config._attn_implementation,
        "dtype": str(model.speech_encoder.dtype),
        "autocast": str(_autocast_dtype(mixed_precision, model.speech_encoder.dtype)),
    }
    return FeatureCache(folder, depends_on)


def check_shared(cache: FeatureCache) -> None:
    """Make sure that every process sees the files of all others: each fills its share of the cache and reads all of it.

    Raises:
        OSError: on every process, if one does not.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    mark = cache.folder / f".process-{state.process_index}-{uuid.uuid4().hex}"
    mark.touch()
    marks = gather_object([mark.name])  # all have been written when one is read
    unseen = [process for process, name in enumerate(marks) if not (cache.folder / name).exists()]
    found = gather_object([(socket.gethostname(), unseen)])
    mark.unlink()
    for process, (host, others) in enumerate(found):
        if others:
            raise OSError(
                f"Process {process} on {host} does not see in {cache.folder} what process(es) {others} wrote there. Put the "
                "cache into a folder that all machines share (`feature_cache`, `text_state_cache`), or do without it."
            )


@torch.no_grad()
def fill_frame_cache(
    cache: FeatureCache,
    rows: list[Row],
    model: SpeechLLMModel,
    processor: SpeechLLMProcessor,
    mixed_precision: str = "no",
) -> list[SetAside]:
    """Encode every utterance that the cache lacks. Returns those that cannot be used.

    Raises:
        OSError: if the processes do not share the folder, or it cannot be written.
    """
    check_shared(cache)
    state = PartialState()
    device = model.speech_encoder.device
    set_aside, missing = [], {}  # missing: key -> the rows with that recording
    for row in rows[state.process_index :: state.num_processes]:
        try:
            key = audio_key(row["audio"], row.get("sampling_rate"))
        except AudioError as error:
            set_aside.append(SetAside(row["id"], str(error), "audio cannot be decoded"))
            continue
        if key not in cache:
            missing.setdefault(key, []).append(row)
    training = model.training
    model.eval()
    progress = tqdm(
        missing.items(), desc="Encoding speech", unit="utt", disable=not state.is_local_main_process or not missing
    )
    for key, same in progress:
        try:
            segments = processor.extract_features(same[0]["audio"], same[0].get("sampling_rate"), name=same[0]["id"])
        except AudioError as error:
            set_aside += [SetAside(row["id"], str(error), "audio cannot be decoded") for row in same]
            continue
        frames, lengths = [], []
        for segment in segments:  # one at a time: memory stays bounded, and nothing is spent on padding
            inputs = {name: value.to(device) for name, value in processor.pad_features([segment]).items()}
            with _autocast(device, mixed_precision, model.speech_encoder.dtype):
                states, count = model.encode_speech(*inputs.values())
            frames.append(states[0, : int(count[0])])
            lengths.append(int(count[0]))
        cache.put(key, {"frames": torch.cat(frames), "lengths": torch.tensor(lengths)})
    model.train(training)
    state.wait_for_everyone()
    return gather_object(set_aside) if state.num_processes > 1 else set_aside


def _fingerprint_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what turns a text into token ids."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}  # of the last call
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def text_state_cache(
    folder: str,
    model: SpeechLLMModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    layers: list[int],
    pooled: bool,
    mixed_precision: str = "no",
) -> FeatureCache:
    """The cache of this LLM's states of transcripts behind `prefix`, at `layers`; mean-pooled or one per token."""
    depends_on = {
        "what": "text states",
        "llm": fingerprint(model.language_model),
        "configuration": {k: v for k, v in model.config.text_config.to_dict().items() if not k.startswith("_")},
        "attention": model.language_model.config._attn_implementation,
        "tokenizer": _fingerprint_of_tokenizer(tokenizer),
        "prefix": prefix,
        "layers": layers,
        "pooled": pooled,
        "dtype": str(model.language_model.dtype),
        "autocast": str(_autocast_dtype(mixed_precision, model.language_model.dtype)),
    }
    return FeatureCache(folder, depends_on)


@torch.no_grad()
def fill_text_state_cache(
    cache: FeatureCache,
    items: AlignmentItems,
    model: SpeechLLMModel,
    layers: list[int],
    pooled: bool,
    mixed_precision: str = "no",
    batch_size: int = 16,
) -> None:
    """Compute the states of every transcript that the cache lacks, in batches of transcripts of similar length.

    An item's tensors are `layer_<l>`: (tokens, dim), or (1, dim) in float32 where they are pooled.

    Raises:
        OSError: if the processes do not share the folder, or it cannot be written.
    """
    check_shared(cache)
    state = PartialState()
    texts = sorted({row["text"] for row in items.rows})
    missing = [text for text in texts[state.process_index :: state.num_processes] if text_key(text) not in cache]
    encoded = sorted(((items.text_ids({"text": text}), text) for text in missing), key=lambda pair: len(pair[0]))
    device, skip = model.get_input_embeddings().weight.device, len(items.prefix)
    progress = tqdm(
        range(0, len(encoded), batch_size),
        desc="Reading transcripts",
        unit="batch",
        disable=not state.is_local_main_process or not missing,
    )
    for start in progress:
        part = encoded[start : start + batch_size]
        batch = items.processor.pad_rows([{"input_ids": ids} for ids, _ in part]).to(device)
        with _autocast(device, mixed_precision, model.language_model.dtype):
            states = model(**batch, layers=layers).layer_states
        mask = batch["attention_mask"].bool()
        mask[:, :skip] = False
        for i, (_, text) in enumerate(part):
            keep = (lambda s: masked_mean(s[None], mask[i][None])) if pooled else (lambda s: s[mask[i]])  # noqa: B023
            cache.put(text_key(text), {f"layer_{layer}": keep(states[layer][i]) for layer in layers})
    state.wait_for_everyone()
