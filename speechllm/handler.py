"""`EndpointHandler`, which Hugging Face's Inference Endpoints start from the `handler.py` of a model repository.

A request is the raw body of an audio file (parameters in the query), or JSON:

    {"inputs": ITEM or [ITEM, ...], "parameters": {"prompt": "...", "max_new_tokens": 128, ...}}

where an ITEM is an audio file in base64, or {"audio": base64, "prompt": "..."}. The answer is `{"text": ...}`, or a list.

1. The server that runs handlers answers status 400 and the message whenever one raises, so a bad request raises a
   `RequestError`. In a list, a bad item becomes `{"error": message, "status": 400 or 413}` in its place, and the others
   are answered.
2. A string is always audio in base64: never a path that would be opened, nor an address that would be fetched.
3. Size, duration, number and answer length are bounded, by environment variables of the endpoint: `MAX_AUDIO_MB` (25),
   `MAX_AUDIO_SECONDS` (600), `MAX_ITEMS` (32), `MAX_NEW_TOKENS` (1024), `BATCH_SIZE` (8).
"""

import base64
import binascii
import os
from typing import Any

import torch
from transformers import pipeline


PARAMETERS = {  # of a request: type, smallest, largest value
    "max_new_tokens": (int, 1, None),  # the largest is a setting
    "do_sample": (bool, False, True),
    "temperature": (float, 0.01, 5.0),
    "top_p": (float, 0.01, 1.0),
    "top_k": (int, 1, 1000),
    "num_beams": (int, 1, 8),
    "repetition_penalty": (float, 0.5, 5.0),
    "no_repeat_ngram_size": (int, 0, 100),
    "chunk_length_s": (float, 1.0, 3600.0),
}
LONGEST_PROMPT = 10_000  # characters


class RequestError(ValueError):
    """A request that cannot be answered; `status` is the HTTP status it deserves."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class EndpointHandler:
    """Loads the checkpoint in `path` once; called with the body of each request."""

    def __init__(self, path: str = ""):
        self.pipe = pipeline(
            "audio-text-to-text",
            model=str(path or "."),
            trust_remote_code=True,
            device=0 if torch.cuda.is_available() else "cpu",
        )
        self.max_bytes = int(_setting("MAX_AUDIO_MB", 25) * 1e6)
        self.max_seconds = _setting("MAX_AUDIO_SECONDS", 600)
        self.max_items = int(_setting("MAX_ITEMS", 32))
        self.max_new_tokens = int(_setting("MAX_NEW_TOKENS", 1024))
        self.batch_size = int(_setting("BATCH_SIZE", 8))

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer a request.

        Raises:
            RequestError: if the request is malformed, or its one item cannot be used. Whatever else is raised is no
                fault of the request.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise RequestError('The request has no `inputs`. Send {"inputs": audio in base64} or the bytes of a file.')
        options, prompt = self._options(data.get("parameters"))
        inputs = data["inputs"]
        if not isinstance(inputs, list):
            return self.pipe(self._item(inputs, prompt, options), batch_size=self.batch_size, **options)
        if not 1 <= len(inputs) <= self.max_items:
            raise RequestError(f"`inputs` has {len(inputs)} items; 1 to {self.max_items} are possible at once.")
        items = [self._item_or_error(item, prompt, options) for item in inputs]
        good = [item for item in items if "error" not in item]
        answers = iter(self.pipe(good, batch_size=self.batch_size, **options))
        return [item if "error" in item else next(answers) for item in items]

    def _item_or_error(self, item: Any, prompt: str | None, options: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._item(item, prompt, options)
        except RequestError as error:
            return {"error": str(error), "status": error.status}

    def _item(self, item: Any, prompt: str | None, options: dict[str, Any]) -> dict[str, Any]:
        """One item of a request -> decoded audio and prompt, as the pipeline takes them."""
        if isinstance(item, dict):
            if unknown := item.keys() - {"audio", "prompt"}:
                raise RequestError(f"An item has the key {min(map(str, unknown))!r}; `audio` and `prompt` are known.")
            prompt = _prompt(item["prompt"]) if item.get("prompt") is not None else prompt
            item = item.get("audio")
        if not isinstance(item, str | bytes | bytearray):
            raise RequestError(
                f"An audio is a {type(item).__name__}. Send a file's bytes in base64, or as the raw body of the request."
            )
        if len(item) > self.max_bytes * (4 / 3 if isinstance(item, str) else 1) + 100:
            raise RequestError(f"An audio has more than {self.max_bytes / 1e6:g} MB, the limit here.", status=413)
        if isinstance(item, str):
            head, _, rest = item.partition(",")
            try:  # base64 may come as a data URL
                item = base64.b64decode(rest if head.startswith("data:") else item, validate=True)
            except (binascii.Error, ValueError):
                raise RequestError("An audio is not valid base64. Encode the bytes of the audio file.") from None
        try:
            checked = self.pipe.prepare(
                {"bytes": bytes(item), "prompt": prompt},
                chunk_length_s=options.get("chunk_length_s"),
                max_audio_s=self.max_seconds,
            )
        except ValueError as error:
            raise RequestError(str(error), status=413 if "TooLong" in type(error).__name__ else 400) from error
        return {"array": checked["samples"], "checked": True, "prompt": prompt}

    def _options(self, parameters: Any) -> tuple[dict[str, Any], str | None]:
        """Parameters of a request -> options of the pipeline, and the prompt of items that have none of their own."""
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict):
            raise RequestError(f"`parameters` is a {type(parameters).__name__}. Send an object of names and values.")
        options = dict(parameters)
        prompt = _prompt(options.pop("prompt")) if options.get("prompt") is not None else None
        sampled = any(name in options for name in ("temperature", "top_p", "top_k"))
        checked = {"max_new_tokens": min(256, self.max_new_tokens), "do_sample": sampled}
        for name, value in options.items():
            if name not in PARAMETERS:
                raise RequestError(f"There is no parameter {name!r}. Use `prompt`, {', '.join(sorted(PARAMETERS))}.")
            kind, low, high = PARAMETERS[name]
            checked[name] = _number(name, value, kind, low, self.max_new_tokens if high is None else high)
        return checked, prompt


def _setting(name: str, default: float) -> float:
    value = os.environ.get(name, str(default))
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"The environment variable {name} is {value!r}. Set it to a number above 0.")
    return number


def _prompt(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_PROMPT:
        raise RequestError(f"A `prompt` must be a text of 1 to {LONGEST_PROMPT:,} characters.")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise RequestError("A `prompt` must be valid Unicode.") from None
    if "<|audio|>" in value:
        raise RequestError("A `prompt` must not hold the placeholder <|audio|>; the audio comes before it by itself.")
    return value


def _number(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    """A parameter's value as its type (numbers in a query string come as text), within its bounds."""
    number = None
    if kind is bool:
        number = value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = kind(value) if not (kind is int and isinstance(value, float) and value % 1) else None
        except (ValueError, OverflowError):
            number = None
    if number is None or not low <= number <= high:
        kinds = {int: "a whole number", float: "a number", bool: "true or false"}
        bounds = "" if kind is bool else f" from {low} to {high}"
        raise RequestError(f"`{name}` is {str(value)[:40]!r}; it must be {kinds[kind]}{bounds}.")
    return number


__all__ = ["EndpointHandler", "RequestError"]
