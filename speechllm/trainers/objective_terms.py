"""The further terms of stage 1: what each reads of a batch, and its loss.

| term           | the LLM reads                                     | loss                                               |
|----------------|---------------------------------------------------|----------------------------------------------------|
| `next_token`   | the row's chat (`data/prompts.py`) with speech    | cross-entropy of the answer                        |
| `mixed`        | the words of the utterance, some spoken           | cross-entropy of the written words                 |
| `distillation` | a chat with speech; the same with the transcript  | KL between the predictions of the answer           |
| `norm`         | nothing                                           | scale of the speech tokens against the embeddings' |

The speech tokens of the batch are made once, by the trained module; every term puts them into a prompt of its own. These
further passes run outside the module that DDP wraps: their gradient reaches the projector through the speech tokens, hence
through the wrapped module's own pass. That is all of it while the LLM is frozen. (FSDP2 wraps nothing: its weights find
each other in whatever pass. The head, no part of the trained module, is whole on every process.)

Each term is a mean over its own tokens (`norm`: over utterances) in the whole optimiser step: over all processes,
accumulated batches and chunks (`gradcache_chunk`). So it does not depend on how a global batch is split.
"""

import logging
import random
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import AlignmentItems, FurtherInput
from ..data.prompts import chat_of
from ..data.schema import Row
from ..data.words import has_word_times, without_punctuation, word_spans
from ..objectives.distillation import next_token_kl
from ..objectives.mixed_speech_text import IGNORED, WordSpan, mixed_sequence, spoken_words
from ..objectives.next_token import next_token_loss
from ..objectives.norm import embedding_mean_square, scale_penalty
from ..processing_speechllm import SpeechLLMProcessor
from .aligned_states import AlignedStates
from .contrastive_config import ContrastiveArguments


if TYPE_CHECKING:
    from .contrastive_trainer import ContrastiveTrainer

logger = logging.getLogger(__name__)

Prompt = dict[str, Any]  # `input_ids`, `labels`; in a batch `attention_mask` too
HELD_OUT = "held out"  # instead of a step: held-out rows are always mixed alike


def spoken_prompt(row: Row, segment_frames: list[int], processor: SpeechLLMProcessor) -> Prompt:
    """The row's chat with its answer, as in fine-tuning."""
    tokens = sum(processor.rule.tokens(frames) for frames in segment_frames)
    return processor.tokenize_pieces(processor.answer_pieces(chat_of(row)), [tokens])


def written_prompt(row: Row, segment_frames: list[int], processor: SpeechLLMProcessor) -> Prompt:
    """The same chat with the transcript and a line break where the speech was."""
    chat = chat_of(row)
    chat[0]["content"][0] = {"type": "text", "text": row["text"] + "\n"}
    return processor.tokenize_pieces(processor.answer_pieces(chat), [])


class ObjectiveTerms:
    """The terms that `args` give a weight, for a `ContrastiveTrainer`.

    Raises:
        ValueError: if a term needs the LM head and the model has none.
    """

    def __init__(self, trainer: "ContrastiveTrainer", model, args: ContrastiveArguments):
        self.trainer, self.args = trainer, args
        weights = {name: getattr(args, f"{name}_weight") for name in ("next_token", "mixed", "distillation", "norm")}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.reading = [name for name in self.weights if name != "norm"]
        if self.reading and not hasattr(model, "compute_logits"):
            raise ValueError(f"{self.reading[0]}_weight needs an LM head. Give a SpeechLLMForConditionalGeneration.")
        if "norm" in self.weights:
            table = model.get_input_embeddings()
            self.text_mean_square = embedding_mean_square(table, len(table.weight))
        self._warned = False

    def objectives(self) -> dict[str, tuple[float, Any]]:
        """Name -> (weight, objective), as `ContrastiveTrainer` takes them, but of sums, to be divided by `counts`."""
        return {name: (weight, getattr(self, name)) for name, weight in self.weights.items()}

    def prepare(self) -> None:
        """As soon as the trainer has its devices: bring the head, no part of the trained module, there too.

        Raises:
            ValueError: for what passes outside the wrapped module would get wrong: a trained LLM on several processes, or
                weights that DeepSpeed splits over processes.
        """
        trainer = self.trainer
        if not self.reading:
            return
        trainer.speechllm.head.to(trainer.args.device)
        if trainer.is_deepspeed_enabled and trainer.args.mixed_precision in ("bf16", "fp16"):
            # DeepSpeed knows no autocast: it gives the module that it wraps this dtype, and so must the head have it.
            trainer.speechllm.head.to(trainer.accelerator.state.deepspeed_plugin.hf_ds_config.dtype())
        if trainer.args.world_size > 1 and any(p.requires_grad for p in trainer.headless.language_model.parameters()):
            raise ValueError(
                f"{self.reading[0]}_weight on several processes needs a frozen LLM: the gradient of its weights would not "
                "be shared between them. Set freeze_language_model, train on one process, or leave the term out."
            )
        zero = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if zero is not None and zero.zero_stage == 3:
            raise ValueError(
                f"{self.reading[0]}_weight does not go with ZeRO stage 3. Use FSDP2, which splits weights too, or DDP or "
                "ZeRO stage 2, which suffice while the LLM is frozen, or leave the term out."
            )

    # ---- data ------------------------------------------------------------------------------------------------------

    def problem(self, row: Row) -> str | None:
        """Why a term cannot use the row; `None` if all can."""
        if "mixed" in self.weights:
            if not has_word_times(row):
                return f"{row['id']} has no times of its `words`. Write them into the manifest with `speechllm align`."
            if not any(self._text(word["word"]) for word in row["words"]):
                return f"{row['id']} has no words, only punctuation. Correct its transcript, or set mixed_punctuation."
        distils_targets = "distillation" in self.weights and self.args.distillation_target == "target"
        if distils_targets and not row.get("target"):
            return f"{row['id']} has no `target` to distil on. Give one, or set distillation_target to 'transcript'."
        if "next_token" in self.weights or distils_targets:
            try:
                chat_of(row)
            except ValueError as error:
                return str(error)
        return None

    def further(self, rows: list[Row]) -> dict[str, FurtherInput]:
        """What `AlignmentItems` are to prepare of each row."""
        processor, found = self.trainer.processing_class, {}
        if "next_token" in self.weights:
            found["next_token"] = partial(spoken_prompt, processor=processor)
        if "distillation" in self.weights:
            instruction = self.args.distillation_prompt if self.args.distillation_target == "transcript" else None
            found["student"] = partial(_distilled, prompt=spoken_prompt, instruction=instruction, processor=processor)
            found["teacher"] = partial(_distilled, prompt=written_prompt, instruction=instruction, processor=processor)
        if "mixed" in self.weights:
            found["words"] = partial(
                _named_words,
                rule=processor.rule,
                tokenizer=processor.tokenizer,
                punctuation=self.args.mixed_punctuation,
            )
            self._warn_of_proportional(rows)
        return found

    def _text(self, word: str) -> str:
        return word if self.args.mixed_punctuation else without_punctuation(word)

    def _warn_of_proportional(self, rows: list[Row]) -> None:
        count = sum(row.get("alignment") != "forced" for row in rows)
        if count and not self._warned:
            logger.warning(
                "The word times of %d of %d utterances are not from forced alignment but from the words' lengths; "
                "`speechllm align --ctc_model ...` finds better ones.",
                count,
                len(rows),
            )
            self._warned = True

    # ---- terms: sums over their items, and how many these are --------------------------------------------------------

    def counts(self, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Name -> how many items a batch of this optimiser step has on average, over this process's `batches` and those
        of the others. A sum divided by it becomes the mean over the step's items once it is averaged over batches, as
        `Trainer` does, and over processes, as DDP does. At least one item per step, where none could be used."""
        if not self.weights:
            return {}
        trainer = self.trainer
        step = trainer.state.global_step
        found = torch.zeros(len(self.weights), dtype=torch.long, device=trainer.args.device)
        for batch in batches:
            if batch["weight"]:
                counts = [self._count(name, batch, step) for name in self.weights]
                found += torch.stack([torch.as_tensor(count, device=found.device) for count in counts])
        if trainer.args.world_size > 1:
            found = trainer.accelerator.reduce(found)
        return dict(zip(self.weights, found.clamp(min=1) / (trainer.args.world_size * max(1, len(batches)))))

    def _count(self, name: str, batch: dict[str, Any], step: int | str) -> int | torch.Tensor:
        if name == "norm":
            return len(batch["rows"])
        if name == "mixed":
            return sum(label != IGNORED for row in self._mixed_rows(batch, step)[0] for label in row["labels"][1:])
        prompt = batch["further"]["student" if name == "distillation" else name]
        return (prompt["labels"][:, 1:] != IGNORED).sum()

    def next_token(self, states: AlignedStates) -> dict[str, torch.Tensor]:
        return {"loss": self._cross_entropy(states.batch["further"]["next_token"], self._speech_tokens(states))}

    def mixed(self, states: AlignedStates) -> dict[str, torch.Tensor]:
        trainer, tokens = self.trainer, self._speech_tokens(states)
        step = trainer.state.global_step if trainer.headless.training else HELD_OUT
        rows, chosen = self._mixed_rows(states.batch, step)
        prompt = trainer.processing_class.pad_rows(rows).to(tokens.device)
        loss = self._cross_entropy(prompt, tokens[torch.tensor(chosen, dtype=torch.long, device=tokens.device)])
        return {"loss": loss + 0 * tokens.sum()}  # in the projector's graph even if nothing is spoken

    def _mixed_rows(self, batch: dict[str, Any], step: int | str) -> tuple[list[Prompt], list[int]]:
        """The batch's mixed prompts, and which of its speech tokens they take. A row's choice of spoken words depends on
        seed, step and row alone: not on how the batch is split, and the same after resumption."""
        trainer = self.trainer
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        placeholder = trainer.headless.config.audio_token_id
        rows, chosen = [], []
        for (name, words), first in zip(batch["further"]["words"], [0, *accumulate(self._speech_lengths(batch))]):
            generator = random.Random(f"mixed {seed} {step} {name}")
            spoken = spoken_words(len(words), self.args.mixed_speech_probability, generator)
            sequence = mixed_sequence(words, spoken, placeholder)
            prefix = trainer.prefix
            rows.append(
                {
                    "input_ids": [*prefix, *sequence.input_ids],
                    "labels": [IGNORED] * len(prefix) + sequence.labels,
                }
            )
            chosen += [first + token for token in sequence.speech]
        return rows, chosen

    def _speech_lengths(self, batch: dict[str, Any]) -> list[int]:
        """Speech tokens of each utterance."""
        return (batch["input_ids"] == self.trainer.headless.config.audio_token_id).sum(-1).tolist()

    def distillation(self, states: AlignedStates) -> dict[str, torch.Tensor]:
        prompts = states.batch["further"]
        with torch.no_grad():
            teacher = self._answer_states(prompts["teacher"], None)
        student = self._answer_states(prompts["student"], self._speech_tokens(states))
        speechllm, args = self.trainer.speechllm, self.args
        with self.trainer.accelerator.autocast():
            loss = next_token_kl(
                student,
                teacher,
                lambda hidden: speechllm.compute_logits(hidden[None])[0],
                temperature=args.distillation_temperature,
                direction=args.distillation_direction,
                reduction="sum",
            )
        return {"loss": loss}

    def norm(self, states: AlignedStates) -> dict[str, torch.Tensor]:
        lengths = self._speech_lengths(states.batch)
        terms = scale_penalty(self._speech_tokens(states), lengths, self.text_mean_square)
        return {name: value.sum() for name, value in terms.items()}

    @torch.no_grad()
    def held_out(self, dataset: AlignmentItems) -> dict[str, float]:
        """`loss_<term>`: the mean over all its items in `dataset`."""
        trainer, names = self.trainer, list(self.weights)
        total = torch.zeros(2, len(names), dtype=torch.float64)
        for batch in trainer.eval_batches(dataset):
            batch = trainer.on_device(batch)
            states = trainer.aligned_states(trainer.headless, batch, [])
            losses = [getattr(self, name)(states)["loss"].item() for name in names]
            counts = [int(self._count(name, batch, HELD_OUT)) for name in names]
            if batch["weight"]:  # else a stand-in, which ran only because other processes may wait for it
                total += torch.tensor([losses, counts], dtype=torch.float64)
        if trainer.args.world_size > 1:
            total = trainer.accelerator.reduce(total.to(trainer.args.device)).cpu()
        means = total[0] / total[1].clamp(min=1)
        return {f"loss_{name}": mean for name, mean in zip(names, means.tolist())}

    def _cross_entropy(self, prompt: Prompt, speech_tokens: torch.Tensor) -> torch.Tensor:
        """Sum over the prompt's labels; the head runs on no other position."""
        states, labels = self._answer_states(prompt, speech_tokens), prompt["labels"][:, 1:]
        speechllm = self.trainer.speechllm
        with self.trainer.accelerator.autocast():
            head = lambda hidden: speechllm.compute_logits(hidden[None])[0]  # noqa: E731
            return next_token_loss(states, labels[labels != IGNORED], head, reduction="sum")

    def _speech_tokens(self, states: AlignedStates) -> torch.Tensor:
        lengths = torch.tensor(self._speech_lengths(states.batch))
        items = torch.arange(len(lengths)).repeat_interleave(lengths)
        return require_finite(states.speech_tokens, items, "speech tokens")

    def _answer_states(self, prompt: Prompt, speech_tokens: torch.Tensor | None) -> torch.Tensor:
        """(labels, dim): the final hidden states that predict the prompt's labels, after speech or, with `None`, text."""
        headless, attention_mask = self.trainer.headless, prompt["attention_mask"]
        if headless.training:
            self.trainer.llm_tokens += int(attention_mask.sum())
        with self.trainer.accelerator.autocast():
            hidden = headless(
                prompt["input_ids"], speech_tokens=speech_tokens, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        predicting = prompt["labels"][:, 1:] != IGNORED
        side = "LLM's states after the transcripts" if speech_tokens is None else "LLM's states after the speech"
        return require_finite(hidden[:, :-1][predicting], predicting.nonzero()[:, 0], side)


def require_finite(states: torch.Tensor, items: torch.Tensor, name: str) -> torch.Tensor:
    """`states`, (states, dim), unchanged.

    Args:
        states: of a batch, or of a chunk of it (`gradcache_chunk`), whose items then count from 0.
        items: (states,), the batch item that each belongs to.
        name: what they are.

    Raises:
        ValueError: if any is NaN or infinite, naming the batch items.
    """
    finite = states.detach().isfinite().all(-1)
    if not finite.all():
        broken = items.to(finite.device)[~finite].unique().tolist()
        raise ValueError(
            f"The {name} of items {broken} of the batch hold NaN or infinity. Check these items' audio and text, or lower "
            "the learning rate."
        )
    return states


def _named_words(row: Row, segment_frames: list[int], **options: Any) -> tuple[str, list[WordSpan]]:
    return row["id"], word_spans(row, segment_frames, **options)


def _distilled(
    row: Row, segment_frames: list[int], prompt: FurtherInput, instruction: str | None, processor: SpeechLLMProcessor
) -> Prompt:
    """A prompt of the row, or, with an instruction, of the row whose answer is its transcript."""
    row = row if instruction is None else {**row, "prompt": instruction, "target": row["text"]}
    return prompt(row, segment_frames, processor=processor)
