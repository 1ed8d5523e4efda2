"""Training on a stream: resumption with and without workers, two processes, the share of padding, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import soundfile
import torch
from tiny import tone
from tiny_training import contrastive, fine_tuning, save_base_models, tiny_rows, tiny_trainable, weights_of

from speechllm import CheckpointError
from speechllm.cli import main


def generated(shards):
    for shard in shards:
        yield from tiny_rows(24)[shard::4]


def stream():
    return datasets.IterableDataset.from_generator(generated, gen_kwargs={"shards": [0, 1, 2, 3]})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [contrastive, fine_tuning])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path, train, workers):
    options = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "stream_buffer": 7,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 4,
        "dataloader_num_workers": workers,
    }
    whole = train(tmp_path / "whole", tiny_trainable(dropout=0.1), stream(), **options)
    whole.train()
    resumed = train(tmp_path / "resumed", tiny_trainable(dropout=0.1), stream(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 7
    assert resumed.state.epoch == whole.state.epoch == 1
    after = weights_of(whole.speechllm)
    for name, value in weights_of(resumed.speechllm).items():
        torch.testing.assert_close(value, after[name], atol=1e-6, rtol=0, msg=name)
    others = {"dataloader_num_workers": (2 - workers, f"of {max(workers, 1)} data worker"),
              "per_device_train_batch_size": (3, "per_device_train_batch_size was 2"),
              "data_seed": (5, "data_seed was 42"), "stream_buffer": (9, "stream_buffer was 7")}  # fmt: skip
    for name, (value, reason) in others.items():
        other = train(tmp_path / "other", None, stream(), **{**options, name: value})
        with pytest.raises(CheckpointError, match=reason):
            other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_a_checkpoint_of_a_run_without_a_stream_is_refused(tmp_path):
    contrastive(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = contrastive(tmp_path, train=stream())
    with pytest.raises(CheckpointError, match="stream_0.pt is missing"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "max_steps"),
        ({"feature_cache": "cache"}, "feature_cache needs all the training data"),
        ({"text_state_cache": "cache"}, "text_state_cache needs all the training data"),
        ({"stream_buffer": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_suit_a_stream(tmp_path, options, message):
    options = {name: str(tmp_path) if name.endswith("cache") else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        contrastive(tmp_path, train=stream(), **options)


def test_a_stream_to_evaluate_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`eval_dataset` is a stream"):
        contrastive(tmp_path, held_out=stream())


def test_the_share_of_padding_is_logged(tmp_path):
    rows = [{**row, "audio": tone(0.2 + 0.1 * (i % 8), seed=i)} for i, row in enumerate(tiny_rows(16))]
    trainer = contrastive(tmp_path, train=rows, max_steps=4, length_window=0)
    padding = [1 - batch["attention_mask"].float().mean().item() for batch in trainer.get_train_dataloader()]
    output = trainer.train()
    logged = [entry["padding_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(padding, abs=1e-5)
    assert output.metrics["padding_share"] == trainer.state.log_history[-1]["padding_share"]
    assert min(padding) <= output.metrics["padding_share"] <= max(padding)
    by_length = contrastive(tmp_path, train=rows, max_steps=4, length_window=4).train()
    assert by_length.metrics["padding_share"] < 0.7 * output.metrics["padding_share"]


def test_the_command_reads_a_folder_of_shards(tmp_path, capsys):
    speech, llm = save_base_models(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(2):
        lines = []
        for i, row in enumerate(tiny_rows(16)[shard::2]):
            soundfile.write(data / f"{shard}-{i}.wav", row["audio"], 16_000)
            lines.append(json.dumps({"file": f"{shard}-{i}.wav", "sentence": row["text"], "duration": i % 8}))
        (data / f"{shard}.jsonl").write_text("\n".join(lines))
    (data / "0-3.wav").write_bytes(b"noise")
    arguments = f"""pretrain --speech_model {speech} --text_model {llm} --train_data {data} --streaming true --max_steps 4
        --maximum_seconds 6 --per_device_train_batch_size 3 --use_cpu true --dataloader_pin_memory false
        --disable_tqdm true --layers 0,1 --output_dir {tmp_path / "run"}""".split()
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48}
    columns = ["--columns", json.dumps({"audio": "file", "text": "sentence"}), "--projector", json.dumps(small)]
    assert main([*arguments, *columns]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 4
    aside = [json.loads(line) for line in (tmp_path / "run" / "set_aside.jsonl").read_text().splitlines()]
    assert [Path(item["id"]).name for item in aside] == ["0-3.wav"]
    assert [item["kind"] for item in aside] == ["audio cannot be decoded"]
    assert "1 utterance(s) set aside: audio cannot be decoded; e.g. " in capsys.readouterr().out

    capsys.readouterr()
    for options, message in (
        (["--held_out", "3"], "--held_out needs all rows at once"),
        (["--columns", "{text"], "--columns is not JSON"),
        (["--columns", "3"], "must map our names"),
        (["--max_steps", "-1", *columns], "max_steps"),
        ([], "there is no `audio`. Every row needs one (a path). If it is one of 'file'"),
    ):
        assert main([*arguments, *options]) in (1, 2)
        assert message in capsys.readouterr().err


TWO_PROCESSES = """
import sys, json, torch
torch.set_num_threads(1)
from pathlib import Path
from tiny_training import contrastive, tiny_trainable, weights_of
from test_streams import stream

folder = Path(sys.argv[1])

def run(name, **options):
    trainer = contrastive(folder / name, tiny_trainable(), stream(), max_steps=6, per_device_train_batch_size=2,
                          stream_buffer=6, learning_rate=1e-2, save_strategy="steps", save_steps=3)
    texts, on_device = [], trainer.on_device

    def noted(batch):
        rows = zip(batch["text_input_ids"], batch["text_attention_mask"].bool())
        texts.append([trainer.processing_class.tokenizer.decode(ids[mask][len(trainer.prefix):]) for ids, mask in rows])
        return on_device(batch)

    trainer.on_device = noted
    trainer.train(**options)
    return texts, weights_of(trainer.speechllm), trainer.args.process_index

texts, weights, rank = run("whole")
rest, again, _ = run("resumed", resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
difference = max((weights[name].float() - value.float()).abs().max().item() for name, value in again.items())
(folder / f"{rank}.json").write_text(json.dumps({"texts": texts, "rest": rest, "difference": difference}))
"""


@pytest.mark.slow  # each process imports everything anew; tests/data/test_streaming.py has the readers alone
def test_two_processes_share_a_stream_and_resume(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for mine, yours in zip(first["texts"], second["texts"], strict=True):
        assert len({*mine, *yours}) == 4
    assert {text for batch in first["texts"] for text in batch} <= {row["text"] for row in tiny_rows(24)}
    for found in (first, second):
        assert len(found["texts"]) == 6
        assert found["rest"] == found["texts"][3:]
        assert found["difference"] <= 1e-6
