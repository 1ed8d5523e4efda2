"""From rows to model inputs: one dataset class per training stage, one collator for both.

An item holds the audio either as encoder input (`segments`) or, where a cache of encoder frames is at hand, as frames
(`frames`), next to token ids with the right number of placeholders. Rows whose audio cannot be used, or that are longer
than the LLM's context, become `SetAside` items; the collator leaves them out of the batch and passes their names on.
"""

import os
from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..audio_speechllm import AudioError
from ..processing_speechllm import SpeechLLMProcessor
from .feature_cache import FeatureCache, audio_key, text_key
from .prompts import chat_of
from .schema import Row, SetAside, with_ids


class SpeechItems(Dataset):
    """Rows with their audio prepared for the model.

    Args:
        rows: of the schema (`schema.py`).
        processor: of the model.
        frames: cache of encoder frames (see `trainers/frozen_states.py`); `None` prepares encoder input instead.
        context: tokens that the LLM has positions for (`SpeechLLMConfig.context`); longer items are set aside.
    """

    def __init__(
        self,
        rows: list[Row],
        processor: SpeechLLMProcessor,
        frames: FeatureCache | None = None,
        context: float = inf,
    ):
        self.rows = with_ids(rows)
        self.processor = processor
        self.frames = frames
        self.context = context

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any] | SetAside:
        row = self.rows[index]
        try:
            speech, frames = self._speech(row)
            text = self._text(row, frames)
        except AudioError as error:
            return SetAside(row["id"], str(error), "audio cannot be decoded")
        if _longest(text) > self.context:  # the number is another with and without the answer; the row is one
            reason = (
                f"{row['id']} takes more tokens than the {self.context:,} of the LLM's context, {self.speech_tokens(frames):,} "
                "of them speech. Cut its audio or text, or leave it out (maximum_seconds)."
            )
            return SetAside(row["id"], reason, "longer than the LLM's context")
        return {"index": index, **speech, **text}

    def first_usable(self) -> dict[str, Any]:
        """The first item that can be used; stands in where a whole batch cannot.

        Raises:
            ValueError: if there is none.
        """
        for index in range(len(self)):
            if not isinstance(item := self[index], SetAside):
                return item
        raise ValueError(f"None of the {len(self)} utterances can be used; the first: {self[0].reason}")

    def _speech(self, row: Row) -> tuple[dict[str, Any], list[int]]:
        """The row's audio, and the encoder frames of each of its segments."""
        if (frames := self._cached_frames(row)) is not None:
            return {"frames": frames}, [len(segment) for segment in frames]
        segments = self.segments(row)
        return {"segments": segments}, [self.processor.rule.frames(segment["steps"]) for segment in segments]

    def speech_tokens(self, segment_frames: list[int]) -> int:
        """The number of speech tokens of so many encoder frames."""
        return sum(self.processor.rule.tokens(frames) for frames in segment_frames)

    def _cached_frames(self, row: Row) -> list[torch.Tensor] | None:
        if self.frames is None:
            return None
        if "parts" in row:
            parts = [self._cached_frames(part) for part in row["parts"]]
            return None if any(part is None for part in parts) else [segment for part in parts for segment in part]
        cached = self.frames.get(audio_key(row["audio"], row.get("sampling_rate")))
        return None if cached is None else list(cached["frames"].split(cached["lengths"].tolist()))

    def segments(self, row: Row) -> list[dict[str, Any]]:
        """Encoder input of the row's audio; of joined rows (`joining.py`), of one part after the other."""
        if "parts" in row:
            return [segment for part in row["parts"] for segment in self.segments(part)]
        return self.processor.extract_features(row["audio"], row.get("sampling_rate"), name=row["id"])

    def _text(self, row: Row, segment_frames: list[int]) -> dict[str, Any]:
        raise NotImplementedError


def _longest(text: dict[str, Any]) -> int:
    """Tokens of the longest sequence of an item."""
    parts = [text, *(part for part in text.get("further", {}).values() if isinstance(part, dict))]
    return max(len(part[name]) for part in parts for name in ("input_ids", "text_input_ids") if name in part)


# A row and the encoder frames of its segments -> a prompt (`input_ids`, `labels`), or what else an objective needs.
FurtherInput = Callable[[Row, list[int]], Any]


class AlignmentItems(SpeechItems):
    """Speech and transcript behind one shared prefix, for contrastive pretraining.

    Args:
        prefix: token ids that both sides begin with and that pooling leaves out.
        text_states: cache of the LLM's states of the transcripts; `None` leaves them to be computed.
        further: by name, what further objectives need of a row.
    """

    def __init__(
        self,
        *args,
        prefix: list[int],
        text_states: FeatureCache | None = None,
        further: dict[str, FurtherInput] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.prefix = prefix
        self.text_states = text_states
        self.further = further or {}

    def text_ids(self, row: Row) -> list[int]:
        return self.prefix + self.processor.tokenizer(row["text"], add_special_tokens=False).input_ids

    def _text(self, row: Row, segment_frames: list[int]) -> dict[str, Any]:
        item = {
            "input_ids": self.prefix + [self.processor.audio_token_id] * self.speech_tokens(segment_frames),
            "text_input_ids": self.text_ids(row),
            "further": {name: prepare(row, segment_frames) for name, prepare in self.further.items()},
        }
        states = self.text_states.get(text_key(row["text"])) if self.text_states is not None else None
        return item if states is None else {**item, "text_states": states}


class AnswerItems(SpeechItems):
    """Chats with their answers, for fine-tuning; without answers (`with_answer=False`), prompts for generation."""

    def __init__(self, *args, with_answer: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.with_answer = with_answer

    def _text(self, row: Row, segment_frames: list[int]) -> dict[str, Any]:
        return self._ids(chat_of(row, with_answer=self.with_answer), [self.speech_tokens(segment_frames)])

    def _ids(self, chat: list[dict], speech_tokens: list[int]) -> dict[str, Any]:
        """`input_ids`, and `labels` where there is an answer, of a chat whose audios take so many tokens."""
        if self.with_answer:
            pieces = self.processor.answer_pieces(chat)
        else:
            pieces = [(self.processor.apply_chat_template(chat, add_generation_prompt=True), False)]
        ids = self.processor.tokenize_pieces(pieces, speech_tokens)
        return ids if self.with_answer else {"input_ids": ids["input_ids"]}


class SpeechCollator:
    """Items -> one batch: audio inputs, `input_ids`, `attention_mask`, and what the items have of `labels`, text side,
    text states and `further` inputs. `rows` are the items' indices; `set_aside` lists what was left out.

    Args:
        dataset: where the items come from.
        padding_side: of the token ids; `"left"` for generation.
    """

    def __init__(self, dataset: SpeechItems, padding_side: str = "right"):
        self.dataset = dataset
        self.processor = dataset.processor
        self.padding_side = padding_side

    def __call__(self, items: list[dict[str, Any] | SetAside]) -> dict[str, Any]:
        set_aside = [item for item in items if isinstance(item, SetAside)]
        usable = [item for item in items if not isinstance(item, SetAside)]
        batch = {"set_aside": set_aside, "weight": float(bool(usable))}
        if not usable:  # a stand-in keeps every process in step; its weight, and no labels, take it out of the loss
            usable = [self.dataset.first_usable()]
            usable = [{k: [-100] * len(v) if k == "labels" else v for k, v in item.items()} for item in usable]
        batch["rows"] = [item["index"] for item in usable]
        batch.update(self._speech(usable))
        batch.update(self._padded(usable))
        if "text_input_ids" in usable[0]:
            text = self._padded([{"input_ids": item["text_input_ids"]} for item in usable])
            batch.update({f"text_{name}": value for name, value in text.items()})
        if all("text_states" in item for item in usable):
            names = usable[0]["text_states"]
            batch["text_states"] = {
                name: pad_sequence([item["text_states"][name] for item in usable], batch_first=True) for name in names
            }
        if further := usable[0].get("further"):
            columns = {name: [item["further"][name] for item in usable] for name in further}
            batch["further"] = {
                name: self._padded(values) if isinstance(values[0], dict) else values
                for name, values in columns.items()
            }
        return batch

    def _speech(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not any("frames" in item or "segments" in item for item in items):
            return {}  # text alone
        if all("frames" in item for item in items):
            frames = [segment for item in items for segment in item["frames"]]
            lengths = torch.tensor([len(segment) for segment in frames])
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            return {"speech_frames": pad_sequence(frames, batch_first=True), "speech_frames_mask": mask}
        # Some frames may be missing from the cache: then the whole batch goes through the encoder.
        for item in items:
            if "segments" not in item:
                item["segments"] = self.dataset.segments(self.dataset.rows[item["index"]])
        return self.processor.pad_features([segment for item in items for segment in item["segments"]])

    def _padded(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [{name: item[name] for name in ("input_ids", "labels") if name in item} for item in items]
        return dict(self.processor.pad_rows(rows, padding_side=self.padding_side))


def approximate_length(row: Row) -> float:
    """For sorting: the row's duration in seconds where it is known, else a guess from its audio. Files are not opened;
    their bytes count as 16-bit WAV at 16 kHz, so compressed ones are underestimated."""
    if row.get("duration"):
        return float(row["duration"])
    audio, rate = row["audio"], row.get("sampling_rate")
    if isinstance(audio, dict):
        if audio.get("parts"):
            return sum(approximate_length({"audio": part, "sampling_rate": rate}) for part in audio["parts"])
        if audio.get("array") is None:
            for name, per_second in (("duration", 1), ("byte_length", 32_000)):
                if isinstance(audio.get(name), int | float) and audio[name] > 0:  # what else it is, decoding tells
                    return audio[name] / per_second
        rate = audio.get("sampling_rate", rate)
        audio = next((audio[name] for name in ("array", "bytes", "path") if audio.get(name) is not None), "")
    if isinstance(audio, str | os.PathLike):
        try:
            return os.path.getsize(audio) / 32_000
        except OSError:
            return 0.0
    if isinstance(audio, bytes | bytearray | memoryview):
        return len(audio) / 32_000
    shape = getattr(audio, "shape", None) or (len(audio) if hasattr(audio, "__len__") else 0,)
    return max(shape) / (rate or 16_000)
