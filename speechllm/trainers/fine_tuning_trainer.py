"""Fine-tuning on tasks (arXiv 2412.15712, Section 4): next-token cross-entropy on the answers.

The prompt is the LLM's own chat format with speech tokens at the audio placeholder. The LM head runs on answer positions
only. The part of the prompt that all rows begin with (system message, user header) is run once, for all steps where the
LLM is frozen and for all rows of a step where it is trained, and its keys and values are shared. Evaluation generates
answers and scores them by task; any of these metrics can choose the best checkpoint and end the training.
"""

import copy
import logging
import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.helpers import disable_input_dtype_casting
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import speed_metrics

from ..data.items import AnswerItems
from ..data.prompts import chat_of
from ..data.schema import Row
from ..evaluation.generation import generate_texts
from ..evaluation.scoring import is_scored, references_of, task_of, training_metrics
from .base import SpeechLLMTrainer
from .fine_tuning_config import FineTuningArguments


logger = logging.getLogger(__name__)


def add_lora(model, rank: int, alpha: int, seed: int = 0) -> None:
    """Add trainable LoRA matrices, in float32, to every linear layer of the LLM's blocks (PEFT); all else stays."""
    from peft import LoraConfig

    names = {
        name.rpartition(".")[2]
        for name, module in model.model.llm_layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    targets = rf"model\.language_model\..*\.({'|'.join(sorted(names))})"
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # in the LLM's bfloat16 most updates would be rounded away
            parameter.data = parameter.data.float()
    for parameter in trainable:  # PEFT freezes whatever is not an adapter
        parameter.requires_grad_(True)


def _adapter_of(model) -> Any:
    """The configuration of the model's LoRA, if it has one."""
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    return next(iter(model.peft_config.values())) if loaded else None


def _refuse_other_adapter(adapter: Any, args: FineTuningArguments) -> None:
    """
    Raises:
        ValueError: if the settings ask for another adapter than the model has, or for none.
    """
    merge = "Merge it into the LLM first (speechllm publish --merge-lora)"
    if args.train_llm:
        raise ValueError(f"train_llm is for an LLM without an adapter. {merge}.")
    has = (getattr(adapter, "r", None), getattr(adapter, "lora_alpha", None))  # other adapters are trained, not saved
    if args.lora_rank and has != (args.lora_rank, args.lora_alpha):
        raise ValueError(
            f"The model has LoRA of rank {has[0]} and alpha {has[1]}, which goes on being trained; lora_rank is "
            f"{args.lora_rank} and lora_alpha {args.lora_alpha}. Leave lora_rank out or give the same. {merge} to begin anew."
        )
    logger.info("The model's adapter goes on being trained.")


def thaw_llm(model) -> None:
    """Make all of the LLM trainable, in float32: in bfloat16 most updates would be rounded away."""
    model.config.freeze_language_model = False
    for module in (model.model.language_model, model.head):
        module.float().requires_grad_(True)


class FineTuningTrainer(SpeechLLMTrainer):
    """Fine-tuning of a SpeechLLM on rows with answers (`target`, or the transcript `text`).

    Args:
        model: `SpeechLLMForConditionalGeneration`; the projector is trained, and what its configuration leaves unfrozen.
        args, train_dataset, eval_dataset, processing_class: see `SpeechLLMTrainer`.
    """

    args: FineTuningArguments
    keys_differ_between_processes = False  # one answer is no negative of another

    def __init__(self, model, args: FineTuningArguments, *positional: Any, **kwargs: Any):
        adapter = _adapter_of(model)
        if adapter is not None:  # which is trained on
            _refuse_other_adapter(adapter, args)
        elif args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
        elif args.train_llm or not model.config.freeze_language_model:
            thaw_llm(model)
        super().__init__(model, args, *positional, **kwargs)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        if self.eval_rows:
            self._check_metrics()
        self.model_accepts_loss_kwargs = True  # the loss is divided by the answer tokens of the whole global batch
        self._prompt_start: tuple[torch.Tensor, Any] | None = None  # of a frozen LLM: token ids, keys and values

    def items(self, rows: list[Row], with_answer: bool = True) -> AnswerItems:
        """Prompts with speech, and the answers, or (to generate them) without."""
        context = self.headless.config.context
        return AnswerItems(rows, self.processing_class, self.frames, context, with_answer=with_answer)

    def problem(self, row: Row) -> str | None:
        """A missing prompt or answer."""
        try:
            chat_of(row)
        except ValueError as error:
            return str(error)
        return None

    # ---- training --------------------------------------------------------------------------------------------------

    @property
    def _llm_is_frozen(self) -> bool:
        modules = (self.headless.language_model, self.speechllm.head)
        return not any(p.requires_grad for module in modules for p in module.parameters())

    def _shared_start(self, input_ids: torch.Tensor) -> int:
        """Tokens that every row of the batch begins with, before the first placeholder."""
        same = (input_ids == input_ids[:1]).all(0) & (input_ids[0] != self.headless.config.audio_token_id)
        return int(same.long().cumprod(0).sum())

    @property
    def _shares_start(self) -> bool:
        # Gradient checkpointing runs layers twice, which a cache of keys and values does not survive; FSDP's weights are
        # whole only inside the wrapped model's own pass, and DeepSpeed shares the gradients of no other.
        if self.args.gradient_checkpointing or self.is_fsdp_enabled:
            return False
        return self._llm_is_frozen or not self.is_deepspeed_enabled

    def _keys_and_values(self, start: torch.Tensor) -> Any:
        self.llm_tokens += len(start) if self.speechllm.training else 0
        # As the model's own pass, which Accelerate has in bf16 or fp16 once it is prepared for training, then for good
        prepared = self.speechllm.training or hasattr(self.speechllm, "_original_forward")
        with self.accelerator.autocast() if prepared else nullcontext():
            return self.headless.language_model(input_ids=start[None], use_cache=True).past_key_values

    def _without_start(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without the prompt's shared start, and that start's keys and values instead. In training with a frozen
        LLM, they are computed once."""
        frozen, length = self._llm_is_frozen and self.speechllm.training, self._shared_start(batch["input_ids"])
        if frozen and self._prompt_start is not None and self._prompt_start[0].shape[0] <= length:
            length = self._prompt_start[0].shape[0]
        start = batch["input_ids"][0, :length]
        if length == 0:
            return batch
        if frozen:
            if self._prompt_start is None or not torch.equal(self._prompt_start[0], start):
                with torch.no_grad():
                    self._prompt_start = (start, self._keys_and_values(start))
            cache = copy.deepcopy(self._prompt_start[1])  # the layers add to theirs
        else:
            cache = self._keys_and_values(start)
        cache.batch_repeat_interleave(len(batch["input_ids"]))
        return {
            **batch,
            "input_ids": batch["input_ids"][:, length:],
            "labels": batch["labels"][:, length:],
            "past_key_values": cache,
        }

    def _model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in ("rows", "weight", "set_aside")}

    def answer_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch, without the prompt's shared start where that can be left out: the same loss of
        the answers for less work."""
        inputs = self._model_inputs(batch)
        return self._without_start(inputs) if self._shares_start else inputs

    def _with_noise(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with random tokens of the LLM in the place of some of the answers' (`answer_noise`); labels stay."""
        ids, config = batch["input_ids"], self.headless.config
        noisy = (batch["labels"] != -100) & (torch.rand(ids.shape, device=ids.device) < self.args.answer_noise)
        random = torch.randint_like(ids, config.text_config.vocab_size)
        noisy &= random != config.audio_token_id  # within the vocabulary of some LLMs, and there is no audio for it
        return {**batch, "input_ids": torch.where(noisy, random, ids)}

    def training_step(self, *positional: Any, **kwargs: Any) -> torch.Tensor:
        # Under autocast, LoRA's thin products run in the LLM's dtype; PEFT would cast their input to LoRA's float32 first,
        # in which they are the slowest part of a step on CPUs.
        autocast = self.accelerator.mixed_precision != "no" and getattr(self.speechllm, "_hf_peft_config_loaded", False)
        with disable_input_dtype_casting(self.speechllm, active=autocast):
            return super().training_step(*positional, **kwargs)

    def _early_stopping(self) -> EarlyStoppingCallback | None:
        asked = self.args.early_stopping_patience is not None
        callbacks = self.callback_handler.callbacks if asked else ()
        return next((callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)), None)

    @property
    def _has_ended(self) -> bool:
        stopping = self._early_stopping()
        stopped = stopping and stopping.early_stopping_patience_counter >= stopping.early_stopping_patience
        return bool(stopped) or super()._has_ended

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        if stopping := self._early_stopping():  # which counts on, by what is asked for now
            stopping.early_stopping_patience = self.args.early_stopping_patience
            stopping.early_stopping_threshold = self.args.early_stopping_threshold

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self.on_device(inputs)
        inputs = self._model_inputs(batch)
        if self.args.answer_noise:
            inputs = self._with_noise(inputs)
        if self._shares_start:
            inputs = self._without_start(inputs)
        reused = batch["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        self.llm_tokens += int(batch["attention_mask"][:, reused:].sum())
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)  # 0: nothing could be used
            if self.args.average_tokens_across_devices:  # DDP averages over processes what this is the sum of
                num_items_in_batch = num_items_in_batch / self.args.world_size
        outputs = model(**inputs, answer_logits_only=True, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * batch["weight"]
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def _check_metrics(self) -> None:
        """Score a few references, so that nothing is found to be missing after hours of training.

        Raises:
            ValueError: if evaluation will not find the metric that is to choose the best model.
            ModuleNotFoundError: if a package of a task's metrics is not installed.
        """
        names, few, wanted = ["loss"], defaultdict(list), self.args.metric_for_best_model
        if self.args.predict_with_generate:
            for row in filter(is_scored, self.eval_rows):
                few[task_of(row)].append(row)
            right = {row["id"]: references_of(row)[0] for rows in few.values() for row in rows[:20]}
            names += training_metrics(self.eval_rows, right)
        if wanted is not None and wanted.removeprefix("eval_") not in names:
            raise ValueError(f"metric_for_best_model is {wanted!r}; evaluation on this data gives {', '.join(names)}.")

    @torch.no_grad()
    def held_out_loss(self, dataset: AnswerItems) -> float:
        """Mean cross-entropy per answer token over `dataset`, in nats."""
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.eval_batches(dataset):
            batch = self.on_device(batch)
            loss = self.speechllm(**self.answer_inputs(batch), answer_logits_only=True, num_items_in_batch=1).loss
            if batch["weight"]:  # else a stand-in, which ran only because other processes may wait for it
                total += torch.tensor([loss.item(), (batch["labels"][:, 1:] != -100).sum().item()], dtype=torch.float64)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total.to(self.args.device)).cpu()
        return (total[0] / total[1].clamp(min=1)).item()

    @torch.no_grad()
    def answers(self, rows: list[Row]) -> dict[str, str]:
        """Greedy answers to `rows` by id; rows that cannot be used are missing."""
        dataset = self.items(rows, with_answer=False)
        found: dict[str, str] = {}
        for batch in self.eval_batches(dataset, padding_side="left"):
            batch = self.on_device(batch)
            texts = generate_texts(self.speechllm, self.processing_class, batch, self.args.max_new_tokens)
            if not batch["weight"]:  # a stand-in, which ran only because other processes may wait for it
                continue
            found.update({dataset.rows[row]["id"]: text for row, (text, _) in zip(batch["rows"], texts)})
        if self.args.world_size > 1:
            found = dict(gather_object(list(found.items())))
        return found

    def evaluate(
        self, eval_dataset: list[Row] | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`<prefix>_loss` per answer token and, with `predict_with_generate`, the metrics of each task that the rows have,
        as in `<prefix>_st_bleu`; where all of it is recognition, `<prefix>_wer` and `<prefix>_cer` too."""
        start = time.time()
        rows = self.eval_rows if eval_dataset is None else self._usable(eval_dataset)
        if not rows:
            raise ValueError("There is nothing to evaluate on: give `eval_dataset`.")
        self.speechllm.eval()
        metrics = {"loss": self.held_out_loss(self.items(rows))}
        if self.args.predict_with_generate:
            self.predictions = self.answers(rows)
            metrics.update(training_metrics(rows, self.predictions))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(rows)))
        self.write_set_aside()
        self.log(metrics)
        self.note_training()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
