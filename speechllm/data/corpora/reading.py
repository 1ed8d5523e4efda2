"""Text files of corpora: lines and tables that stay in step even where a line is broken."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from ..schema import ManifestError, SetAside


Line = str | SetAside


def need_folder(path: Path, what: str) -> Path:
    """`path` if it is a folder.

    Raises:
        ManifestError: if not, saying `what` should be there.
    """
    if not path.is_dir():
        raise ManifestError(f"{path}: there is no such folder; {what} should be there. Check the path and the options.")
    return path


def choice(value: str, name: str, known: list[str]) -> str:
    """`value` if it is known.

    Raises:
        ManifestError: if not, naming what there is.
    """
    if value not in known:
        there = ", ".join(sorted(known)) if known else "nothing of the kind"
        raise ManifestError(f"{name} {value!r} is not there. Choose from: {there}.")
    return value


def text_lines(path: Path) -> list[Line]:
    """The lines of a UTF-8 file. One that is not UTF-8 becomes a `SetAside`, so that the others keep their numbers.

    Only the line feed ends a line: transcripts hold other characters that `str.splitlines` would split at.

    Raises:
        ManifestError: if the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. The corpus needs it.") from None
    lines: list[Line] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n"), 1):
        try:
            lines.append(line.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            reason = f"{path}, line {number} is not UTF-8 ({error.reason} at byte {error.start}). Save it as such."
            lines.append(SetAside(f"{path.name}, line {number}", reason, "text that is not UTF-8"))
    return lines


def table(path: Path, header: tuple[str, ...] | None = None) -> Iterator[dict[str, str] | SetAside]:
    """The rows of a tab-separated file, where a quotation mark is a quotation mark.

    Args:
        header: names of the columns; `None`: the first line has them. Fields beyond them are passed over.
    """
    lines = text_lines(path)
    if header is None:
        first = lines[0] if lines else ""
        if isinstance(first, SetAside) or not first:
            raise ManifestError(f"{path} has no first line that names its columns. Download it again.")
        header, lines = tuple(first.split("\t")), lines[1:]
    for number, line in enumerate(lines, 1):
        if isinstance(line, SetAside):
            yield line
        elif line:
            fields = line.split("\t")
            if len(fields) < len(header):
                reason = f"{path}, row {number} has {len(fields)} fields, but {len(header)} are needed. Correct it."
                yield SetAside(f"{path.name}, row {number}", reason, "malformed row")
            else:
                yield dict(zip(header, fields))


def comma_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a comma-separated UTF-8 file with a first line that names the columns."""
    try:
        yield from csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read as CSV: {error}. Save it as UTF-8 CSV.") from None


def several(text: str) -> list[str]:
    """An option with several values, "de,fr" -> ["de", "fr"]."""
    return [part.strip() for part in text.split(",") if part.strip()]
