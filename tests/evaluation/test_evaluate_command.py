"""`speechllm evaluate` as a user runs it: alone, on two processes, with bad input; and the LLM's text abilities."""

import base64
import contextlib
import io
import json
import os
import re
import socket

import pytest
import soundfile
import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState
from test_metrics_comet import python as comet_python  # noqa: F401 (a fixture)
from tiny import enliven, tone
from tiny_training import fine_tuning, save_base_models, tiny_rows
from transformers import AutoModelForCausalLM

from speechllm import CheckpointError, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from speechllm.base_models_speechllm import pin_revision
from speechllm.cli import main
from speechllm.evaluation import generation
from speechllm.evaluation.text_abilities import compare_text_abilities, first_difference


# Where sclite's alignment, which prefers words found right, has an error more than the fewest.
REFERENCE, HYPOTHESIS = "b b b a a c a", "a c a b c"
LEVENSHTEIN, SCLITE = [12, 8, 0, 28], [0, 16, 8, 28]  # of four utterances
SMALL = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48)


def assembled(folder):
    speech, text = save_base_models(folder)
    torch.manual_seed(5)
    enliven(AutoModelForCausalLM.from_pretrained(text)).save_pretrained(text)  # so that answers have words
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(speech, text, **SMALL)
    return model, SpeechLLMProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A projector-only checkpoint, and a manifest with recognition and translation."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, processor = assembled(folder)
    enliven(model.model.projector)  # so that they depend on the audio
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = tiny_rows(7, seconds=0.3)
    for i, row in enumerate(rows):
        soundfile.write(folder / f"{i}.wav", row["audio"], 16_000)
        row["audio"] = f"{i}.wav"
        if i % 2:
            row.update(task="st", target="eins zwei", target_language="de")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder, output, *more):
    options = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output]
    return ["evaluate", *map(str, options), "--max_new_tokens", "6", "--device", "cpu", "--bootstrap", "20", *more]


def test_the_command_writes_predictions_metrics_and_report(folder, tmp_path, capsys):
    more = ["--text_abilities", "--feature_cache", str(tmp_path / "cache"), "--tasks", "asr,st", "--batch_size", "2"]
    assert main(command(folder, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    assert "asr: 4 of 4 scored" in printed and "wer" in printed and "identical to the base LLM's" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tasks"]["st"]["metrics"]["bleu_interval"]
    assert metrics["model"]["name"] == str(folder / "model")
    assert metrics["data"]["sources"] == [str(folder / "data.jsonl")]
    assert (tmp_path / "out" / "report.html").stat().st_size > 5_000


def test_alignment_is_measured_at_the_layers_asked_for(folder, tmp_path, capsys):
    depth = json.loads((folder / "model" / "config.json").read_text())["text_config"]["num_hidden_layers"]
    for layers, found in (([], sorted({*range(0, depth, 5), depth})), (["-1,1"], [1, depth])):
        chosen = [f"--alignment_layers={name}" for name in layers]
        assert main(command(folder, tmp_path / "out", "--alignment", *chosen)) == 0
        names = [str(layer) for layer in found]
        assert f"mean over the layer(s) {', '.join(names)} (chance" in capsys.readouterr().out
        measured = json.loads((tmp_path / "out" / "metrics.json").read_text())["alignment"]["layers"]
        assert list(measured) == names
        assert f"hidden state(s) {', '.join(names)} of the LLM" in (tmp_path / "out" / "alignment.html").read_text()
    assert main(command(folder, tmp_path / "out", "--alignment", "--prefix", "Hear:")) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["alignment"]["prefix"] == "Hear:"
    assert main(command(folder, tmp_path / "other", "--alignment", "--alignment_layers", "99")) == 1
    error = capsys.readouterr().err
    assert "Alignment: layers is '99'; use 'emb', 'all', or indices" in error
    assert not (tmp_path / "other").exists()  # it is said before hours of work
    assert main(command(folder, tmp_path / "other", "--alignment_layers", "emb")) == 2
    assert "Add --alignment" in capsys.readouterr().err


def answering(monkeypatch, text):
    monkeypatch.setattr(generation, "generate_texts", lambda *a: [(text, True) for _ in a[2]["rows"]])


def test_errors_are_counted_by_sclites_alignment_on_request(folder, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "audio": str(folder / row["audio"]), "text": REFERENCE}) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    answering(monkeypatch, HYPOTHESIS)
    found = {}
    for alignment in ("levenshtein", "sclite"):
        arguments = command(folder, tmp_path / alignment, "--tasks", "asr", "--error_alignment", alignment)
        arguments[arguments.index("--data") + 1] = str(tmp_path / "data.jsonl")
        assert main(arguments) == 0
        metrics = json.loads((tmp_path / alignment / "metrics.json").read_text())
        assert metrics["scoring"]["error_alignment"] == alignment
        found[alignment] = metrics["tasks"]["asr"]["metrics"]
        lines = [json.loads(line) for line in (tmp_path / alignment / "predictions.jsonl").read_text().splitlines()]
        scores = [line["score"] for line in lines]  # of the utterances, which the report draws, too
        assert scores == pytest.approx([found[alignment]["wer"]] * 4)
    names = ("substitutions", "deletions", "insertions", "reference_words")
    assert [found["levenshtein"][name] for name in names] == LEVENSHTEIN
    assert [found["sclite"][name] for name in names] == SCLITE
    assert found["sclite"]["wer"] == pytest.approx(sum(SCLITE[:3]) / SCLITE[3])
    assert main([*arguments, "--error_alignment", "dtw"]) == 2
    assert "use levenshtein or sclite" in capsys.readouterr().err


def test_the_oracle_needs_no_audio_files(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows[0].pop("audio")  # the others' files are not in this folder
    rows[2]["text"] = ""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command(folder, tmp_path / "out", "--oracle")
    arguments[arguments.index("--data") + 1] = str(tmp_path / "data.jsonl")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "asr: 3 of 3 scored" in printed and "1 utterance(s) set aside: empty transcript" in printed
    assert main([*arguments, "--strict"]) == 1
    assert "has no transcript" in capsys.readouterr().err
    rows[2]["text"] = "seven"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*arguments, "--strict"]) == 0  # which decodes no audio
    assert "asr: 4 of 4 scored" in capsys.readouterr().out
    assert main([*arguments, "--alignment"]) == 1  # which listens
    assert "no rows that can be used" in capsys.readouterr().err


def test_every_metric_and_comet_are_tested_against_a_baseline(folder, tmp_path, monkeypatch, capsys, comet_python):  # noqa: F811
    (tmp_path / "model.ckpt").touch()
    comet = ["--comet", "--comet_python", comet_python, "--comet_model", tmp_path / "model.ckpt", "--comet_gpus", "2"]
    options = [*map(str, comet), "--tasks", "st"]
    answering(monkeypatch, "eins")
    assert main(command(folder, tmp_path / "a", *options)) == 0
    answering(monkeypatch, "eins zwei")
    assert main(command(folder, tmp_path / "b", *options, "--baseline", str(tmp_path / "a"))) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"against the baseline, 3 common utterance\(s\):\n    bleu .*\n    chrf.*\n    comet +\+0.5000  p = ", printed
    )
    lines = [json.loads(line) for line in (tmp_path / "b" / "predictions.jsonl").read_text().splitlines()]
    assert [line["comet"] for line in lines] == [3.0] * 3  # the stand-in's score of a right answer, and the GPUs
    found = json.loads((tmp_path / "b" / "metrics.json").read_text())["tasks"]["st"]["against_baseline"]["tests"]
    assert found["comet"]["difference"] == 0.5 and found["comet"]["utterances"] == 3
    (tmp_path / "other.ckpt").touch()  # scores of another model are no baseline
    options[options.index("--comet_model") + 1] = str(tmp_path / "other.ckpt")
    assert main(command(folder, tmp_path / "b", *options, "--baseline", str(tmp_path / "a"))) == 0
    assert "bleu" in (printed := capsys.readouterr().out) and not re.search(r"comet .* p = ", printed)


def start(rank, arguments, port, folder):
    """One of two processes, as `torchrun` starts them. (Copies of this one: new ones import for seconds.)"""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one is a copy of
    with open(folder / f"{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        assert main(arguments) == 0


def test_two_processes_give_the_answers_of_one(folder, tmp_path):
    assert main(command(folder, tmp_path / "one", "--batch_size", "2")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = command(folder, tmp_path / "two", "--batch_size", "2")
    torch.multiprocessing.start_processes(start, (arguments, port, tmp_path), nprocs=2, start_method="fork")
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert ["Saved to" in text for text in printed] == [True, False]
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["run"]["processes"] == 2
    assert one["tasks"] == two["tasks"]
    texts = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert len({json.loads(line)["prediction"] for line in texts[0].splitlines()}) > 2
    assert [path.name for path in (tmp_path / "two").glob("predictions*")] == ["predictions.jsonl"]


def test_prompts_are_for_rows_that_have_none(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()][:2]
    rows = [{"id": row["id"], "audio": str(folder / row["audio"]), "task": "emotion", "target": "joy"} for row in rows]
    (tmp_path / "emotions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command(folder, tmp_path / "out", "--prompts", '{"emotion": "Which emotion?"}')
    arguments[arguments.index("--data") + 1] = str(tmp_path / "emotions.jsonl")
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["Which emotion?"] * 2


def test_bad_input_is_reported_with_an_exit_code(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(folder / row["audio"])
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    rows[2]["audio"] = str(tmp_path / "broken.wav")
    rows[4]["audio"] = str(tmp_path / "missing.wav")
    rows[1].pop("target")
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command(folder, tmp_path / "out")
    arguments[arguments.index("--data") + 1] = str(tmp_path / "bad.jsonl")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "asr: 2 of 3 scored" in printed and "1 without a reference" in printed and "1 utterance(s) set aside" in printed
    )
    assert main([*arguments, "--strict"]) == 1
    assert ".wav" in capsys.readouterr().err
    assert main([*arguments, "--tasks", "sqa"]) == 1
    assert "No row is of the task 'sqa'" in capsys.readouterr().err
    assert main([*arguments, "--batch_size", "0"]) == 2
    assert "--batch_size is 0" in capsys.readouterr().err
    assert main([*arguments, "--prompts", "st=Say"]) == 2
    assert main([*arguments, "--normalisation", "whisper"]) == 2
    assert "--normalisation: There is no normaliser 'whisper'" in capsys.readouterr().err
    assert main([*arguments, "--prefix", "user"]) == 2
    assert "--prefix says how --alignment is done. Add --alignment" in capsys.readouterr().err


def test_text_abilities_are_the_base_llms_unless_it_was_trained(tmp_path):
    model, processor = assembled(tmp_path)
    with torch.no_grad():
        torch.nn.init.normal_(next(model.model.projector.parameters()))  # trained, or not: text does not pass it
    found = compare_text_abilities(model, processor, prompts=("Hello", "One"), max_new_tokens=6)
    assert found["identical"] is True and found["largest_logit_difference"] == 0
    assert [item["first_difference"] for item in found["prompts"]] == [None, None]
    assert all(item["answer"] for item in found["prompts"])
    trainer = fine_tuning(
        tmp_path / "run", model, tiny_rows(4), processor=processor, lora_rank=2, learning_rate=0.5, max_steps=3
    )
    trainer.train()
    found = compare_text_abilities(model, processor, prompts=("Hello", "One"), max_new_tokens=6)
    assert found["identical"] is False and found["largest_logit_difference"] > 0
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.view(-1)[0] += 1
    other.save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="changed since"):
        compare_text_abilities(model, processor)
    torch.save(other.state_dict(), tmp_path / "llm/pytorch_model.bin")
    (tmp_path / "llm/model.safetensors").unlink()
    model.config.base_models["text"]["revision"] = pin_revision(tmp_path / "llm", None)
    with pytest.raises(CheckpointError, match=r"the base LLM '.*pytorch_model.bin.* are pickled.*convert"):
        compare_text_abilities(model, processor)
    model.config.base_models = None
    assert compare_text_abilities(model, processor)["identical"] is None


def test_the_first_difference_counts_a_missing_end():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [4]) == 0


def test_audio_of_a_report_is_playable(folder, tmp_path):
    assert main(command(folder, tmp_path / "out")) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    found = re.findall(r'<audio[^>]*src="data:audio/(\w+);base64,([^"]*)"', page)
    assert len(found) == 7
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(found[0][1])))
    assert rate == 16_000 and 0.2 < len(samples) / rate < 0.5
    assert abs(samples).max() == pytest.approx(abs(tone(0.3)).max(), abs=0.3)
