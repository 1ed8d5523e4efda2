"""What TensorBoard, W&B and trackio show of a training: curves in a group of their own for layers, and figures.

`Trainer`'s integrations put every value into `train/` or `eval/`, where `loss_layer_10` stands before `loss_layer_5`. Here
those three name the values of layers `layers/loss/05`, `layers/eval_recall@1/10`, ...: dashboards group by what stands
before a slash, and two digits sort as numbers do. The trainer's own log (`trainer_state.json`) keeps its names.

At each evaluation of contrastive pretraining `AlignmentFigures` adds pictures: retrieval per layer, and the similarities
of held-out texts and utterances at the first, a middle and the last layer, now and at the first evaluation.
"""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ..evaluation.plots import png_bytes, recall_per_layer, similarity_matrices


if TYPE_CHECKING:
    from .contrastive_trainer import ContrastiveTrainer

SHOWN_PAIRS = 24  # rows and columns of a similarity matrix
DOTS_PER_INCH = 120

Values = dict[str, float | Figure]


def layer_groups(logs: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The values of single layers under their names on dashboards, and all others unchanged."""
    of_layers, others = {}, {}
    for name, value in logs.items():
        if match := re.fullmatch(r"(.+)_layer_(\d+)", name):
            of_layers[f"layers/{match[1]}/{int(match[2]):02d}"] = value
        else:
            others[name] = value
    return of_layers, others


class _LayersInGroups:
    """Before one of `Trainer`'s callbacks in the order of bases: sends what belongs to layers by itself."""

    send: Callable[[Values, int], None]  # values, and the step they belong to; after the first `on_log`

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        of_layers, others = layer_groups(logs)
        super().on_log(args, state, control, logs=others, **kwargs)  # begins the run where it has not begun
        if of_layers and state.is_world_process_zero:
            self.send(of_layers, state.global_step)


class TensorBoardDashboard(_LayersInGroups, TensorBoardCallback):
    def send(self, values: Values, step: int) -> None:
        for name, value in values.items():
            if isinstance(value, Figure):
                self.tb_writer.add_image(name, np.asarray(_picture(value)), step, dataformats="HWC")
            else:
                self.tb_writer.add_scalar(name, value, step)
        self.tb_writer.flush()


class WandbDashboard(_LayersInGroups, WandbCallback):
    def send(self, values: Values, step: int) -> None:
        self._wandb.log({**_with_images(values, self._wandb.Image), "train/global_step": step})


class TrackioDashboard(_LayersInGroups, TrackioCallback):
    def send(self, values: Values, step: int) -> None:
        self._trackio.log({**_with_images(values, self._trackio.Image), "train/global_step": step})


DASHBOARDS = {
    TensorBoardCallback: TensorBoardDashboard,
    WandbCallback: WandbDashboard,
    TrackioCallback: TrackioDashboard,
}


def use_dashboards(handler: CallbackHandler) -> None:
    """Replace the callbacks that `report_to` asked for by those above, with whatever they were set to."""
    for place, callback in enumerate(handler.callbacks):
        if type(callback) in DASHBOARDS:
            dashboard = DASHBOARDS[type(callback)].__new__(DASHBOARDS[type(callback)])
            vars(dashboard).update(vars(callback))
            handler.callbacks[place] = dashboard


class AlignmentFigures(TrainerCallback):
    """Figures of the alignment, on every dashboard that is there, at each evaluation of a `ContrastiveTrainer`."""

    def __init__(self, trainer: "ContrastiveTrainer"):
        self.trainer = trainer
        self.recalls: dict[str, dict[int, float]] = {}  # "step 0", ... -> layer -> recall@1
        self.matrices: dict[str, dict[int, torch.Tensor]] = {}  # likewise -> (texts, utterances)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs: Any) -> None:
        dashboards = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, _LayersInGroups)]
        if not dashboards or not state.is_world_process_zero:
            return
        figures = self.figures(f"step {state.global_step}")
        for dashboard in dashboards:
            dashboard.send(figures, state.global_step)

    def figures(self, moment: str) -> dict[str, Figure]:
        """The trainer's last evaluation, beside its first."""
        trainer = self.trainer
        self.recalls[moment] = trainer.held_out_recall
        self.matrices[moment] = {
            layer: matrix[:SHOWN_PAIRS, :SHOWN_PAIRS].clone() for layer, matrix in trainer.held_out_similarity.items()
        }
        for history in (self.recalls, self.matrices):  # of the moments between the first and this one nothing is shown
            for passed in list(history)[1:-1]:
                del history[passed]
        pairs = len(next(iter(trainer.held_out_similarity.values())))
        figures = {"alignment/recall_per_layer": recall_per_layer(self.recalls, chance=1 / pairs)}
        layers = list(trainer.held_out_similarity)
        label = "cosine similarity" if trainer.pooled else "similarity"
        for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
            matrices = {name: matrix[layer].tolist() for name, matrix in self.matrices.items()}
            figures[f"alignment/similarity_layer_{layer:02d}"] = similarity_matrices(matrices, label=label)
        return figures


def _picture(figure: Figure) -> Image.Image:
    return Image.open(io.BytesIO(png_bytes(figure, DOTS_PER_INCH))).convert("RGB")


def _with_images(values: Values, image: Callable[[Image.Image], Any]) -> dict[str, Any]:
    """Figures as the dashboard's own images."""
    return {name: image(_picture(value)) if isinstance(value, Figure) else value for name, value in values.items()}
