"""A pipeline for plain use, audio in and text out, that travels with every checkpoint.

    from transformers import pipeline
    pipe = pipeline("audio-text-to-text", model="...", trust_remote_code=True)
    pipe("talk.wav", prompt="Summarise the talk.")["text"]

1. Audio is decoded; with `chunk_length_s`, long audio is cut at pauses into chunks of at most that length.
2. Chunks are answered in batches of `batch_size`, over all audios of the call.
3. The answers to an audio's chunks are joined.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import Pipeline
from transformers.utils import logging

from .audio_speechllm import AudioSource, cut_at_pauses, is_silent, load_audio
from .configuration_speechllm import SAMPLING_RATE


PROMPT = "Transcribe the speech."


class SpeechLLMPipeline(Pipeline):
    """`pipeline("audio-text-to-text", model=..., trust_remote_code=True)`.

    Every option of `__call__` can be given to `pipeline(...)` too, as the default of all calls.
    """

    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = _load_video_processor = False

    def __call__(self, inputs: AudioSource | dict[str, Any] | Iterable, **options: Any):
        """Answer one audio or several.

        Args:
            inputs: a path, bytes of an audio file, an array or tensor of samples, or a dict with `audio` (or with
                `array` and `sampling_rate`, `bytes` or `path`) and perhaps its own `prompt`; or a list of these, or a
                generator or data set, which is read as answers are asked for.
            prompt: the instruction beside the audio; default: transcribe.
            sampling_rate: of arrays and tensors, in Hz; default 16,000.
            chunk_length_s: answer longer audio in chunks of at most this many seconds. Right for transcribing
                or translating, wrong where the answer depends on the whole, which the default, one chunk, keeps.
            max_audio_s: refuse longer audio; give it for audio from strangers.
            batch_size: chunks answered at once; default 1.
            progress: `True` for a progress bar, or a function called with (seconds done, seconds known of).
            generate_kwargs: for `generate`, which can also be given directly, such as `max_new_tokens` (default 256).

        Returns:
            `{"text": ...}`, with `chunks`, a list of `{"timestamp": (start, end) in seconds, "text": ...}`, if
            `chunk_length_s` is given; a list of these for a list, an iterator for a generator or data set.

        Raises:
            AudioError: if an audio cannot be used.
            ValueError: if audio and prompt exceed the LLM's context.
        """
        _, forward, rest = self._sanitize_parameters(**options)
        rest = {**self._postprocess_params, **rest}
        forward = {**self._forward_params, **forward}
        batch_size = rest.pop("batch_size", None) or self._batch_size or 1
        progress = rest.pop("progress", False)
        if not _is_several(inputs):
            return next(self._answers([inputs], batch_size, progress, forward, **rest))
        answers = self._answers(inputs, batch_size, progress, forward, **rest)
        return list(answers) if isinstance(inputs, list | tuple) else answers

    def load(
        self, audio: AudioSource, sampling_rate: int | None = None, max_audio_s: float | None = None
    ) -> np.ndarray:
        """One audio -> (samples,) float32 at 16 kHz, checked, at least as long as the encoder needs. See `load_audio`."""
        return load_audio(audio, sampling_rate, shortest=self.processor.shortest, max_seconds=max_audio_s)

    def prepare(self, item, prompt=PROMPT, sampling_rate=None, chunk_length_s=None, max_audio_s=None) -> dict[str, Any]:
        """One of the inputs of `__call__`, with its options -> its `samples` as of `load`, its `prompt`, and its
        `chunks`, a list of `{"span": (first sample, end), "tokens": with the prompt}`.

        Raises:
            AudioError: if the audio cannot be used.
            ValueError: if a chunk and the prompt exceed the LLM's context.
        """
        if isinstance(item, dict):
            item = dict(item)
            prompt = item.pop("prompt", None) or prompt
            sampling_rate = item.get("sampling_rate", sampling_rate)
            item = item.get("audio", item)
        samples = self.load(item, sampling_rate, max_audio_s)
        spans = cut_at_pauses(samples, chunk_length_s) if chunk_length_s else [(0, len(samples))]
        text = self.processor.apply_chat_template([_chat(samples, prompt)], add_generation_prompt=True)[0]
        context, chunks = self.model.config.context, []
        for start, end in spans:
            tokens = self.processor.count_tokens(text, [end - start])
            chunks.append({"span": (start, end), "tokens": tokens})
            if tokens >= context:
                raise ValueError(
                    f"Audio of {(end - start) / SAMPLING_RATE:.0f} seconds and its prompt take {tokens:,} tokens, and the "
                    f"LLM has a context of {context:,}. Use `chunk_length_s`, e.g. 30, or cut the audio."
                )
        return {"samples": samples, "prompt": prompt, "chunks": chunks}

    def _answers(self, inputs, batch_size, progress, forward, **options) -> Iterator[dict[str, Any]]:
        """The answers in the inputs' order, each as soon as all of its chunks have been answered."""
        audios: list[dict] = []  # not answered in full yet, first come first served
        waiting: list[tuple[dict, dict]] = []  # (audio, chunk)
        with _Progress(progress) as done:
            source, more = iter(inputs), True
            while more or audios:
                while more and len(waiting) < batch_size:
                    try:
                        item = next(source)
                    except StopIteration:
                        more = False
                        break
                    audio = self.prepare(item, **options)
                    done.expect(len(audio["samples"]) / SAMPLING_RATE)
                    audios.append(audio)
                    for chunk in audio["chunks"]:
                        if is_silent(audio["samples"][slice(*chunk["span"])]):  # of which a model makes something up
                            chunk["text"] = ""
                            done.add((chunk["span"][1] - chunk["span"][0]) / SAMPLING_RATE)
                        else:
                            waiting.append((audio, chunk))
                together = self._together([chunk["tokens"] for _, chunk in waiting[:batch_size]], forward)
                batch, waiting = waiting[:together], waiting[together:]
                pieces = [(audio["samples"][slice(*chunk["span"])], audio["prompt"]) for audio, chunk in batch]
                texts = self.postprocess(self.forward(self.preprocess(pieces), **forward)) if pieces else []
                for (_, chunk), text in zip(batch, texts, strict=True):
                    chunk["text"] = text
                    done.add((chunk["span"][1] - chunk["span"][0]) / SAMPLING_RATE)
                while audios and all("text" in chunk for chunk in audios[0]["chunks"]):
                    yield self._joined(audios.pop(0), options.get("chunk_length_s"))

    def _together(self, tokens: list[int], forward: dict[str, Any]) -> int:
        """How many of the first prompts, of so many tokens each, are answered at once: those that leave room for the longest
        answer; else one alone, whose answer is as long as there is room."""
        room = self.model.config.context - (self._longest_answer(forward) or 0)
        fitting = itertools.takewhile(lambda count: count <= room, tokens)
        return max(min(len(tokens), 1), sum(1 for _ in fitting))

    def _longest_answer(self, generate_kwargs: dict[str, Any]) -> int | None:
        """In tokens; `None`: `generate` is told in another way."""
        if {"generation_config", "max_length"} & generate_kwargs.keys():
            return None
        return generate_kwargs.get("max_new_tokens") or self.model.generation_config.max_new_tokens or 256

    def _joined(self, audio: dict, chunk_length_s: float | None) -> dict[str, Any]:
        answer = {"text": " ".join(chunk["text"] for chunk in audio["chunks"] if chunk["text"])}
        if chunk_length_s:
            answer["chunks"] = [
                {"timestamp": tuple(i / SAMPLING_RATE for i in chunk["span"]), "text": chunk["text"]}
                for chunk in audio["chunks"]
            ]
        return answer

    # ---- what `Pipeline` asks for ------------------------------------------------------------------------------------

    def _sanitize_parameters(self, generate_kwargs: dict[str, Any] | None = None, **options: Any):
        names = ("prompt", "sampling_rate", "chunk_length_s", "max_audio_s", "batch_size", "progress")
        own = {name: options.pop(name) for name in names if options.get(name) is not None}
        options = {name: value for name, value in options.items() if name not in names and name != "num_workers"}
        return {}, {**(generate_kwargs or {}), **options}, own

    def preprocess(self, pieces: list[tuple[np.ndarray, str]]) -> dict[str, Any]:
        """[(samples at 16 kHz, prompt)] -> model inputs."""
        inputs = self.processor.apply_chat_template(
            [_chat(samples, prompt) for samples, prompt in pieces],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return dict(inputs)

    def _forward(self, inputs: dict[str, Any], **generate_kwargs: Any) -> torch.Tensor:
        length = inputs["input_ids"].shape[1]
        if (generate_kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError("The pipeline gives one answer to each audio. Leave out `num_return_sequences`.")
        if (wanted := self._longest_answer(generate_kwargs)) is not None:
            generate_kwargs["max_new_tokens"] = max(1, min(wanted, self.model.config.context - length))
        return self.model.generate(**inputs, **generate_kwargs)[:, length:]

    def postprocess(self, output: torch.Tensor) -> list[str]:
        return [text.strip() for text in self.processor.tokenizer.batch_decode(output, skip_special_tokens=True)]

    def save_pretrained(self, save_directory, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)  # which `Pipeline` leaves out


class _Progress:
    """Seconds of audio answered, to a progress bar or a function."""

    def __init__(self, progress: bool | Callable[[float, float], None]):
        self.report = progress if callable(progress) else None
        self.bar = logging.tqdm(total=0, unit="s", unit_scale=True) if progress is True else None
        self.done = self.known = 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def expect(self, seconds: float) -> None:
        self.known += seconds
        if self.bar is not None:
            self.bar.total = self.known

    def add(self, seconds: float) -> None:
        self.done += seconds
        if self.bar is not None:
            self.bar.update(seconds)
        if self.report is not None:
            self.report(self.done, self.known)


def _chat(samples: np.ndarray, prompt: str) -> list[dict[str, Any]]:
    audio = {"type": "audio", "audio": {"array": samples, "checked": True}}
    return [{"role": "user", "content": [audio, {"type": "text", "text": prompt}]}]


def _is_several(inputs: Any) -> bool:
    if isinstance(inputs, list | tuple):
        return not (inputs and isinstance(inputs[0], int | float))  # numbers are the samples of one audio
    single = (str, bytes, bytearray, memoryview, dict, np.ndarray, torch.Tensor)
    if isinstance(inputs, single) or hasattr(inputs, "get_all_samples"):  # a decoder of `datasets`
        return False
    return isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")


__all__ = ["SpeechLLMPipeline"]
