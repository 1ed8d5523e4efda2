"""Task-independent contrastive pretraining (arXiv 2412.15712, Section 3).

1. The projected speech runs through the frozen LLM (gradients flow back through it into the projector), and so does the
   transcript (no gradient: the LLM is frozen, so this side is a constant of the data and may come from a cache).
2. At each chosen layer an InfoNCE loss pulls each utterance to its transcript and away from the others of the batch.
3. As training goes, held-out retrieval per layer tells whether the LLM hears what was said.

Only the headless model runs, no layer beyond the last one used, and with `layers="emb"` no LLM at all. On several
processes the loss is that of the whole global batch. `grad_cache.py` has batches larger than fit at once, `negatives.py`
negatives from beyond the batch, `learned_scalars.py` what of the loss itself can be learned.
"""

import inspect
import random
import time
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import speed_metrics

from ..data.items import AlignmentItems
from ..data.prompts import shared_prefix
from ..data.schema import Row
from ..data.splits import words_of
from ..evaluation.retrieval import retrieval_metrics
from ..objectives import (
    info_nce,
    layerwise_contrastive_loss,
    parse_layer_schedule,
    parse_layer_weights,
)
from ..objectives.gathering import several_processes
from ..objectives.layers import SIMILARITIES, Similarity, mean_pooled
from .aligned_states import AlignedStates, Objective, first_items, pool
from .base import SpeechLLMTrainer
from .contrastive_config import ContrastiveArguments
from .dashboards import AlignmentFigures
from .frozen_states import fill_text_state_cache, text_state_cache
from .grad_cache import split_batch, two_pass_backward
from .held_out import Tokens, held_out_matrices, padded, tokens_of
from .learned_scalars import LearnedScalars
from .negatives import FurtherNegatives
from .objective_terms import ObjectiveTerms


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
        self.layer_weights = {}
        if args.layer_weights not in (None, "learned"):
            self.layer_weights = parse_layer_weights(args.layer_weights, len(headless.llm_layers))
            if unknown := sorted(set(self.layer_weights) - set(self.all_layers)):
                raise ValueError(
                    f"layer_weights names layer {unknown[0]}, which is not aligned; {self.all_layers} are."
                )
        self.terms = ObjectiveTerms(self, model, args)
        self.own_objectives = objectives or {}
        self.objectives = {**self.terms.objectives(), **self.own_objectives}
        # Without them the speech tokens are all that is computed.
        self.needs_states = bool(args.contrastive_weight or objectives)
        if args.contrastive_weight:
            self.objectives = {"contrastive": (args.contrastive_weight, self._contrastive), **self.objectives}
        if not self.objectives:
            raise ValueError("There is nothing to minimise: contrastive_weight is 0, and so are the others.")
        self.prefix = shared_prefix(args.prefix, processing_class)
        self.text_states = None
        if args.text_state_cache:
            trained = any(parameter.requires_grad for parameter in headless.language_model.parameters())  # LoRA, say
            if trained or headless.config.frozen_in_train_mode:
                raise ValueError("text_state_cache needs an LLM that is frozen and in evaluation mode.")
            self.text_states = text_state_cache(
                args.text_state_cache,
                headless,
                processing_class.tokenizer,
                self.prefix,
                self.all_layers,
                self.pooled,
                args.mixed_precision,
            )
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.text_states is not None and self.needs_states and self.all_layers[-1] > 0:
            self.llm_tokens += self._cached_text_tokens()
        # Every objective is divided by a count of its own; `Trainer` then divides by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        language_model = self.headless.language_model
        if args.position_shift and "position_ids" not in inspect.signature(language_model.forward).parameters:
            raise ValueError(f"position_shift: {type(language_model).__name__} takes no positions. Leave it out.")
        learned_layers = self.all_layers if args.layer_weights == "learned" else []
        self.scalars = None
        if args.temperature_learned or learned_layers:
            self.scalars = LearnedScalars(args.temperature if args.temperature_learned else None, learned_layers, self)
            self.add_callback(self.scalars)
        if args.log_figures:
            self.add_callback(AlignmentFigures(self))
        self.further_negatives = None
        if self.train_rows and (args.text_bank or args.hard_negatives):
            keys = [self.batch_key(row) for row in self.train_rows]
            self.further_negatives = FurtherNegatives(self.train_rows, keys, self.text_states, args, self.all_layers)

    def trained_module(self, model):
        return getattr(model, "model", model)

    def check_processes(self) -> None:
        super().check_processes()
        if self.args.gradcache_chunk and self.is_deepspeed_enabled:
            raise ValueError(
                "gradcache_chunk runs several backward passes per step, which DeepSpeed does not allow: use DDP."
            )
        self.terms.prepare()
        self._refuse_single_pairs()

    def _refuse_single_pairs(self) -> None:
        """
        Raises:
            ValueError: if the contrastive loss would see one pair at a time, of which nothing can be learned.
        """
        batch = self.args.per_device_train_batch_size * (self.args.world_size if self.args.gather_negatives else 1)
        beyond = self.args.symmetric and (self.args.text_bank or self.args.hard_negatives)
        if self.args.contrastive_weight and batch < 2 and not beyond:
            raise ValueError(
                "The contrastive loss compares the pairs of a batch, and gradient accumulation adds none: "
                "per_device_train_batch_size is 1. Raise it (gradcache_chunk=1 keeps the memory of one)."
            )

    def items(self, rows: list[Row]) -> AlignmentItems:
        """Speech and transcripts of `rows`; the cache of text states, if there is one, is filled first."""
        items = AlignmentItems(
            rows,
            self.processing_class,
            self.frames,
            self.context,
            prefix=self.prefix,
            text_states=self.text_states,
            further=self.terms.further(rows),
        )
        if self.text_states is not None:
            precision = self.args.mixed_precision
            with self.computing(self.headless.language_model):
                fill_text_state_cache(self.text_states, items, self.headless, self.all_layers, self.pooled, precision)
        return items

    @property
    def context(self) -> float:
        """Tokens that an item may have: any number where no layer of the LLM reads it."""
        reads = self.all_layers[-1] > 0 or self.terms.reading
        return self.headless.config.context if reads else inf

    def _cached_text_tokens(self) -> int:
        """This process's share of what filling the cache with the training transcripts costs, had it been empty: a run
        counts the same whether or not an earlier one has paid."""
        texts = sorted({row["text"] for row in self.train_rows})[self.args.process_index :: self.args.world_size]
        ids = self.processing_class.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return sum(len(self.prefix) + len(text) for text in ids)

    def problem(self, row: Row) -> str | None:
        """A missing transcript, one too long for the cache of its states, or what a further term has against the row."""
        if not (isinstance(row.get("text"), str) and row["text"].strip()):
            return f"{row['id']} has no `text`. Give its transcript."
        # Without the cache, items tell. A token has a byte at least.
        if self.text_states is not None and len(self.prefix) + len(row["text"].encode()) > self.context:
            ids = self.processing_class.tokenizer(row["text"], add_special_tokens=False).input_ids
            if len(self.prefix) + len(ids) > self.context:
                return (
                    f"{row['id']} takes more tokens than the {self.context:,} of the LLM's context. Cut its text, or leave "
                    "it out."
                )
        return self.terms.problem(row)

    def batch_key(self, row: Row) -> str:
        """The transcript's words, without case and punctuation: equal ones would be false negatives."""
        return " ".join(words_of(row["text"])) or row["text"]

    def layers_at(self, step: int) -> list[int]:
        """Layers that the schedule aligns at optimiser step `step`."""
        return [layers for start, layers in self.schedule if start <= step][-1]

    def layer_weights_at(self, step: int, layers: list[int]) -> dict[int, float | torch.Tensor]:
        """Weight of each layer at optimiser step `step`."""
        weights: dict[int, float | torch.Tensor] = {layer: self.layer_weights.get(layer, 1.0) for layer in layers}
        if self.scalars is not None:
            weights.update(self.scalars.weights(layers))
        return {layer: weight * self._ramp(layer, step) for layer, weight in weights.items()}

    def _ramp(self, layer: int, step: int) -> float:
        """1, or less while the layer is new: `layer_ramp` steps from where the schedule adds it."""
        begun = 0
        for (_, before), (start, layers) in pairwise(self.schedule):
            if start <= step and layer in layers and layer not in before:
                begun = start
        return min(1.0, (step - begun + 1) / self.args.layer_ramp) if begun and self.args.layer_ramp else 1.0

    @property
    def keys_differ_between_processes(self) -> bool:
        """Equal transcripts must not meet in one loss."""
        return self.args.gather_negatives

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
                input_ids=batch["text_input_ids"],
                attention_mask=batch["text_attention_mask"],
                layers=layers,
                **self._positions_of(batch["text_input_ids"]),
            )
        return output.layer_states, mask

    def _positions_of(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`position_ids`, where training shifts them: the same for both sides, another shift in every step."""
        if not self.args.position_shift or not self.headless.training:
            return {}
        shift = random.Random(f"shift {self.args.seed} {self.state.global_step}").randrange(self.args.position_shift)
        positions = torch.arange(shift, shift + input_ids.shape[1], device=input_ids.device)
        if len(positions) + shift > (limit := self.headless.config.context):
            raise ValueError(
                f"position_shift moves {len(positions)} tokens by {shift}, but this LLM has {limit} positions. Lower it."
            )
        return {"position_ids": positions.expand(input_ids.shape)}

    def aligned_states(
        self,
        model: torch.nn.Module,
        batch: dict[str, Any],
        layers: list[int],
        text_side: tuple[dict[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> AlignedStates:
        """Both sides' states of a batch at `layers`; the text side without gradient, and not computed where it is given.
        Without layers, just the speech tokens."""
        text, text_mask = text_side or self._text_side(batch, layers)
        names = ("input_ids", "attention_mask", *(name for name in batch if name.startswith(("input_", "speech_"))))
        inputs = {name: batch[name] for name in dict.fromkeys(names)}
        output = model(**inputs, **self._positions_of(batch["input_ids"]), layers=layers)
        return AlignedStates(
            text=text,
            text_mask=text_mask,
            speech=output.layer_states,
            speech_mask=self._mask(batch["attention_mask"].clone()),
            speech_tokens=output.speech_tokens,
            batch=batch,
            model=model,
        )

    # ---- training --------------------------------------------------------------------------------------------------

    def _temperature(self) -> float | torch.Tensor:
        learned = self.scalars.log_temperature if self.scalars is not None else None
        return self.args.temperature if learned is None else learned.exp()

    @property
    def _gathers(self) -> bool:
        return self.args.gather_negatives and several_processes()

    def _contrastive(self, states: AlignedStates) -> dict[str, torch.Tensor]:
        """The contrastive term of a training batch."""
        step, layers = self.state.global_step, list(states.speech)
        if self._gathers and not states.batch["weight"]:  # nobody's negative: it stands in for what cannot be used
            states = first_items(states, 0)
        weights, temperature = self.layer_weights_at(step, layers), self._temperature()
        extra_texts = None
        if self.further_negatives is not None and (extra_texts := self.further_negatives(states, step, self._gathers)):
            self.record({"extra_texts": float(len(extra_texts.mask))})
        terms = layerwise_contrastive_loss(
            states.text,
            states.text_mask,
            states.speech,
            states.speech_mask,
            similarity=self.similarity,
            temperature=temperature,
            layer_weights=weights,
            symmetric=self.args.symmetric,
            gather=self._gathers,
            extra_texts=extra_texts,
        )
        if self.scalars is not None:
            price = [self._ramp(l, step) * s / 2 for l, s in self.scalars.log_variances.items() if l in layers]  # noqa: E741
            terms["loss"] = terms["loss"] + sum(price)
            if self.args.temperature_learned:
                terms["temperature"] = temperature
        if self.args.layer_weights or self.args.layer_ramp:
            terms.update({f"weight_layer_{layer}": torch.as_tensor(weight) for layer, weight in weights.items()})
        return terms

    def get_batch_samples(self, *args: Any):
        batches, _ = super().get_batch_samples(*args)
        return batches, self.terms.counts(batches)

    def _term(
        self, name: str, states: AlignedStates, counts: dict[str, torch.Tensor], share: float = 1.0
    ) -> torch.Tensor:
        """A weighted term of the loss, recorded; `counts`: of what `ObjectiveTerms` sum; `share`: of the batch that the
        states are."""
        factor, objective = self.objectives[name]
        # A gathered loss is the same on every process, whatever could not be used on one of them.
        weight = 1.0 if name == "contrastive" and self._gathers else states.batch["weight"]
        terms = dict(objective(states))
        value = terms.pop("loss")
        times = recorded = weight * share
        if name in counts:  # as much as this sum adds to the mean, of which other batches and chunks may add the rest
            times, recorded = weight / counts[name], share
        group = "loss" if name == "contrastive" else f"loss_{name}"
        plain = {
            part: terms.pop(part) for part in list(terms) if name == "contrastive" and not part.startswith("layer")
        }
        named = {f"loss_{name}": value, **{f"{group}_{part}": v for part, v in terms.items()}, **plain}
        self.record({part: v * times for part, v in named.items()}, recorded)
        return factor * times * value

    def _prepared(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """The batch on its device, and the layers to align."""
        batch = self.on_device(inputs)
        layers = self.layers_at(self.state.global_step) if self.needs_states else []
        if max(layers, default=0) > 0:
            self.llm_tokens += int(batch["attention_mask"].sum())
            self.llm_tokens += 0 if "text_states" in batch else int(batch["text_attention_mask"].sum())
        return batch, layers

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch, layers = self._prepared(inputs)
        states = self.aligned_states(model, batch, layers)
        counts = self.terms.counts([batch]) if num_items_in_batch is None else num_items_in_batch
        loss = sum(self._term(name, states, counts) for name in self.objectives)
        return (loss, states) if return_outputs else loss

    # ---- large batches ---------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.args.gradcache_chunk or "contrastive" not in self.objectives:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if hasattr(self.optimizer, "train"):  # schedule-free optimisers
            self.optimizer.train()
        batch, layers = self._prepared(inputs)
        chunks = split_batch(batch, self.args.gradcache_chunk, self.headless.config)
        used, planned = len(chunks), -(-self._train_batch_size // self.args.gradcache_chunk)
        # Some utterances could not be used.
        chunks += [{**chunks[-1], "weight": 0.0, "counts": False}] * (planned - used)
        with self.compute_loss_context_manager():
            text_sides = [self._text_side(chunk, layers) for chunk in chunks]
        chunks = [{**chunk, "text_side": text_side} for chunk, text_side in zip(chunks, text_sides)]
        share = 1 / self.current_gradient_accumulation_steps
        counts = self.terms.counts([batch]) if num_items_in_batch is None else num_items_in_batch
        further = [name for name in self.objectives if name != "contrastive"]

        def encode(chunk: dict[str, Any]) -> AlignedStates:
            with self.compute_loss_context_manager():
                return self.aligned_states(model, chunk, layers, chunk["text_side"])

        def states_of(states: AlignedStates) -> list[torch.Tensor]:
            return list((pool(states) if self.pooled else states).speech.values())

        def whole_loss(speech: list[torch.Tensor]) -> torch.Tensor:
            mask = self._mask(batch["attention_mask"].clone())
            sides = [mean_pooled(*side) if self.pooled else side for side in text_sides[:used]]
            states = AlignedStates(
                text={layer: torch.cat([side[0][layer] for side in sides]) for layer in layers},
                text_mask=torch.cat([side[1] for side in sides]),
                speech=dict(zip(layers, speech)),
                speech_mask=mask.new_ones(len(mask), 1) if self.pooled else mask,
                speech_tokens=speech[0].new_empty(0),
                batch=batch,
                model=model,
            )
            return share * self._term("contrastive", states, counts)

        def further_terms(states: AlignedStates) -> torch.Tensor:
            part = states.batch.get("counts", True) * len(states.speech_mask) / len(batch["input_ids"])
            return share * sum(self._term(name, states, counts, part) for name in further)

        scaler = self.accelerator.scaler
        return two_pass_backward(
            chunks,
            encode,
            states_of,
            whole_loss,
            further_terms if further else None,
            used=used,
            scale=scaler.scale if scaler is not None else lambda value: value,
            no_sync=partial(self.accelerator.no_sync, model),
        )

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _own_state(self) -> list[LearnedScalars | FurtherNegatives]:
        return [state for state in (self.scalars, self.further_negatives) if state is not None]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for state in self._own_state():
            if self.args.should_save:
                state.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for state in self._own_state():
            if checkpoint is not None:
                state.load(checkpoint)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _held_out_tokens(
        self, dataset: AlignmentItems
    ) -> tuple[dict[int, Tokens], dict[int, Tokens], dict[str, float]]:
        """Tokens of this process's share of the texts and utterances by place in `dataset` (one token, the mean, where the
        similarity is cosine); and of all processes' the mean of each objective that was passed, as `loss_<name>`."""
        texts, utterances, sums = {}, {}, torch.zeros(len(self.own_objectives) + 1, dtype=torch.float64)
        self.headless.eval()
        for batch in self.eval_batches(dataset):
            batch = self.on_device(batch)
            with self.accelerator.autocast():  # in training, `Trainer` sees to it
                states = self.aligned_states(self.headless, batch, self.all_layers)
                losses = [float(objective(states)["loss"]) for _, objective in self.own_objectives.values()]
            if not batch["weight"]:  # a stand-in, which ran only because other processes may wait for it
                continue
            sums += len(batch["rows"]) * torch.tensor([*losses, 1.0], dtype=torch.float64)
            states = pool(states) if self.pooled else states
            texts.update(zip(batch["rows"], tokens_of(states.text, states.text_mask)))
            utterances.update(zip(batch["rows"], tokens_of(states.speech, states.speech_mask)))
        if self.args.world_size > 1:
            texts = dict(gather_object(list(texts.items())))
            sums = self.accelerator.reduce(sums.to(self.args.device)).cpu()
        if not texts:
            raise ValueError(f"None of the {len(dataset)} utterances to evaluate on can be used; see `set_aside`.")
        means = (sums[:-1] / sums[-1]).tolist()
        return texts, utterances, {f"loss_{name}": mean for name, mean in zip(self.own_objectives, means)}

    def _evaluated(self, rows: list[Row] | None) -> AlignmentItems:
        dataset = self.eval_dataset if rows is None else self.items(self._usable(rows))
        if dataset is None:
            raise ValueError("There is nothing to evaluate on: give `eval_dataset`.")
        return dataset

    def held_out_states(self, rows: list[Row] | None = None) -> tuple[list[Row], AlignedStates]:
        """The evaluation rows that could be used, and their states at all layers of the schedule, in float32 on the CPU
        (pooled to one token where the similarity is cosine).

        Raises:
            ValueError: if there are no rows, or none of them can be used.
        """
        dataset = self._evaluated(rows)
        texts, utterances, _ = self._held_out_tokens(dataset)
        if self.args.world_size > 1:
            utterances = dict(gather_object(list(utterances.items())))
        order = sorted(texts)
        (text, text_mask), (speech, speech_mask) = (padded([side[i] for i in order]) for side in (texts, utterances))
        text, speech = ({layer: state.float() for layer, state in side.items()} for side in (text, speech))
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
        With further terms, `<prefix>_loss_<term>` too, and `<prefix>_loss` is the weighted sum. (Layers weigh alike.)

        Raises:
            ValueError: if there is nothing to evaluate on, or a similarity is not finite, naming the rows.
        """
        start = time.time()
        dataset = self._evaluated(eval_dataset)
        texts, utterances, own_terms = self._held_out_tokens(dataset)
        rows = [dataset.rows[i] for i in sorted(texts)]
        self.held_out_rows, texts_of_rows = rows, [self.batch_key(row) for row in rows]
        self.held_out_similarity = held_out_matrices(
            self.similarity, texts, utterances, self.args.device, self.args.world_size
        )
        metrics: dict[str, float] = {"loss": 0.0}
        for layer, matrix in self.held_out_similarity.items():
            if broken := [row["id"] for row, good in zip(rows, matrix.diagonal().isfinite().tolist()) if not good]:
                raise ValueError(
                    f"The similarities of held-out pairs at layer {layer} are not finite: {broken[:5]}. Check these "
                    "items' audio and text, or lower the learning rate."
                )
            loss = info_nce(matrix, temperature=float(self._temperature()), symmetric=self.args.symmetric).item()
            metrics["loss"] += loss
            metrics[f"loss_layer_{layer}"] = loss
            for name, value in retrieval_metrics(matrix, texts_of_rows).items():
                metrics[f"{name}_layer_{layer}"] = value
        self.held_out_recall = {layer: metrics[f"recall@1_layer_{layer}"] for layer in self.held_out_similarity}
        for name in ("recall@1", "recall@5"):
            values = [value for key, value in metrics.items() if key.startswith(f"{name}_layer")]
            metrics[f"{name}_mean"] = sum(values) / len(values)
        weights = self.terms.weights | {name: weight for name, (weight, _) in self.own_objectives.items()}
        if weights:
            metrics["loss_contrastive"] = metrics["loss"]
            metrics.update(own_terms)
            if self.terms.weights:
                metrics.update(self.terms.held_out(self.eval_dataset if eval_dataset is None else self.items(rows)))
            metrics["loss"] = self.args.contrastive_weight * metrics["loss"] + sum(
                weight * metrics[f"loss_{name}"] for name, weight in weights.items()
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(rows)))
        self.write_set_aside()
        self.log(metrics)
        self.note_training()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
