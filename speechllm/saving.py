"""What to say when a file cannot be written: where it was to go, why it could not, and what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .checkpoint_speechllm import CheckpointError


# Who does not raise an `OSError`: safetensors and tokenizers (Rust), and the file of torch's C++ that writes archives.
WORDS_OF_WRITERS = ("os error", "inline_container.cc")


@contextmanager
def explained_saving(folder: str | os.PathLike) -> Iterator[None]:
    """Where the block cannot write its files, name `folder` and the remedy; all other errors pass as they are.

    Raises:
        CheckpointError: if the disk is full, or the folder may not be written.
    """
    try:
        yield
    except Exception as error:
        if not _cannot_write(error):
            raise
        written = f"a file could not be written whole ({str(error).splitlines()[0]})"
        reason = os.strerror(error.errno) if isinstance(error, OSError) else written
        raise CheckpointError(
            f"Cannot save to {folder}: {reason}. Free some space or choose another folder."
        ) from error


def _cannot_write(error: Exception) -> bool:
    if isinstance(error, OSError):
        # Those of the network, and those that explain themselves, are of classes of their own.
        return type(error) in (OSError, PermissionError) and error.errno is not None
    return any(word in str(error) for word in WORDS_OF_WRITERS)
