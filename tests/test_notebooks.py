"""The notebooks run: on tiny random models, in a folder as `speechllm fetch` writes it, and, slow, on the real small models
in a kernel of their own. Committed are executed notebooks with small outputs."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
import soundfile
import torch
from tiny import tone
from tiny_training import WORDS, save_base_models


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Models and manifests under the names that the notebooks open."""
    folder = tmp_path_factory.mktemp("data")
    speech, text = save_base_models(folder)
    shutil.move(speech, folder / "speech_model")
    shutil.move(text, folder / "text_model")
    for name, first, count in (("train", 0, 40), ("test", 40, 24)):
        lines = []
        for i in range(first, first + count):
            words = [WORDS[i % 16], WORDS[(5 * i + 3 + i // 16) % 16], *["bread"] * (i % 3), WORDS[(7 * i + 1) % 16]]
            seconds = 0.3 + 0.01 * (i % 7)
            soundfile.write(folder / f"{i}.wav", tone(seconds, seed=i), 16_000)
            row = {"id": f"{name} {i}", "audio": f"{i}.wav", "text": " ".join(words), "duration": seconds}
            lines.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@each_notebook
def test_on_tiny_models(path, tiny_data, tmp_path, monkeypatch):
    """Its cells, one after the other, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPEECHLLM_DATA", str(tiny_data))
    monkeypatch.setenv("SPEECHLLM_STEPS", "4")
    torch.manual_seed(0)
    names = {"__name__": path.stem}
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) > 5
    for number, cell in enumerate(cells):
        exec(compile(cell.source, f"{path.stem}, code cell {number}", "exec"), names)


@each_notebook
def test_committed_outputs(path):
    """It has been run from top to bottom, without an error, and is small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 300_000


@pytest.mark.slow
@each_notebook
def test_on_real_models(path, tmp_path):
    from nbclient import NotebookClient

    from speechllm.quickstart.small_data import write_small_data

    write_small_data(tmp_path / "data")
    environment = {**os.environ, "SPEECHLLM_DATA": str(tmp_path / "data"), "SPEECHLLM_STEPS": "12"}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
