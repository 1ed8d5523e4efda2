"""The documentation: its Python blocks run, its commands parse or run, its quoted messages are the code's, no page is lost."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from tiny import tiny_processor, tone
from tiny_training import WORDS, save_base_models, tiny_trainable

from speechllm.cli import main


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [  # whose blocks run as they stand, one after the other
    "getting_started.md",
    "how_to/own_data.md",
    "how_to/own_llm.md",
    "how_to/own_encoder.md",
    "how_to/own_objective.md",
    "how_to/dashboards.md",
]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text()) if name == language]


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """A folder like that of a reader: tiny models under the ids that the pages name, recordings, a checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    speech, text = save_base_models(folder)
    for name in ("openai/whisper-small", "microsoft/wavlm-large"):
        shutil.copytree(speech, folder / name)
    shutil.copytree(text, folder / "Qwen/Qwen3-0.6B")
    soundfile.write(folder / "some.wav", tone(0.5), 16_000)
    (folder / "clips").mkdir()
    lines, table = [], []
    for i in range(16):
        path, words = f"clips/{i}.wav", f"{WORDS[i]} {WORDS[(5 * i + 3) % 16]} {WORDS[(7 * i + 1) % 16]}"
        soundfile.write(folder / path, tone(0.4, seed=i), 16_000)
        lines.append(f'{{"audio": "{path}", "text": "{words}"}}\n')
        table.append(f"{path}\t{words}\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "transcripts.tsv").write_text("".join(table))
    model = tiny_trainable()
    model.save_pretrained(folder / "runs/quickstart/model", kind="full")
    tiny_processor(model.config).save_pretrained(folder / "runs/quickstart/model")
    (folder / "runs/pretrained").mkdir()
    (folder / "runs/pretrained/trainer_state.json").write_text(
        '{"log_history": [{"step": 10, "loss": 2.0, "loss_layer_0": 1.0}, {"step": 10, "eval_loss": 3.0}]}'
    )
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, reader, tmp_path, monkeypatch, capsys):
    shutil.copytree(reader, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    python = blocks(DOCS / page, "python")
    assert python
    names = {"__name__": page}
    for code in python:
        exec(compile(code, page, "exec"), names)
    assert not re.search(r"\bnan\b", capsys.readouterr().out)
    shutil.rmtree(tmp_path / "runs/pretrained", ignore_errors=True)
    for line in "\n".join(blocks(DOCS / page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] in (["speechllm", "pretrain"], ["speechllm", "finetune"]) and "--config" not in words:
            few = [
                "--max_steps",
                "2",
                "--per_device_train_batch_size",
                "4",
                "--disable_tqdm",
                "true",
            ]  # of 16 recordings
            few += ["--held_out", "4"] if "--held_out" in words else []
            assert main([*words[1:], *few]) == 0, capsys.readouterr().err


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"])))
    made = {"recipes.md", "api/command_line.md", *(f"notebooks/{path.stem}.md" for path in NOTEBOOKS)}
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | made


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def message_templates(path: Path):
    """The texts of a source file, with "…" for what is put into them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_quoted_messages_are_those_of_the_code():
    sources = [*(ROOT / "speechllm").rglob("*.py"), ROOT / "space/app.py"]
    texts = "\n".join(text for path in sources for text in message_templates(path))
    rows = re.findall(r"^\| (`+) ?(.+?) ?\1 \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    unknown = [message for _, message in rows if message not in texts]
    assert not unknown
