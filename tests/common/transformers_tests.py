"""The tests that Transformers ships in its source distribution, at the version that is installed.

They are not in the wheel and not in this repository: pip downloads the source distribution once, and the modules of its
`tests` folder are kept under `~/.cache/speechllm` (or `$SPEECHLLM_CACHE`). They are imported under a package name of their
own, with stand-ins for the helpers that the source distribution leaves out.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import transformers


PACKAGE = "transformers_sdist"


class TestsNotAvailable(Exception):
    """The source distribution cannot be had, e.g. for want of a network."""


def cache_folder() -> Path:
    return Path(os.environ.get("SPEECHLLM_CACHE") or Path.home() / ".cache" / "speechllm")


def tests_folder() -> Path:
    """The folder with Transformers' tests; downloaded if it is not there yet.

    Raises:
        TestsNotAvailable: with the reason.
    """
    name = f"transformers-{transformers.__version__}"
    folder = cache_folder() / f"{name}-tests"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder.parent) as temporary:
        command = ["download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", temporary]
        try:
            subprocess.run(
                [sys.executable, "-m", "pip", *command, f"transformers=={transformers.__version__}"],
                check=True, capture_output=True, text=True, timeout=240,
            )  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise TestsNotAvailable(f"the source distribution of {name} cannot be downloaded: {reason}") from error
        (archive,) = Path(temporary).glob("*.tar.gz")
        unpacked = Path(temporary) / "tests"
        unpacked.mkdir()
        with tarfile.open(archive) as file:
            for member in file.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and member.name.endswith(".py"):
                    (unpacked / parts[2]).write_bytes(file.extractfile(member).read())
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def load(name: str) -> types.ModuleType:
    """Import one module of Transformers' `tests` folder.

    Raises:
        TestsNotAvailable: with the reason.
    """
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(tests_folder())]
        sys.modules[PACKAGE] = package
        # Not in the source distribution: mixins of further tests, and a table of downloaded files.
        _stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ImportError as error:
        raise TestsNotAvailable(f"{name} of transformers {transformers.__version__} needs {error}") from error


def skip(cls: type, skipped: dict[str, str]) -> type:
    """Skip the tests of a class that are named in `skipped`, alone or as `Class.test`, with their reasons."""
    for name, reason in skipped.items():
        owner, _, test = name.rpartition(".")
        if owner in ("", cls.__name__) and hasattr(cls, test):  # not every version of Transformers has every test
            setattr(cls, test, unittest.skip(reason)(getattr(cls, test)))
    return cls


def _stand_in(name: str, **contents) -> None:
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        sys.modules[parent] = types.ModuleType(parent)
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)
