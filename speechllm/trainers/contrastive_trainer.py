"""Task-independent contrastive pretraining (arXiv 2412.15712, Section 3).

1. The projected speech runs through the frozen LLM (gradients flow back through it into the projector), and so does the
   transcript (no gradient: the LLM is frozen, so this side is a constant of the data and may come from a cache).
2. At each chosen layer an InfoNCE loss pulls each utterance to its transcript and away from the others of the batch.
3. As training goes, held-out retrieval per layer tells whether the LLM hears what was said.

Only the headless model runs, no layer beyond the last one used, and with `layers="emb"` no LLM at all.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_utils import speed_metrics

from ..data.items import AlignmentItems
from ..data.schema import Row
from ..data.splits import words_of
from ..evaluation.retrieval import retrieval_metrics
from ..objectives import layerwise_contrastive_loss, masked_mean, parse_layer_schedule
from ..objectives.layers import SIMILARITIES, Similarity
from .base import SpeechLLMTrainer
from .contrastive_config import ContrastiveArguments
from .frozen_states import fill_text_state_cache, text_state_cache


@dataclass(frozen=True)
class AlignedStates:
    """What an objective sees of a batch.

    text, speech: layer -> (batch, length, dim); text_mask, speech_mask: (batch, length), `True` = counts (the shared
    prefix and padding do not). speech_tokens: (all speech tokens of the batch, dim), the projector's output. batch: the
    model inputs. model: the module under training, for objectives that need a pass of their own.
    """

    text: dict[int, torch.Tensor]
    text_mask: torch.Tensor
    speech: dict[int, torch.Tensor]
    speech_mask: torch.Tensor
    speech_tokens: torch.Tensor
    batch: dict[str, Any]
    model: torch.nn.Module


# An objective returns `loss` and any named parts of it; each is normalised by itself, over its own items.
Objective = Callable[[AlignedStates], dict[str, torch.Tensor]]


def shared_prefix(prefix: str, processor) -> list[int]:
    """Token ids of the setting `prefix` (see `ContrastiveArguments`).

    Raises:
        ValueError: if the LLM has nothing of the kind that the setting names.
    """
    tokenizer = processor.tokenizer
    if prefix == "bos":
        if tokenizer.bos_token is None:
            raise ValueError("prefix is 'bos', but this LLM's tokenizer has no such token; use 'auto' or a text.")
        prefix = tokenizer.bos_token
    elif prefix == "auto":
        # What a later user turn adds to a chat, up to its content: free of default system messages.
        turns = [{"role": "user", "content": "HELLO"}, {"role": "assistant", "content": "ANSWER"}]
        closing = processor.apply_chat_template(turns).rpartition("ANSWER")[2]
        chat = processor.apply_chat_template([*turns, {"role": "user", "content": "QUESTION"}])
        opening = chat.rpartition("QUESTION")[0].rpartition("ANSWER")[2].removeprefix(closing)
        bos = tokenizer.bos_token or ""
        prefix = opening if opening.startswith(bos) else bos + opening
        if not prefix:
            raise ValueError(
                "prefix is 'auto', but this LLM's chat template opens user turns with nothing; give a text."
            )
    return tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []


class ContrastiveTrainer(SpeechLLMTrainer):
    """Contrastive pretraining of a SpeechLLM's projector on (audio, text) rows.

    Args:
        model, args, train_dataset, eval_dataset, processing_class: see `SpeechLLMTrainer`; rows need `text`.
        similarity: a function `(text, text_mask, speech, speech_mask) -> (B, B)` instead of `args.similarity`.
        objectives: further terms of the loss, name -> (weight, objective).
    """

    args: ContrastiveArguments

    def __init__(
        self,
        model,
        args: ContrastiveArguments,
        train_dataset: list[Row] | None = None,
        eval_dataset: list[Row] | None = None,
        processing_class=None,
        similarity: Similarity | None = None,
        objectives: dict[str, tuple[float, Objective]] | None = None,
        **kwargs: Any,
    ):
        headless = getattr(model, "model", model)
        layers = args.layers.replace(" ", ",")
        self.schedule = parse_layer_schedule(args.layer_schedule or f"0:{layers}", len(headless.llm_layers))
        self.all_layers = sorted({layer for _, layers in self.schedule for layer in layers})
        if similarity is None and args.similarity not in SIMILARITIES:
            raise ValueError(
                f"similarity is {args.similarity!r}; use one of {sorted(SIMILARITIES)} or pass a function."
            )
        self.similarity = similarity or SIMILARITIES[args.similarity]
        self.pooled = self.similarity is SIMILARITIES["cosine"]  # pooled states say all that cosine needs to know
        contrastive = partial(self._contrastive, temperature=args.temperature, symmetric=args.symmetric)
        self.objectives = {"contrastive": (1.0, contrastive), **(objectives or {})}
        self.prefix = shared_prefix(args.prefix, processing_class)
        self.text_states = None
        if args.text_state_cache:
            if not headless.config.freeze_language_model or headless.config.frozen_in_train_mode:
                raise ValueError("text_state_cache needs an LLM that is frozen and in evaluation mode.")
            self.text_states = text_state_cache(
                args.text_state_cache,
                headless,
                len(processing_class.tokenizer),
                self.prefix,
                self.all_layers,
                self.pooled,
            )
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        # Every objective is a mean of its own; `Trainer` then divides by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def trained_module(self, model):
        return getattr(model, "model", model)

    def items(self, rows: list[Row]) -> AlignmentItems:
        items = AlignmentItems(
            rows, self.processing_class, self.frames, prefix=self.prefix, text_states=self.text_states
        )
        if self.text_states is not None:
            fill_text_state_cache(self.text_states, items, self.headless, self.all_layers, self.pooled)
        return items

    def problem(self, row: Row) -> str | None:
        has_text = isinstance(row.get("text"), str) and row["text"].strip()
        return None if has_text else f"{row['id']} has no `text`. Give its transcript."

    def batch_key(self, row: Row) -> str:
        return " ".join(words_of(row["text"])) or row["text"]

    def layers_at(self, step: int) -> list[int]:
        """Layers that the schedule aligns at optimiser step `step`."""
        return [layers for start, layers in self.schedule if start <= step][-1]

    # ---- states ----------------------------------------------------------------------------------------------------

    def _mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.bool()
        mask[:, : len(self.prefix)] = False
        return mask

    def _text_side(self, batch: dict[str, Any], layers: list[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        mask = self._mask(batch["text_attention_mask"].clone())
        if "text_states" in batch:
            states = {layer: batch["text_states"][f"layer_{layer}"] for layer in layers}
            return states, mask.new_ones(len(mask), 1) if self.pooled else mask[:, len(self.prefix) :]
        with torch.no_grad():
            output = self.headless(
                input_ids=batch["text_input_ids"], attention_mask=batch["text_attention_mask"], layers=layers
            )
        return output.layer_states, mask

    def aligned_states(self, model: torch.nn.Module, batch: dict[str, Any], layers: list[int]) -> AlignedStates:
        """Both sides' states of a batch at `layers`; the text side without gradient."""
        text, text_mask = self._text_side(batch, layers)
        names = ("input_ids", "attention_mask", *(name for name in batch if name.startswith(("input_", "speech_"))))
        inputs = {name: batch[name] for name in dict.fromkeys(names)}
        output = model(**inputs, layers=layers)
        return AlignedStates(
            text=text,
            text_mask=text_mask,
            speech=output.layer_states,
            speech_mask=self._mask(batch["attention_mask"].clone()),
            speech_tokens=output.speech_tokens,
            batch=inputs,
            model=model,
        )

    # ---- training --------------------------------------------------------------------------------------------------

    def _contrastive(self, states: AlignedStates, **options: Any) -> dict[str, torch.Tensor]:
        return layerwise_contrastive_loss(
            states.text, states.text_mask, states.speech, states.speech_mask, similarity=self.similarity, **options
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self.on_device(inputs)
        weight = batch["weight"]
        layers = self.layers_at(self.state.global_step)
        states = self.aligned_states(model, batch, layers)
        if max(layers) > 0:
            self.llm_tokens += int(batch["attention_mask"].sum())
            self.llm_tokens += 0 if "text_states" in batch else int(batch["text_attention_mask"].sum())
        loss = 0.0
        for name, (factor, objective) in self.objectives.items():
            terms = dict(objective(states))
            value = terms.pop("loss")
            loss = loss + factor * value
            group = "loss" if name == "contrastive" else f"loss_{name}"
            self.record({f"loss_{name}": value, **{f"{group}_{part}": v for part, v in terms.items()}}, weight)
        loss = loss * weight
        return (loss, states) if return_outputs else loss

    # ---- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out_states(self, rows: list[Row] | None = None) -> tuple[list[Row], AlignedStates]:
        """The evaluation rows that could be used, and their states at all layers of the schedule, on the CPU (pooled to
        one token where the similarity is cosine)."""
        dataset = self.eval_dataset if rows is None else self.items(self._usable(rows))
        if dataset is None:
            raise ValueError("There is nothing to evaluate on: give `eval_dataset`.")
        self.headless.eval()
        found: dict[int, dict[str, tuple[dict[int, torch.Tensor], torch.Tensor]]] = {}
        for batch in self.eval_batches(dataset):
            batch = self.on_device(batch)
            if not batch["weight"]:
                continue
            states = self.aligned_states(self.headless, batch, self.all_layers)
            if self.pooled:
                states = pool(states)
            for i, row in enumerate(batch["rows"]):
                found[row] = {
                    side: ({l: s[i].float().cpu() for l, s in values.items()}, mask[i].cpu())  # noqa: E741
                    for side, values, mask in (
                        ("text", states.text, states.text_mask),
                        ("speech", states.speech, states.speech_mask),
                    )
                }
        if self.args.world_size > 1:
            found = dict(gather_object(list(found.items())))
        if not found:
            raise ValueError(f"None of the {len(dataset)} utterances to evaluate on can be used; see `set_aside`.")
        order = sorted(found)

        def stacked(side: str) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
            masks = pad_sequence([found[row][side][1] for row in order], batch_first=True)
            states = {
                layer: pad_sequence([found[row][side][0][layer] for row in order], batch_first=True)
                for layer in self.all_layers
            }
            return states, masks

        (text, text_mask), (speech, speech_mask) = stacked("text"), stacked("speech")
        states = AlignedStates(text, text_mask, speech, speech_mask, torch.empty(0), {}, self.headless)
        return [dataset.rows[row] for row in order], states

    def similarity_matrices(self, states: AlignedStates) -> dict[int, torch.Tensor]:
        """Layer -> (texts, utterances) similarity of held-out states."""
        return {
            layer: self.similarity(states.text[layer], states.text_mask, states.speech[layer], states.speech_mask)
            for layer in states.text
        }

    def evaluate(
        self, eval_dataset: list[Row] | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out retrieval per layer over the whole evaluation set, and the contrastive loss with all of it as one
        batch. Metrics are `<prefix>_recall@1_layer_<l>`, `..._recall@5_...`, `..._mean` over layers, and `<prefix>_loss`.
        """
        start = time.time()
        rows, states = self.held_out_states(eval_dataset)
        metrics: dict[str, float] = {}
        for layer, matrix in self.similarity_matrices(states).items():
            for name, value in retrieval_metrics(matrix, [self.batch_key(row) for row in rows]).items():
                metrics[f"{name}_layer_{layer}"] = value
        for name in ("recall@1", "recall@5"):
            values = [value for key, value in metrics.items() if key.startswith(f"{name}_layer")]
            metrics[f"{name}_mean"] = sum(values) / len(values)
        terms = self._contrastive(states, temperature=self.args.temperature, symmetric=self.args.symmetric)
        metrics.update({name.replace("layer", "loss_layer"): value.item() for name, value in terms.items()})
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(rows)))
        self.write_set_aside()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def pool(states: AlignedStates) -> AlignedStates:
    """Each side's valid tokens replaced by their mean: lengths become 1."""

    def pooled(values: dict[int, torch.Tensor], mask: torch.Tensor) -> dict[int, torch.Tensor]:
        return {layer: masked_mean(state, mask)[:, None] for layer, state in values.items()}

    one = states.text_mask.new_ones(len(states.text_mask), 1)
    return replace(
        states,
        text=pooled(states.text, states.text_mask),
        speech=pooled(states.speech, states.speech_mask),
        text_mask=one,
        speech_mask=one,
    )
