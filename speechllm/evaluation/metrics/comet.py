"""COMET (Rei et al., 2020), by its own package in an environment of its own.

`unbabel-comet` needs Transformers < 5, so it cannot be installed beside this package. It runs as a subprocess of another
Python: one that the user names, or the virtual environment `comet` in the cache folder, made on request. The model
(`Unbabel/wmt22-comet-da`, 2.3 GB) comes from the Hugging Face Hub, or from a checkpoint file.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.schema import Row
from ...downloads import cache_directory
from .resampling import CorpusMetric, compared
from .tasks import answers_of, groups_of, reference_of, summary


MODEL = "Unbabel/wmt22-comet-da"
PACKAGE = "unbabel-comet==2.2.7"
RUNNER = Path(__file__).with_name("comet_runner.py")


class CometUnavailable(RuntimeError):
    """COMET cannot run; the message says what it needs."""


def comet_score(
    rows: Sequence[Row],
    predictions: Mapping[str, str],
    *,
    python: str | os.PathLike | None = None,
    model: str = MODEL,
    batch_size: int = 16,
    gpus: int = 0,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
) -> dict[str, Any]:
    """`comet` (about 0 to 1; papers print it times 100), `comet_model`, `comet_scores` (id -> the utterance's) and, with
    `bootstrap`, `comet_interval`.

    Args:
        rows: with `id`, `text` (the transcript) and `target` (the reference translation).
        predictions: translations by id.
        python: of an environment with `unbabel-comet`; default: the one made by `create_environment`.
        model: name on the Hub, or the path of a `.ckpt` file.
        gpus: how many COMET uses.
        cluster: see `score`.

    Raises:
        ScoringError: if a row has no transcript, no reference or no prediction.
        CometUnavailable: if there is no environment, the model cannot be loaded, or COMET fails.
    """
    segments = [
        {"src": reference_of(row, "text"), "mt": answer, "ref": reference_of(row, "target")}
        for row, answer in zip(rows, answers_of(rows, predictions))
    ]
    request = {"model": model, "segments": segments, "batch_size": batch_size, "gpus": gpus}
    scores = {row["id"]: score for row, score in zip(rows, _run(find_environment(python), request), strict=True)}
    facts = {"comet_model": model, "comet_scores": scores}
    return summary({"comet": _mean(rows, scores)}, facts, bootstrap, seed, groups_of(rows, cluster))


def comet_test(
    rows: Sequence[Row],
    scores_a: Mapping[str, float],
    scores_b: Mapping[str, float],
    seed: int = 0,
    cluster: str | None = None,
) -> dict[str, Any]:
    """Is system A's mean score of the rows another than system B's? As `paired_test`, from `comet_scores`."""
    pair, groups = [_mean(rows, scores) for scores in (scores_a, scores_b)], groups_of(rows, cluster)
    return compared(*(pair if groups is None else [metric.grouped(groups) for metric in pair]), seed)


def _mean(rows: Sequence[Row], scores: Mapping[str, float]) -> CorpusMetric:
    return CorpusMetric(np.array([[scores[row["id"]], 1.0] for row in rows]), lambda sums: sums[0] / sums[1])


def find_environment(python: str | os.PathLike | None = None) -> Path:
    """The Python that can import COMET.

    Raises:
        CometUnavailable: if there is none.
    """
    path = Path(python) if python else environment_python()
    if not path.exists():
        raise CometUnavailable(
            f"COMET needs an environment of its own, and there is no {path}. Its package ({PACKAGE}) wants Transformers "
            "< 5. Make one by adding `--comet_install` (about 5 GB): `speechllm evaluate --model DIR --data ... "
            "--output DIR --comet --comet_install`, or name the Python of another with `--comet_python PATH`."
        )
    found = _call([path, "-I", "-c", "import comet"])
    if found.returncode:
        raise CometUnavailable(
            f"{path} cannot import COMET: {_last_line(found)} Install it there: `{path} -m pip install {PACKAGE}`."
        )
    return path


def environment_python() -> Path:
    return cache_directory() / "comet" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create_environment() -> Path:
    """Make the virtual environment and install COMET into it with pip, unless that is done; returns its Python.

    Raises:
        CometUnavailable: if pip cannot install it.
    """
    path = environment_python()
    commands = [[path, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]]
    if not path.exists():
        commands.insert(0, [sys.executable, "-m", "venv", path.parent.parent])
    for command in commands:
        done = _call(command)
        if done.returncode:
            raise CometUnavailable(f"{PACKAGE} could not be installed into {path.parent.parent}: {_last_line(done)}")
    return find_environment(path)


def _run(python: Path, request: dict[str, Any]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        done = _call([python, "-I", RUNNER, asked, answered])
        if done.returncode:
            raise CometUnavailable(
                f"COMET failed with the model {request['model']!r}: {_last_line(done)} Where the Hugging Face Hub cannot be "
                "reached, download the model elsewhere and give the path of its .ckpt file."
            )
        return json.loads(answered.read_text(encoding="utf-8"))


def _call(command: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with status {done.returncode}."
