"""Chats with audio for LLMs that know text only.

The chat template is the LLM's own behind a few lines that flatten the parts of a message into a string, an audio part
into the placeholder. `check_chat` explains what is wrong with a chat before a template, or silence, does.
"""

from typing import Any

import numpy as np
import torch

from .audio_speechllm import AudioError, AudioSource


# Turns a list of parts into a string, as text-only templates expect; audio becomes the placeholder.
AUDIO_PARTS_TEMPLATE = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.content is string or message.content is not defined or message.content is none -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set parts = namespace(text="") -%}
        {%- for part in message.content -%}
            {%- if part.type in ["audio", "audio_url", "input_audio"] -%}
                {%- set parts.text = parts.text + "<|audio|>" -%}
            {%- elif part.type == "text" -%}
                {%- set parts.text = parts.text + part.text -%}
            {%- else -%}
                {{- raise_exception("This model takes parts of type 'text' and 'audio', not '" ~ part.type ~ "'.") -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=parts.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
# For LLMs without a chat template of their own.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
    {{- message.role | capitalize + ": " + message.content + "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- "Assistant: " -}}{% endif -%}
"""


def check_chat(chat: list[dict[str, Any]]) -> None:
    """Raise a `ValueError` that names the message if a chat is not made of roles, texts and audios."""
    if not chat:
        raise ValueError('The chat is empty. Give it a message: {"role": "user", "content": [...]}.')
    for turn, message in enumerate(chat):
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f'Message {turn} of the chat is not a dict with a "role". Give "role" and "content".')
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in ("text", "audio") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(
                    f"Message {turn} of the chat has a part of type {kind!r} that cannot be used. Give parts of the "
                    'form {"type": "text", "text": ...} or {"type": "audio", "audio": ...}.'
                )


def chat_audios(chat: list[dict[str, Any]], sampling_rate: int | None) -> list[AudioSource]:
    """The audios of a chat in order, each with its sampling rate where it is an array."""
    check_chat(chat)
    audios = []
    for turn, message in enumerate(chat):
        if not isinstance(message.get("content"), list):
            continue
        for part in message["content"]:
            if part.get("type") != "audio":
                continue
            audio = next((part[key] for key in ("audio", "path", "url") if part.get(key) is not None), None)
            if audio is None:
                raise AudioError(
                    f"Message {turn} of the chat has an audio part without audio. Give it a path, bytes, an array or a "
                    'tensor: {"type": "audio", "audio": ...}.'
                )
            if (rate := part.get("sampling_rate", sampling_rate)) is not None:
                if isinstance(audio, np.ndarray | torch.Tensor | list | tuple):
                    audio = {"array": audio, "sampling_rate": rate}
                elif isinstance(audio, dict) and audio.get("array") is not None:
                    audio = {"sampling_rate": rate, **audio}
            audios.append(audio)
    return audios
