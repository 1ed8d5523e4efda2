"""Text files of corpora: lines and tables that stay in step even where a line is broken."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from ..schema import ManifestError, SetAside, not_utf8


Line = str | SetAside
MALFORMED = (KeyError, TypeError, ValueError, AttributeError)  # what reading a row raises that lacks something


def malformed(name: str, path: Path, error: Exception) -> SetAside:
    """What to set aside for the row `name` of the file `path`, which could not be read for one of `MALFORMED`."""
    cause = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
    return SetAside(name, f"{path}: {name} is malformed ({cause}). Correct it or download it again.", "malformed row")


def line_not_utf8(name: str, path: Path) -> SetAside:
    """What to set aside for the row `name`, whose line in the file `path` is not UTF-8."""
    return SetAside(name, f"{path}: the line of {name} is not UTF-8. Save it as such.", "text that is not UTF-8")


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


def text_lines(path: Path, escaped: bool = False) -> list[Line]:
    """The lines of a UTF-8 file. One that is not UTF-8 becomes a `SetAside`, so that the others keep their numbers.

    Only the line feed ends a line: transcripts hold other characters that `str.splitlines` would split at.

    Args:
        escaped: give a line that is not UTF-8 with lone surrogates (`schema.not_utf8`), for who needs the name in it.

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
            lines.append(line.decode("utf-8", "surrogateescape" if escaped else "strict").removesuffix("\r"))
        except UnicodeDecodeError as error:
            reason = f"{path}, line {number} is not UTF-8 ({error.reason} at byte {error.start}). Save it as such."
            lines.append(SetAside(f"{path.name}, line {number}", reason, "text that is not UTF-8"))
    return lines


def table(
    path: Path, header: tuple[str, ...] | None = None, needed: tuple[str, ...] = (), escaped: bool = False
) -> Iterator[dict[str, str] | SetAside]:
    """The rows of a tab-separated file, where a quotation mark is a quotation mark.

    Args:
        header: names of the columns; `None`: the first line has them. Fields beyond them are passed over.
        needed: columns that the first line must name.
        escaped: see `text_lines`.

    Raises:
        ManifestError: if the file cannot be read, its first line names no columns, or not a needed one.
    """
    lines = text_lines(path, escaped)
    if header is None:
        first = lines[0] if lines else ""
        if isinstance(first, SetAside) or not first or not_utf8(first):
            raise ManifestError(f"{path} has no first line that names its columns. Download it again.")
        header, lines = tuple(first.split("\t")), lines[1:]
        if missing := [name for name in needed if name not in header]:
            there = ", ".join(header)
            raise ManifestError(f"{path} has no column {missing[0]!r}, but {there}. Download it again.")
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
