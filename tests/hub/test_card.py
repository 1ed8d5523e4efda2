"""The card: metadata that the Hub's client reads back unchanged, and text that says what training saw."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from tiny_training import contrastive, tiny_rows
from trained_checkpoints import new_model

import speechllm
from speechllm.evaluation.scoring import training_metrics
from speechllm.hub.card import METRICS, eval_results
from speechllm.hub.publishing import prepare_folder
from speechllm.hub.training_summary import read_summary
from speechllm.pushing_speechllm import KIND_IN_CARD, card_for


ROOT = Path(speechllm.__file__).parent.parent


@pytest.fixture(scope="module")
def published(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "new"
    return prepare_folder(adapted, folder, "org/ears", license="apache-2.0")


def test_the_metadata_is_read_back_as_it_was_written(published):
    card = ModelCard.load(published / "README.md")
    data = metadata_load(published / "README.md")
    assert ModelCardData(**data).to_dict() == data  # which parses the model-index into results and makes it again
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() == data
    assert {name: data[name] for name in data if name not in ("model-index", "widget", "tags")} == {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "base_model": ["org/speech", "org/llm"],
        "base_model_relation": "adapter",
        "datasets": ["org/words"],
        "metrics": ["cer", "wer"],
    }
    assert {"speech", "custom_code"} <= set(data["tags"])
    assert all(example["src"].endswith((".flac", ".wav")) and example["example_title"] for example in data["widget"])


def test_the_results_are_a_model_index(published, adapted):
    index = metadata_load(published / "README.md")["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "ears" and eval_results_to_model_index(name, results) == index
    measured = read_summary(adapted)["stages"][-1]["results"]
    found = {(r.task_type, r.dataset_type, r.metric_type): r.metric_value for r in results}
    assert found == {
        ("automatic-speech-recognition", "org/words", metric): round(100 * measured[metric], 2)
        for metric in ("wer", "cer")
    }


def test_what_trainers_measure_has_the_hubs_terms():
    rows = [
        {"id": "a", "task": "asr", "text": "one two", "target": "one two"},
        {"id": "b", "task": "st", "target": "ein Haus steht am Rand der Stadt", "target_language": "German"},
        {"id": "c", "task": "sqa", "answers": ["an apple"], "target": "an apple"},
        {"id": "d", "task": "traits", "trait": "gender", "target": "male", "choices": ["female", "male"]},
    ]
    results = training_metrics(rows, {row["id"]: row["target"] for row in rows}) | {"recall@1_mean": 1.0}
    index = eval_results_to_model_index("x", eval_results({"data": [], "results": results}))
    found = {metric["name"]: metric["value"] for result in index[0]["results"] for metric in result["metrics"]}
    assert len(found) == len(METRICS)
    assert {name: 0.0 if name[:3] in ("WER", "CER") else 100.0 for name in found} == pytest.approx(found)


def test_the_card_tells_what_both_stages_saw(published, adapted):
    text = (published / "README.md").read_text()
    pretraining, fine_tuning = read_summary(adapted)["stages"]
    assert (pretraining["trainer"], fine_tuning["trainer"]) == ("ContrastiveTrainer", "FineTuningTrainer")
    assert pretraining["settings"]["layers"] == "0,2" and fine_tuning["settings"]["lora_rank"] == 2
    for stage in (pretraining, fine_tuning):
        assert stage["data"][0] == {
            "split": "train", "source": "org/words", "license": "cc-by-4.0", "language": "en", "utterances": 16,
            "hours": 0.4,  # 16 of 90 s
        }  # fmt: skip
        assert stage["data"][1]["utterances"] == 6 and stage["data"][1]["hours"] is None
        assert stage["seconds"] > 0 and stage["steps"] == 2 and stage["versions"]["torch"] in text
        assert stage["hardware"] in text
    for words in (
        "| org/words | train | 16 | 0.40 | en | cc-by-4.0 |",
        "| org/words | held-out | 6 | unknown | en | cc-by-4.0 |",
        "`layers` 0,2",
        "`lora_rank` 2",
        'AutoModel.from_pretrained("org/ears", trust_remote_code=True)',
        "arXiv:2412.15712",
        "## Intended use",
        "## Limits",
        f"| wer | {fine_tuning['results']['wer']:.4g} |",
        "a LoRA adapter, which needs `pip install peft`",
    ):
        assert words in text, words
    assert not re.search(r"None|Undefined|\{\{|\{%|\n\n\n", text.replace("| None", "")), text
    (base,) = re.findall(r"\| org/speech \| `(\w+)` \| (\w+) \|", text)
    assert base == ("0123456789abcdef0123456789abcdef01234567", "unknown")  # the Hub is not reachable here


def test_the_plot_has_both_moments(published):
    with Image.open(published / "images/recall_per_layer.png") as image:
        assert image.width > 400 and len(image.convert("L").getcolors()) > 10
    assert "![Held-out" in (published / "README.md").read_text()


def test_the_snippet_runs(published, pretrained, monkeypatch, tmp_path):
    """As it stands in the card, on this folder instead of the repository."""
    import soundfile
    from tiny import tone

    (code,) = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    soundfile.write("some.wav", tone(0.4), 16_000)
    printed = []
    exec(code.replace("org/ears", str(published)), {"print": printed.append})
    assert len(printed) == 1 and isinstance(printed[0], str)


def test_resumed_time_and_emissions_add_up(cached, tmp_path):
    options = dict(layers="0", save_strategy="steps", save_steps=2)
    contrastive(tmp_path, new_model(), tiny_rows(8), max_steps=2, **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    summary = json.loads((checkpoint / "training_summary.json").read_text())
    summary["stages"][-1]["seconds"] = 1000.0
    (checkpoint / "training_summary.json").write_text(json.dumps(summary))
    (tmp_path / "emissions.csv").write_text("timestamp,emissions\na,0.001\nb,0.0005\n")
    trainer = contrastive(tmp_path, new_model(), tiny_rows(8), max_steps=4, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (stage,) = read_summary(tmp_path / "checkpoint-4")["stages"]
    assert 1000 < stage["seconds"] < 1200 and stage["steps"] == 4
    assert stage["emissions_grams"] == 1.5
    folder = prepare_folder(tmp_path / "checkpoint-4", tmp_path / "new", "org/ears")
    assert metadata_load(folder / "README.md")["co2_eq_emissions"]["emissions"] == 1.5


def test_a_stream_is_called_one(cached, tmp_path):
    """Nobody counts what is read of it, and the data are not left out of the card for that."""
    rows = datasets.IterableDataset.from_generator(lambda: iter(tiny_rows(8)))
    trainer = contrastive(tmp_path / "run", new_model(), rows, tiny_rows(4, 8), layers="0", max_steps=1)
    trainer.train()
    trainer.save_model()
    (stage,) = read_summary(tmp_path / "run")["stages"]
    streamed, held_out = stage["data"]
    assert streamed["streamed"] and streamed["utterances"] is streamed["hours"] is None and streamed["split"] == "train"
    assert held_out["split"] == "held-out" and held_out["utterances"] == 4
    card = (prepare_folder(tmp_path / "run", tmp_path / "new", "org/ears") / "README.md").read_text()
    assert "| train | a stream | unknown |" in card


def test_a_card_for_another_repository_keeps_what_is_not_its_name():
    card = """---
base_model_relation: adapter
model_name: ears
---
# org/ears
See https://huggingface.co/org/ears, org/ears. Not org/ears-large, org/ears.v2 or my-org/ears. My own words: adapter.
{}
AutoModel.from_pretrained("org/ears", trust_remote_code=True)
"""
    old = card.format(KIND_IN_CARD["projector"][1])
    assert card_for("org/ears", "projector", old) == old
    new = card_for("me/mine", "full", old)
    expected = card.replace("adapter\nmodel_name: ears", "finetune\nmodel_name: mine").format(
        "This repository holds all weights."
    )
    for before, after in (
        ("# org/ears\n", "# me/mine\n"), (".co/org/ears, org/ears.", ".co/me/mine, me/mine."), ('"org/ears"', '"me/mine"')
    ):  # fmt: skip
        expected = expected.replace(before, after)
    assert new == expected
    assert card_for("me/mine", "full", "# Mine\n") == "# Mine\n"


def test_the_template_is_in_sdists_and_wheels(tmp_path):
    """One file at the root; the package holds a link to it, which archives store as a file."""
    template = (ROOT / "model_card.md").read_bytes()
    assert (ROOT / "speechllm/hub/model_card.md").is_symlink()
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        if name.startswith("speechllm/") or name in ("pyproject.toml", "README.md", "LICENSE", "model_card.md"):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (tmp_path / "source" / name).symlink_to((ROOT / name).readlink())
            else:
                (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "-q", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    run = subprocess.run(build, cwd=tmp_path / "source", capture_output=True, text=True)  # the wheel from the sdist
    assert run.returncode == 0, run.stderr[-2000:]
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        (member,) = [m for m in archive.getmembers() if m.name.endswith("speechllm/hub/model_card.md")]
        assert member.isfile() and archive.extractfile(member).read() == template
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("speechllm/hub/model_card.md") == template
