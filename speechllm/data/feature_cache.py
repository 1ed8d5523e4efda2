"""Frozen means cacheable: what a frozen model makes of an item is computed once and kept on disk.

A cache is a folder whose name is a hash of everything that its contents depend on (weights, layer, dtype, ...). In it
each item has one safetensors file, named by a hash of its content and read memory-mapped. Files appear by an atomic
rename, so any number of processes may write the same cache at once. A file that cannot be read is removed, counted and
computed anew.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..audio_speechllm import AudioError, AudioSource, read_bytes, read_segment


logger = logging.getLogger(__name__)


class FeatureCache:
    """Tensors on disk, by item.

    Args:
        folder: parent of all caches.
        depends_on: everything that the tensors depend on besides the item itself; must be JSON-serialisable.

    Raises:
        OSError: if the folder cannot be written, naming it.
    """

    def __init__(self, folder: str | os.PathLike, depends_on: dict[str, Any]):
        text = json.dumps(depends_on, sort_keys=True, indent=2)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.corrupt = 0  # files found damaged, and removed
        self._write_atomically(self.folder / "depends_on.json", lambda path: path.write_text(text + "\n"))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Whether the item is there and its file is whole (its header is read, and its size compared)."""
        return self._read(key, lambda file: True) or False

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of an item, or `None` if they are not there (or were damaged)."""
        return self._read(key, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def _read(self, key: str, what: Callable[[Any], Any]) -> Any:
        """What is read from the item's open file; `None` if there is none, or a damaged one, which is removed."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                return what(file)
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            self.corrupt += 1
            logger.warning("Cache file %s is damaged (%s). It is removed and computed again.", path, error)
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the tensors of an item.

        Raises:
            OSError: if they cannot be written, naming the folder.
        """
        path = self._path(key)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write_atomically(path, lambda temporary: save_file(tensors, temporary))

    def _write_atomically(self, path: Path, write) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)
            raise OSError(f"Cannot write to the feature cache {self.folder}: {error}. Free some space there, or choose "
                          "another folder (`feature_cache`) or none.") from error  # fmt: skip


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's class, parameter names, shapes, dtypes and values."""
    digest = hashlib.blake2b(type(module).__name__.encode(), digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def audio_key(audio: AudioSource, sampling_rate: int | None = None) -> str:
    """Hash of an audio's content (of the file's bytes where it is a path, so that renaming keeps the cache).

    Raises:
        AudioError: if there is no audio, or the file cannot be read.
    """
    if isinstance(audio, dict):
        if audio.get("array") is not None:
            return audio_key(audio["array"], audio.get("sampling_rate", sampling_rate))
        if audio.get("parts"):
            return text_key(" ".join(audio_key(part, sampling_rate) for part in audio["parts"]))
        if audio.get("offset") is not None or audio.get("duration") is not None:
            return audio_key(*read_segment(audio))  # its samples: hashing the whole recording would cost more
        if audio.get("byte_length"):
            return audio_key(read_bytes(audio))
        inner = audio.get("bytes") or audio.get("path")
        if not inner:
            raise AudioError("The audio is a dict without `array`, `bytes` or `path`. Give one of them.")
        return audio_key(inner, sampling_rate)
    if isinstance(audio, str | os.PathLike):
        try:
            return hashlib.sha256(Path(audio).read_bytes()).hexdigest()
        except OSError as error:
            raise AudioError(f"{audio} cannot be read: {error.strerror}. Check the path.") from None
    if isinstance(audio, bytes | bytearray | memoryview):
        return hashlib.sha256(audio).hexdigest()
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        audio = audio.float().numpy() if audio.dtype in (torch.bfloat16, torch.float16) else audio.numpy()
    samples = np.ascontiguousarray(audio)
    described = f"{samples.shape} {samples.dtype} {sampling_rate} ".encode()
    return hashlib.sha256(described + samples.tobytes()).hexdigest()
