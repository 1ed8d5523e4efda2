"""One vector per utterance or text at every place of the model: the mean of its hidden states there.

Places on the speech side, in the order of the data: "encoder" (its frames), then the LLM's hidden states "0", "5", ...;
"0" is the LLM's input, which is the projector's output. Speech and text both stand behind the shared prefix of
pretraining, which the mean leaves out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.feature_cache import FeatureCache
from ..data.items import SpeechCollator, SpeechItems, approximate_length
from ..data.schema import Row, SetAside
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..objectives import masked_mean
from ..processing_speechllm import SpeechLLMProcessor


@dataclass
class PooledSpeech:
    """
    rows: the rows that could be used. states: place -> (rows, dim), float32 on the CPU. set_aside: the other rows.
    """

    rows: list[Row]
    states: dict[str, torch.Tensor]
    set_aside: list[SetAside]


class _SpeechBehindPrefix(SpeechItems):
    def __init__(self, *args, prefix: Sequence[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.prefix = list(prefix)

    def _text(self, row: Row, segment_frames: list[int]) -> dict[str, list[int]]:
        return {"input_ids": self.prefix + [self.processor.audio_token_id] * self.speech_tokens(segment_frames)}


@torch.no_grad()
def pooled_speech(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    rows: list[Row],
    layers: list[int],
    *,
    prefix: Sequence[int] = (),
    batch_size: int = 16,
    frames: FeatureCache | None = None,
) -> PooledSpeech:
    """Mean states of utterances at the encoder's output and at `layers` of the LLM.

    Args:
        prefix: token ids before the speech tokens.
        frames: cache of this encoder's frames; what it lacks is encoded.

    Raises:
        ValueError: if no row can be used, or a state holds NaN or infinity.
    """
    items = _SpeechBehindPrefix(rows, processor, frames, prefix=prefix)
    collate, found, set_aside = SpeechCollator(items), {}, []
    model.eval()
    order = sorted(range(len(items)), key=lambda i: approximate_length(items.rows[i]))
    for start in range(0, len(order), batch_size):
        loaded = [items[i] for i in order[start : start + batch_size]]
        set_aside += [item for item in loaded if isinstance(item, SetAside)]
        if not (usable := [item for item in loaded if not isinstance(item, SetAside)]):
            continue
        for item in usable:
            if "frames" not in item:
                item["frames"] = [_encoded(model, processor, segment) for segment in item.pop("segments")]
        batch = {name: value for name, value in collate(usable).items() if isinstance(value, torch.Tensor)}
        batch = {name: value.to(model.device) for name, value in batch.items()}
        states = model.model(**batch, layers=layers).layer_states
        spoken = batch["input_ids"] == processor.audio_token_id
        means = [masked_mean(states[layer], spoken).cpu() for layer in layers]
        for n, item in enumerate(usable):
            heard = torch.cat(item["frames"]).float().mean(0)
            found[item["index"]] = [heard.cpu(), *(mean[n] for mean in means)]
    if not found:
        raise ValueError(f"None of the {len(rows)} utterances can be used; the first: {set_aside[0].reason}")
    kept = sorted(found)
    places = ["encoder", *map(str, layers)]
    states = {place: torch.stack([found[i][n] for i in kept]) for n, place in enumerate(places)}
    return PooledSpeech([items.rows[i] for i in kept], _finite(states, [items.rows[i]["id"] for i in kept]), set_aside)


def _encoded(model, processor: SpeechLLMProcessor, segment: dict) -> torch.Tensor:
    """(frames, dim) of one segment: alone, so that memory is bounded and nothing is spent on padding."""
    inputs = {name: value.to(model.device) for name, value in processor.pad_features([segment]).items()}
    states, count = model.model.encode_speech(*inputs.values())
    return states[0, : int(count[0])].cpu()


@torch.no_grad()
def pooled_text(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    texts: list[str],
    layers: list[int],
    *,
    prefix: Sequence[int] = (),
    batch_size: int = 16,
) -> dict[str, torch.Tensor]:
    """Mean states of texts at `layers`: layer (as text) -> (texts, dim), float32 on the CPU. Equal texts are read once.

    Raises:
        ValueError: if a text has no tokens, or a state holds NaN or infinity.
    """
    distinct = list(dict.fromkeys(texts))
    ids = {text: processor.tokenizer(text, add_special_tokens=False).input_ids for text in distinct}
    if empty := [text for text in distinct if not ids[text]]:
        raise ValueError(f"The text {empty[0]!r} has no tokens. Leave its row out.")
    model.eval()
    found, skip = {}, len(prefix)
    order = sorted(distinct, key=lambda text: len(ids[text]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = dict(processor.pad_rows([{"input_ids": [*prefix, *ids[text]]} for text in part]))
        batch = {name: value.to(model.device) for name, value in batch.items()}
        states = model.model(**batch, layers=layers).layer_states
        mask = batch["attention_mask"].bool()
        mask[:, :skip] = False
        means = [masked_mean(states[layer], mask).cpu() for layer in layers]
        found.update({text: [mean[i] for mean in means] for i, text in enumerate(part)})
    states = {str(layer): torch.stack([found[text][n] for text in texts]) for n, layer in enumerate(layers)}
    return _finite(states, texts)


def _finite(states: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    for place, state in states.items():
        if not (good := state.isfinite().all(-1)).all():
            first = names[int((~good).nonzero()[0])]
            raise ValueError(
                f"{int((~good).sum())} of {len(state)} states at {place!r} hold NaN or infinity, the first of {first!r}. "
                "Check the checkpoint, or load it in another dtype."
            )
    return states
