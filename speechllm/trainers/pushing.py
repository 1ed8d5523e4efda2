"""`push_to_hub=True` in the trainers: every push is the folder that `speechllm publish` would push.

`Trainer`'s own mechanism uploads the output folder as it lies there: it does not know projector-only checkpoints, and it
adds pickled arguments, which hold the token, logs, and whatever else is in the folder.
"""

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..hub.publishing import explained_refusal, prepare_folder
from ..hub.training_summary import SUMMARY, read_summary, training_summary, write_summary
from ..pushing_speechllm import PROJECTOR_WEIGHTS, refuse_local_bases, upload_checkpoint


logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """A `Trainer` that leaves a training summary beside its checkpoints and pushes them whole. A subclass has the model
    to save in `self.speechllm` before it calls `__init__`, and calls `save_summary` where it saves."""

    def __init__(self, *args: Any, **kwargs: Any):
        source = read_summary(self.speechllm.name_or_path, **self.speechllm.loaded_from)
        self.earlier_stages = source.get("stages", [])
        self._started = time.monotonic()
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy is {self.args.hub_strategy.value!r}, which would publish the optimiser's pickled state. Use "
                "'every_save': each save becomes a commit, and the repository's history keeps them all."
            )
        if not self.speechllm.is_self_contained:
            refuse_local_bases(self.speechllm.config.base_models)
        with explained_refusal(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(token=token, private=private)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        self._started = time.monotonic()
        if isinstance(resume_from_checkpoint, str) and (Path(resume_from_checkpoint) / SUMMARY).is_file():
            self._started -= read_summary(resume_from_checkpoint)["stages"][-1]["seconds"]
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def note_training(self) -> None:
        """Leave the summary with a model that was trained, for `model.push_to_hub`."""
        if self.state.global_step:
            self.speechllm.training_summary = self._summary()

    def _summary(self) -> dict[str, Any]:
        return training_summary(self, self.earlier_stages, time.monotonic() - self._started)

    def save_summary(self, folder: Path) -> None:
        write_summary(folder, self._summary())

    # ---- pushing ---------------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ):
        """Save, and upload model, processor and card; `card` are options of `prepare_folder` (license, languages)."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push = self._push(self.args.output_dir, commit_message, token, revision, **card)
        return push.result() if blocking else push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        push = self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if pushing else []), push])

    def _push(
        self, checkpoint: str, message: str | None, token: str | None = None, revision: str | None = None, **card
    ):
        """Upload a copy of the checkpoint in the background; `Trainer` may delete the checkpoint meanwhile."""
        folder = Path(tempfile.mkdtemp(prefix="speechllm-push-"))
        kind = "projector" if (Path(checkpoint) / PROJECTOR_WEIGHTS).is_file() else "full"
        try:
            prepare_folder(checkpoint, folder, self.hub_model_id, kind=kind, **card)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        api = HfApi(token=token or self.args.hub_token)

        def push():
            try:
                with explained_refusal(self.hub_model_id):
                    branch = revision or self.args.hub_revision
                    return upload_checkpoint(api, folder, self.hub_model_id, message or "Upload SpeechLLM", branch)
            except Exception as error:  # in the background, nobody else may ask
                logger.warning("%s", error)
                raise
            finally:
                shutil.rmtree(folder)

        return api.run_as_future(push)
