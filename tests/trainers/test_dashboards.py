"""Dashboards: what TensorBoard and trackio hold after a training, read back from their own files."""

import io
import re
import sys

import pytest
from PIL import Image
from tiny_training import contrastive, fine_tuning, tiny_rows
from transformers.integrations import TensorBoardCallback

from speechllm.trainers.dashboards import TensorBoardDashboard, layer_groups, use_dashboards


def test_names_of_layers():
    logs = {"loss": 3.0, "loss_layer_5": 1.0, "loss_layer_10": 2.0, "eval_recall@1_layer_0": 0.5, "step": 1}
    assert layer_groups(logs) == (
        {"layers/loss/05": 1.0, "layers/loss/10": 2.0, "layers/eval_recall@1/00": 0.5},
        {"loss": 3.0, "step": 1},
    )


def event_file(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def pretrained(folder, **options):
    trainer = contrastive(
        folder,
        train=tiny_rows(8),
        held_out=tiny_rows(6, first=8),
        layers="0,2",
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        **options,
    )
    trainer.evaluate()
    trainer.train()
    return trainer


def test_tensorboard_shows_layers_and_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = pretrained(tmp_path, report_to="tensorboard")
    events = event_file(tmp_path / "logs")
    scalars = events.Tags()["scalars"]
    history = trainer.state.log_history
    for layer in (0, 2):
        shown = [(event.step, event.value) for event in events.Scalars(f"layers/loss/{layer:02d}")]
        told = [(log["step"], log[f"loss_layer_{layer}"]) for log in history if f"loss_layer_{layer}" in log]
        assert shown == [(step, pytest.approx(value)) for step, value in told] and len(shown) == 4
        assert [event.step for event in events.Scalars(f"layers/eval_recall@1/{layer:02d}")] == [0, 2, 4]
    assert "train/loss" in scalars and "eval/recall@1_mean" in scalars
    assert not [name for name in scalars if re.search(r"layer_\d", name)]

    names = {"alignment/recall_per_layer", "alignment/similarity_layer_00", "alignment/similarity_layer_02"}
    assert set(events.Tags()["images"]) == names
    for name in names:
        images = events.Images(name)
        assert [image.step for image in images] == [0, 2, 4]
        pictures = [Image.open(io.BytesIO(image.encoded_image_string)).convert("L") for image in images]
        assert all(min(picture.size) > 200 and len(picture.getcolors()) > 20 for picture in pictures)
        assert pictures[0].tobytes() != pictures[2].tobytes()  # the first shows one moment, the last two


def test_figures_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    pretrained(tmp_path, report_to="tensorboard", log_figures=False)
    tags = event_file(tmp_path / "logs").Tags()
    assert tags["images"] == [] and "layers/loss/00" in tags["scalars"]


def test_a_writer_of_ones_own_is_kept(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "mine")
    trainer = fine_tuning(tmp_path)
    trainer.add_callback(TensorBoardCallback(writer))
    assert type(trainer.callback_handler.callbacks[-1]) is TensorBoardCallback  # added later: Transformers' own names
    use_dashboards(trainer.callback_handler)
    dashboard = trainer.callback_handler.callbacks[-1]
    assert type(dashboard) is TensorBoardDashboard and dashboard.tb_writer is writer
    trainer.train()
    assert "train/loss" in event_file(tmp_path / "mine").Tags()["scalars"]


def test_trackio_shows_layers_and_figures(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="needs trackio: pip install trackio")
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer = pretrained(tmp_path, report_to="trackio", project="ears", run_name="run")
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("ears", "run")
    told = [log["loss_layer_2"] for log in trainer.state.log_history if "loss_layer_2" in log]
    assert [row["layers/loss/02"] for row in rows if "layers/loss/02" in row] == told
    assert all("train/global_step" in row for row in rows)
    pictures = [row["alignment/similarity_layer_02"] for row in rows if "alignment/similarity_layer_02" in row]
    assert len(pictures) == 3
    for picture in pictures:
        path = tmp_path / "trackio" / "media" / picture["file_path"]
        assert min(Image.open(path).size) > 200


def test_wandb_shows_layers_and_figures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs W&B: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = pretrained(tmp_path, report_to="wandb", run_name="run")
    summary = dict(wandb.run.summary)
    wandb.finish()
    told = [log["loss_layer_2"] for log in trainer.state.log_history if "loss_layer_2" in log]
    assert summary["layers/loss/02"] == told[-1] and "train/loss_layer_2" not in summary
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/alignment/*.png"))
    assert len(pictures) == 3 * 3 and all(min(Image.open(path).size) > 200 for path in pictures)
