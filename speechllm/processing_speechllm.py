"""Processor of a SpeechLLM: audio and chats in, model inputs out.

1. Audio is decoded, resampled and cut into segments of at most `segment_seconds` of equal length.
2. Each segment becomes encoder features; the number of speech tokens that the model will make of it follows from its
   length alone (`SpeechTokenRule`).
3. In the prompt, the audio placeholder is repeated once per speech token, so that batching, padding, several audios in
   one prompt and long audio are right by construction.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, BatchFeature, ProcessorMixin

from .audio_speechllm import SHORTEST, AudioSource, load_audio
from .base_models_speechllm import BASE_OPTIONS, add_audio_token, hub_revision
from .chat_speechllm import AUDIO_PARTS_TEMPLATE, PLAIN_TEMPLATE, chat_audios, check_chat
from .checkpoint_speechllm import copy_hub_files
from .configuration_speechllm import AUDIO_TOKEN, AUTO_MAP, SAMPLING_RATE, SpeechLLMConfig, SpeechTokenRule


OPTION_GROUPS = ("common_kwargs", "audio_kwargs", "text_kwargs")
CALL_OPTIONS = (  # that `apply_chat_template` takes directly too
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_tensors",
    "sampling_rate",
    "truncation",
)
NOT_WITH_AUDIO = {  # that `apply_chat_template` of a tokenizer has
    "return_assistant_tokens_mask": "`return_labels=True` marks the answers",
    "sanitize_control_tokens": "write no special tokens into texts",
}


class SpeechLLMProcessor(ProcessorMixin):
    """Wraps the encoder's feature extractor and the LLM's tokenizer.

    Args:
        feature_extractor: of the speech encoder, at 16 kHz.
        tokenizer: of the LLM; the audio placeholder is added to it if it is not there yet.
        chat_template: Jinja template that takes messages with audio parts; default: the tokenizer's own, extended.
        speech_token_rule: `SpeechLLMConfig.speech_token_rule` of the model, as a dict.
        segment_seconds: longest stretch of audio that the encoder hears at once (at most 30 for Whisper).
        context_seconds: see `SpeechLLMConfig`.
    """

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template: str | None = None,
        speech_token_rule: dict[str, Any] | None = None,
        segment_seconds: float = 30.0,
        context_seconds: float = 0.5,
    ):
        if feature_extractor.sampling_rate != SAMPLING_RATE:
            raise ValueError(f"The feature extractor works at {feature_extractor.sampling_rate} Hz; 16,000 is needed.")
        if speech_token_rule is None:
            raise ValueError("Give `speech_token_rule=config.speech_token_rule.to_dict()` of the model's config.")
        if speech_token_rule["samples_per_step"] > 1 and segment_seconds > feature_extractor.chunk_length:
            raise ValueError(
                f"segment_seconds is {segment_seconds}, but this encoder hears {feature_extractor.chunk_length} seconds "
                "at once. Longer audio is cut into segments of that length."
            )
        if tokenizer.pad_token is None:  # as with Llama; masked, so that any will do
            tokenizer.pad_token = tokenizer.eos_token
        self.audio_token = AUDIO_TOKEN
        self.audio_token_id = add_audio_token(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special_ids = {*tokenizer.all_special_ids, *(i for i in added if added[i].special)}
        self.speech_token_rule = speech_token_rule
        self.rule = SpeechTokenRule.from_dict(speech_token_rule)
        self.segment_seconds = segment_seconds
        self.context_seconds = context_seconds
        if chat_template is None:
            own = tokenizer.chat_template
            own = own["default"] if isinstance(own, dict) else own  # some LLMs have several templates, by purpose
            chat_template = AUDIO_PARTS_TEMPLATE + (own or PLAIN_TEMPLATE)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_config(cls, config: SpeechLLMConfig, **kwargs) -> "SpeechLLMProcessor":
        """The processor of a model made by `from_speech_text_pretrained`, from its base models.

        Args:
            kwargs: `token`, `cache_dir` and the like to fetch them with, and arguments of the class.
        """
        hub = {name: kwargs.pop(name) for name in BASE_OPTIONS if name in kwargs}

        def load(auto_class, base):
            return auto_class.from_pretrained(base["id"], revision=hub_revision(base), **hub)

        return cls(
            load(AutoFeatureExtractor, config.base_models["speech"]),
            load(AutoTokenizer, config.base_models["text"]),
            speech_token_rule=config.speech_token_rule.to_dict(),
            context_seconds=config.context_seconds,
            **kwargs,
        )

    @property
    def is_log_mel(self) -> bool:
        return self.rule.samples_per_step > 1

    @property
    def audio_input_name(self) -> str:
        return "input_features" if self.is_log_mel else "input_values"

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", self.audio_input_name, f"{self.audio_input_name}_mask"]

    # ---- audio -----------------------------------------------------------------------------------------------------

    def segment_lengths(self, samples: int) -> list[int]:
        """Samples of each segment that an audio of `samples` samples is cut into: equal but for rounding, so that no
        short rest is left at the end."""
        count = max(1, -(-samples // round(self.segment_seconds * SAMPLING_RATE)))
        ends = [round(i * samples / count) for i in range(count + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]

    def count_speech_tokens(self, samples: int) -> int:
        """Speech tokens, hence placeholders, of an audio of `samples` samples at 16 kHz."""
        return sum(self.rule.tokens(self.rule.frames(self.rule.steps(n))) for n in self.segment_lengths(samples))

    def count_tokens(self, text: str, audio_samples: list[int]) -> int:
        """Tokens of a rendered chat whose audios have so many samples at 16 kHz."""
        written = len(self.tokenizer(text, add_special_tokens=False).input_ids) - len(audio_samples)
        return written + sum(map(self.count_speech_tokens, audio_samples))

    def extract_features(
        self, audio: AudioSource, sampling_rate: int | None = None, name: str | None = None
    ) -> list[dict[str, torch.Tensor | int]]:
        """Encoder input of each segment of one audio: `features` (samples,) or (log-mel bins, steps), and `steps`, the
        number of them that hold the audio (Whisper's features go on for `context_seconds` of silence).

        Raises:
            AudioError: if the audio cannot be used, see `load_audio`, or is shorter than one encoder frame.
        """
        waveform = load_audio(audio, sampling_rate, name, shortest=self.shortest)
        segments, start = [], 0
        for length in self.segment_lengths(len(waveform)):
            segments.append(self._extract_segment(waveform[start : start + length]))
            start += length
        return segments

    def _extract_segment(self, samples: np.ndarray) -> dict[str, torch.Tensor | int]:
        extractor = self.feature_extractor
        steps = self.rule.steps(len(samples))
        if not self.is_log_mel:
            features = extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_values[0]
            return {"features": features, "steps": steps}
        # Rounded up to whole hops, so that every step that counts as audio has its log-mel frame.
        heard = min(
            steps * self.rule.samples_per_step + round(self.context_seconds * SAMPLING_RATE), extractor.n_samples
        )
        padded = np.pad(samples, (0, max(0, heard - len(samples))))
        features = extractor(padded, sampling_rate=SAMPLING_RATE, padding="longest", return_tensors="pt")
        return {"features": features.input_features[0], "steps": min(steps, features.input_features.shape[-1])}

    def pad_features(self, segments: list[dict[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
        """Segments of `extract_features` -> `input_values` (segments, samples) or `input_features` (segments, bins,
        steps), padded on the right, and its mask (segments, samples or steps), `True` = valid."""
        first = segments[0]["features"]
        size = max(segment["features"].shape[-1] for segment in segments)
        features = first.new_zeros(len(segments), *first.shape[:-1], size)
        for row, segment in zip(features, segments):
            row[..., : segment["features"].shape[-1]] = segment["features"]
        steps = torch.tensor([segment["steps"] for segment in segments])
        mask = torch.arange(size) < steps[:, None]
        return {self.audio_input_name: features, f"{self.audio_input_name}_mask": mask}

    @property
    def shortest(self) -> int:
        """Samples at 16 kHz that an audio must have."""
        return max(SHORTEST, self.rule.shortest)

    def _counts(self, audios: list[list[dict[str, torch.Tensor | int]]]) -> list[int]:
        """Speech tokens of each audio, given its segments."""
        return [sum(self.rule.tokens(self.rule.frames(s["steps"])) for s in segments) for segments in audios]

    # ---- text ------------------------------------------------------------------------------------------------------

    def expand_placeholders(self, texts: list[str], counts: list[int]) -> list[str]:
        """Repeat the i-th placeholder of the texts `counts[i]` times.

        Raises:
            ValueError: if the texts hold more or fewer placeholders than there are counts.
        """
        found = [text.count(AUDIO_TOKEN) for text in texts]
        if sum(found) != len(counts):
            raise ValueError(
                f"The texts hold {sum(found)} audio placeholders {AUDIO_TOKEN!r} ({found} per text), but {len(counts)} "
                "audios were given. Put one placeholder, or one audio part of a chat message, where each audio belongs."
            )
        remaining = iter(counts)
        expanded = []
        for text in texts:
            head, *tails = text.split(AUDIO_TOKEN)
            expanded.append(head + "".join(AUDIO_TOKEN * next(remaining) + tail for tail in tails))
        return expanded

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: AudioSource | list[AudioSource] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Texts with placeholders and their audios -> model inputs.

        Args:
            text: prompts; each audio has one placeholder `<|audio|>`, in order.
            audio: one audio or a list over all prompts (nested lists, one per prompt, are joined).
            sampling_rate: of arrays and tensors, in Hz; default 16,000.
            return_tensors: `"pt"`, the default if there is audio, or `"np"`.
            padding_side: `"left"`, the default, for generation; `"right"` for training.
            kwargs: for the tokenizer (`padding`, `add_special_tokens`, ...). All of these may also be given in
                `text_kwargs`, `audio_kwargs` and `common_kwargs`.

        Raises:
            AudioError: if an audio cannot be used.
            ValueError: if audios and placeholders do not match.
        """
        if text is None and audio is None:
            raise ValueError("Give `text`, or `text` and `audio`.")
        options = _flat_options(kwargs)
        sampling_rate, tensor_type = options.pop("sampling_rate", None), options.pop("return_tensors", None)
        segments = [self.extract_features(item, sampling_rate) for item in _flat_audios(audio)]
        inputs = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if segments:
                _refuse_truncation(options)
            defaults = {"padding": len(texts) > 1, "padding_side": "left", "return_token_type_ids": False}
            expanded = self.expand_placeholders(texts, self._counts(segments))
            inputs = dict(self.tokenizer(expanded, **{**defaults, **options}))
        batch = BatchFeature(inputs, tensor_type=tensor_type or ("pt" if segments else None))
        if segments:
            features = self.pad_features([segment for audio in segments for segment in audio])
            batch.update({name: x.numpy() if tensor_type == "np" else x for name, x in features.items()})
        return batch

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_labels: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> str | list[str] | BatchFeature:
        """Render one chat or several; with `tokenize=True, return_dict=True`, make model inputs of them.

        Args:
            conversation: messages whose `content` is a string or a list of parts, `{"type": "text", "text": ...}` and
                `{"type": "audio", "audio": path, bytes, array or tensor}`, in any turn. A part may have its own
                `sampling_rate`.
            return_labels: also return `labels`: the assistant's answers with their end-of-turn token, -100 elsewhere
                (with padding on the right; the chat must hold its answers).
            processor_kwargs: as for `__call__`; the common ones can also be given directly.
            kwargs: `add_generation_prompt`, `continue_final_message` and variables of the template, such as
                `enable_thinking` (here `False` by default).

        Raises:
            AudioError: if an audio part has no audio, or one that cannot be used.
            ValueError: for an option of tokenizers that there is not here.
        """
        for name, instead in NOT_WITH_AUDIO.items():
            if kwargs.pop(name, None):
                raise ValueError(f"There is no `{name}` here: {instead}.")
        groups = {name: kwargs.pop(name) for name in OPTION_GROUPS if name in kwargs}
        options = _flat_options({**(processor_kwargs or {}), **groups})
        for name in CALL_OPTIONS:
            if kwargs.get(name) is not None:
                options[name] = kwargs.pop(name)
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        chats = conversation if batched else [conversation]
        if not tokenize:
            rendered = [self._render(chat, chat_template, **kwargs) for chat in chats]
            return rendered if batched else rendered[0]

        sampling_rate = options.pop("sampling_rate", None)
        audios = [audio for chat in chats for audio in chat_audios(chat, sampling_rate)]
        options.setdefault("add_special_tokens", False)  # the template writes them
        if return_labels:
            batch = self._tokenize_with_labels(chats, audios, chat_template, options, **kwargs)
        else:
            rendered = [self._render(chat, chat_template, **kwargs) for chat in chats]
            batch = self(text=rendered, audio=audios or None, **options)
        return batch if return_dict else batch["input_ids"]

    def _render(self, chat: list[dict[str, Any]], chat_template: str | None = None, **kwargs) -> str:
        check_chat(chat)
        template = chat_template or self.chat_template
        # LLMs that think before they answer (Qwen3) would think, or be taught an empty thought, where an answer is wanted.
        kwargs.setdefault("enable_thinking", False)
        return self.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **kwargs)

    def _tokenize_with_labels(self, chats, audios, chat_template, options, **kwargs) -> BatchFeature:
        _refuse_truncation(options)
        if options.get("padding") not in (None, True, "longest") or options.get("pad_to_multiple_of"):
            raise ValueError(
                "With return_labels, rows are padded to the longest of them. Leave out other kinds of padding."
            )
        segments = [self.extract_features(audio) for audio in audios]
        counts, rows = self._counts(segments), []
        for chat in chats:
            pieces = self.answer_pieces(chat, chat_template, **kwargs)
            placeholders = sum(text.count(AUDIO_TOKEN) for text, _ in pieces)
            rows.append(self.tokenize_pieces(pieces, counts[:placeholders]))
            counts = counts[placeholders:]
        batch = self.pad_rows(rows, padding_side=options.get("padding_side", "right"))
        if segments:
            batch.update(self.pad_features([segment for audio in segments for segment in audio]))
        if options.get("return_tensors") == "np":
            batch = BatchFeature({name: value.numpy() for name, value in batch.items()})
        return batch

    def answer_pieces(self, chat: list[dict[str, Any]], chat_template: str | None = None, **kwargs):
        """A rendered chat, cut at its answers: a list of (text, whether the text is an answer). An answer ends with
        its end-of-turn token, so that the model learns to stop."""
        kwargs.pop("add_generation_prompt", None)
        pieces, done = [], ""
        for i, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            prompt = self._render(chat[:i], chat_template, add_generation_prompt=True, **kwargs)
            whole = self._render(chat[: i + 1], chat_template, **kwargs)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(
                    "The chat template rewrites earlier turns, so the answers' places cannot be told. Give one "
                    "question and answer per chat, or another `chat_template`."
                )
            answer = whole[len(prompt) :].rstrip()
            pieces += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        if not pieces:
            raise ValueError("The chat has no assistant turn to learn from. Add the answer as its last message.")
        return pieces

    def tokenize_pieces(self, pieces: list[tuple[str, bool]], counts: list[int]) -> dict[str, list[int]]:
        """`input_ids` and `labels` of one chat. Prompt and answer are tokenized apart, as they are in generation."""
        texts = self.expand_placeholders([text for text, _ in pieces], counts)
        input_ids, labels = [], []
        for text, (_, is_answer) in zip(texts, pieces):
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if is_answer and (not ids or ids[-1] not in self._special_ids):
                ids = [*ids, self.tokenizer.eos_token_id]
            input_ids += ids
            labels += ids if is_answer else [-100] * len(ids)
        return {"input_ids": input_ids, "labels": labels}

    def pad_rows(self, rows: list[dict[str, list[int]]], padding_side: str = "right") -> BatchFeature:
        """Rows of `tokenize_pieces` -> `input_ids`, `attention_mask` and `labels` (batch, length)."""
        length = max(len(row["input_ids"]) for row in rows)
        pad = self.tokenizer.pad_token_id

        def padded(values, value):
            missing = [value] * (length - len(values))
            return values + missing if padding_side == "right" else missing + values

        columns = {
            "input_ids": [padded(row["input_ids"], pad) for row in rows],
            "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in rows],
        }
        if "labels" in rows[0]:
            columns["labels"] = [padded(row["labels"], -100) for row in rows]
        return BatchFeature(columns, tensor_type="pt")

    # ---- saving ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_hub_files(save_directory)  # first, as the rest may be pushed at once
        return super().save_pretrained(save_directory, **kwargs)


def _flat_audios(audio) -> list[AudioSource]:
    if audio is None:
        return []
    if isinstance(audio, list | tuple) and not (audio and isinstance(audio[0], int | float)):
        return [item for part in audio for item in _flat_audios(part)]
    return [audio]


def _flat_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options, some of them perhaps in groups as other processors take them, without the groups."""
    groups = {name: options[name] or {} for name in OPTION_GROUPS if name in options}
    flat = {name: value for name, value in options.items() if name not in groups and value is not None}
    for group, values in groups.items():
        for name, value in values.items():
            if flat.setdefault(name, value) != value:
                raise ValueError(f"`{name}` is {value!r} in `{group}` and {flat[name]!r} beside it. Give it once.")
    return flat


def _refuse_truncation(options: dict[str, Any]) -> None:
    if options.get("truncation"):
        raise ValueError("Truncation could cut audio placeholders; shorten the text or the audio instead.")


__all__ = ["SpeechLLMProcessor"]
