"""What the HTML reports share: one style, strict JSON, audio inside the page, the words of a hypothesis against a reference.

A page is one file that loads nothing: no scripts, fonts, images or styles from elsewhere, and its template carries a
content security policy that would forbid it. Everything from outside is escaped.
"""

from __future__ import annotations

import base64
import difflib
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from ..saving import explained_saving
from . import plots


def render(template: Path, filters: Mapping[str, Any] | None = None, **values: Any) -> str:
    """A Jinja template as a page; it has `style` for its `<style>`, and may import this folder's `words.html.jinja`."""
    here = Path(__file__).parent
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FileSystemLoader([template.parent, here])
    )
    environment.filters |= filters or {}
    colours = {name: plots.colour_variables(dark=name == "dark") for name in ("light", "dark")}
    style = (here / "page.css").read_text(encoding="utf-8")
    for name, variables in colours.items():
        style = style.replace(f"{{{{ {name} }}}}", variables)
    page = environment.get_template(template.name).render(style=Markup(style), **values).lstrip()
    return page.encode("utf-8", "replace").decode()  # names of files may hold what is not UTF-8


def inline_plot(figure: Figure, name: str, alternative: str, folder: Path | None = None) -> Markup:
    """A figure as an `<svg>` element (see `plots.inline_svg`); in `folder`, where given, also as SVG and PNG files."""
    document = plots.svg_document(figure)
    if folder is not None:
        figure.set_layout_engine("none")  # laid out already
        write_whole(folder / f"{name}.svg", document)
        write_whole(folder / f"{name}.png", plots.png_bytes(figure))
    return Markup(plots.inline_svg(document, name, alternative))


def strict_json(value: Any, place: str = "report") -> Any:
    """A copy in plain JSON types: NaN and infinities as `None`, keys and paths as text, arrays and tensors as lists.

    Characters that neither JSON readers nor web pages accept (lone surrogates, control characters) become "\\ufffd".

    Raises:
        TypeError: a value has no JSON form; the message names its place.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return "".join(character if _is_printable(character) else "\ufffd" for character in text)
    if isinstance(value, Mapping):
        return {strict_json(str(key)): strict_json(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item, f"{place}[{number}]") for number, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, torch tensors
        return strict_json(value.tolist(), place)
    raise TypeError(f"{place} is a {type(value).__name__}, which JSON cannot hold; turn it into text or numbers first.")


def audio_address(path: Path) -> str:
    """A mono, compressed copy of an audio file as a `data:` address for `<audio>`.

    Raises:
        OSError: the file is missing or cannot be opened.
        soundfile.SoundFileError: it is not audio.
    """
    with path.open("rb") as file:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return samples_address(samples.mean(axis=1), rate)


def samples_address(samples: np.ndarray, rate: int) -> str:
    """Samples (time,) at `rate` Hz, compressed, as a `data:` address for `<audio>`."""
    kinds = [("MP3", "audio/mpeg")] if "MP3" in soundfile.available_formats() else []
    for kind, mime in [*kinds, ("FLAC", "audio/flac")]:
        target = io.BytesIO()
        try:
            soundfile.write(target, samples, rate, format=kind)
        except soundfile.SoundFileError:
            if kind == "FLAC":  # MP3 knows few sampling rates, FLAC all
                raise
            continue
        return f"data:{mime};base64,{base64.b64encode(target.getvalue()).decode()}"
    raise AssertionError("unreachable: FLAC either returns or raises")


def word_diff(reference: str, hypothesis: str) -> list[dict[str, str]]:
    """The hypothesis as runs of words: `same`, `wrong` (with what was `said`), `extra`, `missing` (only `said`).

    Words are compared without case and punctuation and shown as written.
    """
    sides = [[(key, word) for word in text.split() if (key := _key(word))] for text in (reference, hypothesis)]
    said, heard = ([word for _, word in side] for side in sides)
    matcher = difflib.SequenceMatcher(None, *([key for key, _ in side] for side in sides), autojunk=False)
    kinds = {"equal": "same", "replace": "wrong", "insert": "extra", "delete": "missing"}
    return [
        {"kind": kinds[tag], "said": " ".join(said[a:b]), "heard": " ".join(heard[c:d])}
        for tag, a, b, c, d in matcher.get_opcodes()
    ]


def _key(word: str) -> str:
    """What counts of a word when two are compared: letters and digits in lower case."""
    return "".join(character for character in word.casefold() if character.isalnum())


def _is_printable(character: str) -> bool:
    """Whether JSON, HTML and XML all accept the character."""
    code = ord(character)
    if code < 0x20:
        return character in "\t\n\r"
    return not (0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under its name (creating the folder) only when it is complete.

    Raises:
        OSError: if it cannot be written, naming the folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with explained_saving(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
