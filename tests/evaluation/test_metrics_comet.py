"""COMET behind a process boundary: the environment is real, and holds a package `comet` that scores by shared words."""

import subprocess
import sys

import pytest

from speechllm.evaluation.metrics.comet import CometUnavailable, comet_score, comet_test, find_environment


STAND_IN = """
from types import SimpleNamespace

def download_model(name):
    raise OSError(f"{name} is out of reach")

class Model:
    def predict(self, segments, batch_size, gpus, progress_bar):
        print("noise on the standard output")
        def shared(segment):
            return len(set(segment["mt"].split()) & set(segment["ref"].split())) / len(segment["ref"].split())
        return SimpleNamespace(scores=[shared(segment) + gpus for segment in segments])

def load_from_checkpoint(path):
    return Model()
"""
ROWS = [{"id": "a", "text": "one two", "target": "eins zwei"}, {"id": "b", "text": "three", "target": "drei"}]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Of an environment with the stand-in, which knows neither this package nor what it needs."""
    folder = tmp_path_factory.mktemp("comet")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    library = next(folder.glob("lib/python*/site-packages"))
    (library / "comet.py").write_text(STAND_IN)
    return folder / "bin" / "python"


def test_scores_come_back_in_order(python, tmp_path):
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.touch()
    found = comet_score(ROWS, {"b": "vier", "a": "eins zwei"}, python=python, model=str(checkpoint), bootstrap=50)
    assert found["comet"] == 0.5
    assert found["comet_interval"] == [0, 1]
    assert found["comet_model"] == str(checkpoint)
    assert found["comet_scores"] == {"a": 1, "b": 0}
    rows = [{**row, "speaker": "one"} for row in ROWS]  # one unit of resampling
    found = comet_score(
        rows, found["comet_scores"] | {"a": "eins", "b": ""}, python=python, model=str(checkpoint), bootstrap=9,
        gpus=2, cluster="speaker",
    )  # fmt: skip
    assert found["comet_interval"] == [2.25, 2.25]


def test_paired_test_of_scores():
    rows = [{"id": str(i)} for i in range(20)]
    a = {str(i): 0.5 + 0.01 * i for i in range(20)}
    found = comet_test(rows, a, {name: score - 0.1 for name, score in a.items()})
    assert found["difference"] == pytest.approx(0.1) and found["interval"] == pytest.approx([0.1, 0.1])
    assert found["p"] < 0.001 and comet_test(rows, a, a)["p"] == 1


def test_what_comet_needs_is_said(python, tmp_path, monkeypatch):
    with pytest.raises(CometUnavailable, match="wmt22-comet-da is out of reach.* path of its .ckpt"):
        comet_score(ROWS, {"a": "", "b": ""}, python=python)
    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path))
    with pytest.raises(CometUnavailable, match="Transformers < 5.*`speechllm evaluate --model DIR .*--comet_python"):
        find_environment()
    with pytest.raises(CometUnavailable, match="cannot import COMET.*No module named 'comet'.*-m pip install"):
        find_environment(sys.executable)
