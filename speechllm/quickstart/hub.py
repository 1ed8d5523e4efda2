"""The same starting material from the Hugging Face Hub, for machines that can reach it (`--source hub`).

Two models and a little speech, each at the commit of its branch `main` or, where the Hub does not answer, at the one in
the cache; the commit is returned, so that reports and projector-only checkpoints can name it:

* `openai/whisper-tiny.en` and `HuggingFaceTB/SmolLM2-135M-Instruct`, into the Hub's own cache;
* the first minutes of `openslr/librispeech_asr` (configuration "clean", split "validation", CC-BY-4.0), streamed, so
  that only the first part of one file is downloaded, decoded by soundfile and written to this package's cache as FLAC.

LibriSpeech transcripts are upper case without punctuation; they become "Sentence case" here, since an LLM spells
upper-case words letter by letter.
"""

from __future__ import annotations

import fnmatch
import json
import logging
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import soundfile

from speechllm.downloads import DownloadError, build_once, cache_directory


logger = logging.getLogger(__name__)

SPEECH_MODEL = "openai/whisper-tiny.en"
TEXT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SPEECH_DATA = "openslr/librispeech_asr"
SPEECH_DATA_FILES = "clean/validation*.parquet"  # one of 341 MB, "clean/validation/0000.parquet"

FORMAT = 1  # raise when the written rows change, so that cached speech is built again
SAMPLING_RATE = 16_000  # Hz
_MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt"]
_REMEDY = "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), or use `--source packages`"


@dataclass(frozen=True)
class HubModel:
    """A model repository at one commit: its id, the commit (40 hexadecimal digits) and the local snapshot folder."""

    id: str
    revision: str
    folder: Path


def hub_model(repository: str, revision: str = "main") -> HubModel:
    """Download a model's configuration, safetensors and tokenizer, or find them in the Hub's cache.

    Args:
        repository: id on the Hub, "owner/name".
        revision: branch, tag or commit.

    Raises:
        DownloadError: the Hub does not answer and its cache has no copy, or the repository has no such revision.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_MODEL_FILES))
    except Exception as error:  # many unrelated classes: network, HTTP status, offline mode, missing revision
        raise _failure("model", repository, error) from error
    return HubModel(repository, revision=folder.name, folder=folder)  # the Hub's cache names the folder by the commit


def librispeech_rows(minutes: float = 30.0) -> tuple[list[dict[str, Any]], str]:
    """The first utterances of LibriSpeech's clean validation set, up to a total duration.

    Args:
        minutes: no utterance is taken that would exceed this total.

    Returns:
        Rows as `asterisk_prompts` returns them (`id`, `audio`: 16 kHz mono FLAC, `text`, `language`, `task`,
        `duration` in seconds), and the commit of the data set.

    Raises:
        DownloadError: the Hub does not answer and the cache has no copy, or an utterance is not 16 kHz mono.
    """
    folder = cache_directory() / "speech" / f"librispeech-clean-validation-{minutes:g}min"
    revision = _speech_revision(folder / "source.json")
    provenance = {"format": FORMAT, "dataset": SPEECH_DATA, "revision": revision, "minutes": minutes}
    build_once(folder, provenance, lambda partial: _write_librispeech(partial, revision, minutes))
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return [{**row, "audio": str(folder / row["audio"])} for row in rows], revision


def _speech_revision(recorded: Path) -> str:
    """The commit of the data set's branch `main`; where the Hub does not answer, the one of the cached speech."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(SPEECH_DATA).sha
    except Exception as error:  # as above
        if not recorded.exists():
            raise _failure("data set", SPEECH_DATA, error) from error
        logger.info("The Hub does not answer (%s); the cached speech of %s is used.", error, SPEECH_DATA)
        return json.loads(recorded.read_text(encoding="utf-8"))["revision"]


def _write_librispeech(folder: Path, revision: str, minutes: float) -> None:
    """Stream utterances into `folder` as FLAC with a `rows.json`.

    Not by `datasets`: its Parquet scanner reads ahead in threads, and a process that leaves the stream early may hang or
    abort when it ends (https://github.com/apache/arrow/issues/45214).
    """
    from huggingface_hub import HfApi, HfFileSystem
    from pyarrow.parquet import ParquetFile

    logger.info("Streaming %g minutes of %s ...", minutes, SPEECH_DATA)
    try:
        files = [file.rfilename for file in HfApi().dataset_info(SPEECH_DATA, revision=revision).siblings]
        if not (files := sorted(fnmatch.filter(files, SPEECH_DATA_FILES))):
            raise DownloadError(f"{SPEECH_DATA} has no {SPEECH_DATA_FILES} any more: use `--source packages`.")
        with HfFileSystem().open(f"datasets/{SPEECH_DATA}@{revision}/{files[0]}") as file:
            batches = ParquetFile(file).iter_batches(100, columns=["id", "text", "audio"], use_threads=False)
            rows = take_utterances((row for batch in batches for row in batch.to_pylist()), folder, 60 * minutes)
    except DownloadError:
        raise
    except Exception as error:  # as above
        raise _failure("data set", SPEECH_DATA, error) from error
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def take_utterances(stream: Any, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Write utterances of LibriSpeech into `folder` until `seconds` of speech are reached.

    Args:
        stream: yields dicts with `id`, `text` and `audio` (dict with `bytes`, an encoded file).
        folder: receives one FLAC file per utterance; `audio` in the rows is relative to it.

    Raises:
        DownloadError: an utterance is not 16 kHz mono.
    """
    rows, total = [], 0.0
    for example in stream:
        samples, rate = soundfile.read(BytesIO(example["audio"]["bytes"]), dtype="int16")
        if rate != SAMPLING_RATE or samples.ndim != 1:
            raise DownloadError(
                f"Utterance {example['id']!r} of {SPEECH_DATA} has {rate} Hz and shape {samples.shape}; 16 kHz mono is "
                "expected. The data set has changed: use `--source packages`."
            )
        duration = len(samples) / rate
        if total + duration > seconds:
            break
        total += duration
        name = f"{Path(example['id']).name}.flac"
        soundfile.write(folder / name, samples, rate, subtype="PCM_16", format="FLAC")
        text = " ".join(example["text"].split()).capitalize()
        row = {"id": example["id"], "audio": name, "text": text, "language": "en", "task": "asr", "duration": duration}
        rows.append(row)
    return rows


def _failure(kind: str, name: str, error: Exception) -> DownloadError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return DownloadError(
        f"The {kind} {name} could not be fetched from the Hugging Face Hub: {cause} Remedy: {_REMEDY}."
    )
