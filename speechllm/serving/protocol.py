"""OpenAI's API in the parts that a speech LLM can honour: what requests may hold, and the shapes of answers.

A parameter that would change the answer and is not supported is refused, not ignored.
"""

import base64
import binascii
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .batching import Sampling


AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")
MAX_AUDIOS = 16  # of a chat
LONGEST_PROMPT = 10_000  # characters of a transcription's instruction
HARMLESS = {"metadata", "prediction", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
ONLY_AT = {  # parameters of chats that are accepted at the value that changes nothing
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
KNOWN = {
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
}
ROLES = {"assistant": "assistant", "developer": "system", "system": "system", "user": "user"}
LISTS = ("timestamp_granularities[]", "timestamp_granularities")  # fields of a form that may come several times
LOWEST_TEMPERATURE = LOWEST_TOP_P = 1e-3  # below the first, answers are greedy: it would divide by almost nothing
TRANSCRIPTION_FORMATS = ("json", "text", "verbose_json")
ERROR_TYPES = {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused, or failed: becomes OpenAI's error object with an HTTP status."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass
class ChatRequest:
    """A checked request for a chat completion; audio parts of `messages` hold the bytes of files."""

    model: str
    messages: list[dict[str, Any]]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


@dataclass
class TranscriptionRequest:
    """A checked request for a transcription."""

    model: str
    file: bytes
    prompt: str | None
    language: str | None
    sampling: Sampling
    response_format: str


# ---- requests --------------------------------------------------------------------------------------------------------


def parse_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON.") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return values


def parse_chat(values: dict[str, Any]) -> ChatRequest:
    """The body of `/v1/chat/completions` -> a checked request.

    Raises:
        ApiError: 400, or 415 for an audio format that cannot be decoded.
    """
    for name, value in values.items():
        if name in ONLY_AT and value not in ONLY_AT[name]:
            raise ApiError(400, f"`{name}` = {_shown(value)} is not supported by this server.", name)
        if name not in KNOWN and name not in ONLY_AT and name not in HARMLESS:
            raise ApiError(400, f"Unrecognized request argument: {_shown(name)}.", _shown(name))
    longest = values.get("max_completion_tokens")
    longest = values.get("max_tokens") if longest is None else longest
    stop = values.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stop):
        raise ApiError(400, "`stop` must be up to four texts of 1 to 100 characters.", "stop")
    stream = _boolean(values, "stream")
    options = values.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise ApiError(400, "`stream_options` is an object, and only for `stream: true`.", "stream_options")
    return ChatRequest(
        model=_text(values, "model"),
        messages=_messages(values.get("messages")),
        sampling=_sampling(values),
        max_tokens=None if longest is None else _number(longest, "max_tokens", int, 1, 10**6),
        stop=tuple(stop),
        stream=stream,
        include_usage=_boolean(options, "include_usage"),
    )


def parse_transcription(form: dict[str, Any]) -> TranscriptionRequest:
    """The fields of `/v1/audio/transcriptions`, `file` as bytes -> a checked request.

    Raises:
        ApiError: 400.
    """
    known = {"file", "model", "prompt", "language", "temperature", "response_format", "stream", "chunking_strategy"}
    for name in form:
        if name not in known | {*LISTS}:
            raise ApiError(400, f"Unrecognized request argument: {_shown(name)}.", _shown(name))
    if not isinstance(form.get("file"), bytes):
        raise ApiError(400, "The form has no `file`: send the audio file as a part of that name.", "file")
    response_format = form.get("response_format", "json")
    if response_format not in TRANSCRIPTION_FORMATS:
        raise ApiError(400, f"`response_format` must be one of {', '.join(TRANSCRIPTION_FORMATS)}.", "response_format")
    if any(granularity != "segment" for name in LISTS for granularity in form.get(name, [])):
        raise ApiError(400, "Timestamps are for segments only, not words.", "timestamp_granularities")
    if form.get("stream", "false") not in ("false", "False", "0"):
        raise ApiError(400, "Transcriptions are not streamed; chat completions are.", "stream")
    prompt = form.get("prompt") or None
    if prompt is not None and (not isinstance(prompt, str) or len(prompt) > LONGEST_PROMPT):
        raise ApiError(400, f"`prompt` must be a text of up to {LONGEST_PROMPT:,} characters.", "prompt")
    language = form.get("language") or None
    if language is not None and (not isinstance(language, str) or len(language) > 40):
        raise ApiError(400, "`language` must be a language's code or name.", "language")
    return TranscriptionRequest(
        _text(form, "model"),
        form["file"],
        prompt,
        language,
        _sampling({"temperature": form.get("temperature")}),
        response_format,
    )


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "`messages` must be a list with at least one message.", "messages")
    audios, checked = 0, []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, f"Message {i} needs a `role` out of {', '.join(ROLES)}.", f"messages[{i}].role")
        content = message.get("content")
        if isinstance(content, list):
            content = [_part(part, f"messages[{i}].content[{k}]") for k, part in enumerate(content)]
            audios += sum(part["type"] == "audio" for part in content)
        elif isinstance(content, str):
            _check_unicode(content, f"messages[{i}].content")
        else:
            raise ApiError(400, f"Message {i} needs a `content`: a text or a list of parts.", f"messages[{i}].content")
        checked.append({"role": ROLES[role], "content": content})
    if audios > MAX_AUDIOS:
        raise ApiError(400, f"The chat has {audios} audios; up to {MAX_AUDIOS} are possible.", "messages")
    return checked


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _check_unicode(part["text"], where)
        return {"type": "text", "text": part["text"]}
    if kind != "input_audio":
        raise ApiError(400, f"{where} must be a part of type `text` or `input_audio`, not {_shown(kind)}.", where)
    audio = part.get("input_audio")
    data = audio.get("data") if isinstance(audio, dict) else None
    if not isinstance(data, str):
        raise ApiError(400, f'{where} needs "input_audio": {{"data": base64, "format": "wav"}}.', where)
    if audio.get("format") not in AUDIO_FORMATS:
        raise ApiError(
            415, f"{where} has the format {_shown(audio.get('format'))}; use {', '.join(AUDIO_FORMATS)}.", where
        )
    try:
        return {"type": "audio", "audio": base64.b64decode(data, validate=True)}
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{where} is not valid base64. Encode the bytes of the audio file.", where) from None


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise ApiError(400, f"{where} must be valid Unicode.", where) from None


def _sampling(values: dict[str, Any]) -> Sampling:
    seed = values.get("seed")
    temperature = _number(values.get("temperature") or 0, "temperature", float, 0, 2)
    if temperature < LOWEST_TEMPERATURE:
        return Sampling()  # greedy answers have no use for the rest
    top_p = values.get("top_p")
    return Sampling(
        temperature=temperature,
        top_p=1.0 if top_p is None else max(LOWEST_TOP_P, _number(top_p, "top_p", float, 0, 1)),
        seed=None if seed is None else _number(seed, "seed", int, -(2**63), 2**63 - 1),
    )


def _number(value: Any, name: str, kind: type, low: float, high: float):
    try:
        if isinstance(value, bool) or (kind is int and not isinstance(value, int)):
            raise ValueError
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high:
        kinds = {int: "a whole number", float: "a number"}
        raise ApiError(400, f"`{name}` is {_shown(value)}; it must be {kinds[kind]} from {low} to {high}.", name)
    return number


def _boolean(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value not in (None, True, False):
        raise ApiError(400, f"`{name}` must be true or false.", name)
    return bool(value)


def _text(values: dict[str, Any], name: str) -> str:
    if not isinstance(values.get(name), str) or not values[name]:
        raise ApiError(400, f"You must provide `{name}`.", name)
    return values[name]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- answers ---------------------------------------------------------------------------------------------------------


class ChatAnswer:
    """The objects that answer one chat request, whole or in chunks."""

    def __init__(self, model: str, prompt_tokens: int):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.prompt_tokens = prompt_tokens

    def usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def whole(self, text: str, finish_reason: str, tokens: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage(tokens)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, tokens: int) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage(tokens)}
