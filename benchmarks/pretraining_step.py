"""One step of contrastive pretraining as the paper's published code takes it, against ours, saving by saving.

*As published*: everything in training mode; encoder, LLM and LM head run in full over both sides of a random batch, all
hidden states are kept, and the loss goes over sequences (cosine: gather and mean each) or over pairs (Wasserstein: one call
of GeomLoss for every pair and layer) in Python. The savings then add up, each a setting of `ContrastiveTrainer`:

| saving | setting |
|---|---|
| frozen parts in evaluation mode, no LM head, no states that are not asked for | the trainer itself |
| the loss of all pairs at once | `similarity="cosine"`, or the batched Wasserstein distance |
| batches of similar length | `length_window` |
| encoder frames from disk | `feature_cache` |
| states of the transcripts from disk | `text_state_cache` |

All variants see the same utterances and take turns, so that a busy machine slows all of them. A step is forward, backward
and optimiser step on a batch that is ready; decoding audio or reading caches is the data workers' time, reported apart.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from geomloss import SamplesLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import HubertConfig, LlamaConfig, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

from speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from speechllm.objectives import info_nce, layerwise_contrastive_loss
from speechllm.projector_speechllm import SpeechLLMProjector
from speechllm.reproduction.cost import Cost
from speechllm.trainers import ContrastiveArguments, ContrastiveTrainer


TEMPERATURE = 0.1
# Times faster than as published, for the small models; the loss's share of a step and model FLOPs utilisation, at the
# paper's size
TIMES_FASTER = {"cosine": 1.6, "wasserstein": 6.0}
LOSS_SHARE = {"cosine": 0.01, "wasserstein": 0.03}
UTILISATION = 0.5


# ---- models and data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Shapes of randomly initialised models, and of the data."""

    speech: dict[str, Any]
    text: dict[str, Any]
    projector: dict[str, Any] = field(default_factory=dict)  # default: the paper's Q-Former of 42.5 M parameters
    seconds: float = 6.0
    text_tokens: int = 25
    batch_size: int = 20


WAVE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
SCALES = {
    "paper": Scale(  # HuBERT-large and Llama-3.1-8B
        speech=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **WAVE),
        text=dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                  num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=131_072),
    ),
    "tiny": Scale(
        speech=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                    conv_dim=(16, 16, 16), conv_stride=(5, 8, 8), conv_kernel=(10, 8, 8), num_feat_extract_layers=3,
                    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, **WAVE),
        text=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2,
                  num_key_value_heads=1, vocab_size=300),
        projector=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48),
        seconds=0.5,
        text_tokens=8,
        batch_size=4,
    ),
}  # fmt: skip


def random_config(scale: Scale) -> SpeechLLMConfig:
    return SpeechLLMConfig(
        speech_config=HubertConfig(**scale.speech),
        text_config=LlamaConfig(tie_word_embeddings=False, **scale.text),
        projector_config=scale.projector,
        audio_token_id=257,  # of the tokenizer of `random_model`: behind 256 bytes and padding
    )


def random_model(scale: Scale, device: torch.device, dtype: torch.dtype):
    """A model of random weights, made on the device it runs on, and its processor with a byte-level tokenizer."""
    config = random_config(scale)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = SpeechLLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.model.projector.float()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")
    processor = SpeechLLMProcessor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True),
        tokenizer,
        speech_token_rule=config.speech_token_rule.to_dict(),
        context_seconds=config.context_seconds,
    )
    return model, processor


def random_rows(scale: Scale, count: int) -> list[dict[str, Any]]:
    """Noise and letters, of lengths from half to one and a half times the scale's."""
    generator = np.random.default_rng(0)
    rows = []
    for i in range(count):
        share = generator.uniform(0.5, 1.5)
        audio = generator.standard_normal(round(share * scale.seconds * 16_000)).astype(np.float32)
        text = "".join(generator.choice(list("abcdefghijklmnopqrst"), round(share * scale.text_tokens)))
        rows.append({"id": str(i), "audio": audio, "text": text, "duration": share * scale.seconds})
    return rows


def small_model(device: torch.device, dtype: torch.dtype, queries: int):
    """SmolLM2-135M and Whisper tiny.en as in the quick start; queries: per third of a second."""
    from speechllm.quickstart.weights import smollm2_135m_instruct, whisper_tiny_en

    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        str(whisper_tiny_en()),
        str(smollm2_135m_instruct()),
        dtype=dtype,
        attn_implementation="eager",  # the faster one to train with on a CPU
        num_queries=queries,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=1536,
    )
    return model.to(device), SpeechLLMProcessor.from_config(model.config)


def small_rows(count: int) -> list[dict[str, Any]]:
    """Recorded prompts of different texts, at random."""
    from speechllm.quickstart.asterisk_prompts import asterisk_prompts

    rows = {row["text"].lower(): row for row in asterisk_prompts("en") if row["duration"] <= 8}
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [list(rows.values())[i] for i in order]


# ---- the step as published -------------------------------------------------------------------------------------------


def cosine_by_sequence(text, text_mask, speech, speech_mask):
    """The matrix of `cosine_similarity_matrix`, one sequence at a time."""
    pooled = [
        F.normalize(torch.stack([states[i][mask[i]].float().mean(0) for i in range(len(mask))]), dim=-1)
        for states, mask in ((text, text_mask), (speech, speech_mask))
    ]
    return pooled[0] @ pooled[1].T


def wasserstein_by_pair(text, text_mask, speech, speech_mask):
    """Minus the matrix of `wasserstein_distance_matrix`, one pair at a time (GeomLoss, its own diameters)."""
    distance = SamplesLoss("sinkhorn", p=2, blur=0.05)
    text, speech = (F.normalize(states.float(), dim=-1) for states in (text, speech))
    rows = [
        torch.stack([distance(text[i][text_mask[i]], speech[j][speech_mask[j]]) for j in range(len(speech))])
        for i in range(len(text))
    ]
    return -torch.stack(rows)


BY_LOOP = {"cosine": cosine_by_sequence, "wasserstein": wasserstein_by_pair}


def published_loss(model, batch: dict[str, Any], layers: list[int], similarity: Callable) -> torch.Tensor:
    """Both sides through the whole model, head included; the loss at `layers`, in a loop."""
    speech = {name: value for name, value in batch.items() if name.startswith(("input_", "attention_"))}
    heard = model(**speech, output_hidden_states=True)
    read = model(
        input_ids=batch["text_input_ids"], attention_mask=batch["text_attention_mask"], output_hidden_states=True
    )
    masks = batch["text_attention_mask"].bool(), batch["attention_mask"].bool()
    return sum(
        info_nce(similarity(read.hidden_states[l], masks[0], heard.hidden_states[l], masks[1]), temperature=TEMPERATURE)
        for l in layers  # noqa: E741 (the paper's letter)
    )


# ---- variants --------------------------------------------------------------------------------------------------------


class Variant:
    """A way to take a step, with its batches ready.

    trainer: whose settings decide; published: take the step as published, and from the trainer only the batches.
    """

    def __init__(self, name: str, trainer: ContrastiveTrainer, published: Callable | None = None):
        self.name, self.trainer, self.published = name, trainer, published
        start = time.perf_counter()
        self.batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
        self.preparation = (time.perf_counter() - start) / len(self.batches)
        self.padding = 1 - float(np.mean([batch["attention_mask"].float().mean().item() for batch in self.batches]))
        self.optimizer = torch.optim.AdamW(p for p in trainer.speechllm.parameters() if p.requires_grad)
        self.seconds: list[float] = []

    def step(self, index: int) -> float:
        """Seconds of one step."""
        trainer, device = self.trainer, self.trainer.args.device
        batch = dict(self.batches[index])
        trainer.speechllm.config.frozen_in_train_mode = self.published is not None
        trainer.headless.config.frozen_in_train_mode = self.published is not None
        synchronize(device)
        start = time.perf_counter()
        if self.published:
            trainer.speechllm.train()
            published_loss(trainer.speechllm, batch, trainer.all_layers, self.published).backward()
        else:
            trainer.training_step(trainer.model, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_trainer(folder: Path, model, processor, rows, batch_size: int, similarity: str | Callable, **options: Any):
    """similarity: a name that the trainer knows, or a function."""
    if isinstance(similarity, str):
        options["similarity"], similarity = similarity, None
    arguments = ContrastiveArguments(
        output_dir=str(folder / "run"),
        use_cpu=model.device.type == "cpu",
        per_device_train_batch_size=batch_size,
        layers="all",
        prefix="",  # the paper's bare sequences
        temperature=TEMPERATURE,
        save_strategy="no",
        max_steps=1,
        max_grad_norm=0,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = ContrastiveTrainer(model, arguments, rows, None, processor, similarity=similarity)
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it before a step
    return trainer


def make_variants(folder: Path, model, processor, rows, batch_size: int, similarity: str) -> list[Variant]:
    make = partial(make_trainer, folder, model, processor, rows, batch_size)
    plain = {"length_window": 0}
    sort = {"length_window": 100}
    frames = {**sort, "feature_cache": str(folder / "cache")}
    texts = {**frames, "text_state_cache": str(folder / "cache")}
    loop = BY_LOOP[similarity]
    return [
        Variant("as published", make(loop, **plain), published=loop),
        Variant("+ no LM head, needed states only", make(loop, **plain)),
        Variant("+ all pairs at once", make(similarity, **plain)),
        Variant("+ batches of similar length", make(similarity, **sort)),
        Variant("+ encoder frames from disk", make(similarity, **frames)),
        Variant("+ text states from disk", make(similarity, **texts)),
    ]


def take_turns(variants: list[Variant], steps: int) -> None:
    variants[-1].step(0)  # a first step pays for what later ones find ready
    for index in range(steps):
        for variant in variants:
            variant.seconds.append(variant.step(index))
            print(f"\rstep {index + 1} of {steps}: {variant.name:<40}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)


# ---- what a step consists of -----------------------------------------------------------------------------------------


def loss_seconds(variant: Variant, repeats: int = 3) -> float:
    """Median seconds of the contrastive loss alone, forward and backward, on the states of each batch."""
    trainer, seconds = variant.trainer, []
    for batch in variant.batches[:repeats]:
        with torch.no_grad():
            states = trainer.aligned_states(trainer.model, dict(batch), trainer.all_layers)
        speech = {layer: state.detach().requires_grad_() for layer, state in states.speech.items()}
        synchronize(trainer.args.device)
        start = time.perf_counter()
        loss = layerwise_contrastive_loss(
            states.text, states.text_mask, speech, states.speech_mask, similarity=trainer.similarity
        )
        loss["loss"].backward()
        synchronize(trainer.args.device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def matrix_product_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP per second of a large matrix product: the most that a step could reach."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def counted_flops(variant: Variant) -> int:
    """Floating-point operations of the matrix products and convolutions of the first batch's step."""
    with FlopCounterMode(display=False) as counter:
        variant.step(0)
    return counter.get_total_flops()


def largest_batch(
    folder: Path, model, processor, scale: Scale, similarity: str, most: int, chunk: int, checkpointing: bool
) -> int:
    """The largest batch whose step fits, up to `most` and to about a sixteenth; 0 if a single utterance does not.

    Args:
        chunk: of GradCache, 0 for none.
    """

    def fits(size: int) -> bool:
        options = {"gradcache_chunk": chunk} if chunk else {}
        rows = random_rows(scale, size)
        try:
            Variant(
                "", make_trainer(folder, model, processor, rows, size, similarity, length_window=0, **options)
            ).step(0)
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    if checkpointing:
        model.gradient_checkpointing_enable()
    try:
        low, high = 0, min(scale.batch_size, most)  # the largest known to fit; the next to try
        while high <= most and fits(high):
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()


def flops_by_part(scale: Scale) -> dict[str, float]:
    """Arithmetic, nothing of any size is run: FLOP of each part of a step of `batch_size` utterances of `seconds`, counted
    on tensors without data. The backward pass of the frozen LLM is that of its activations only."""
    config = random_config(scale)
    with torch.device("meta"):
        model = SpeechLLMForConditionalGeneration(config).eval().model
    projector = SpeechLLMProjector(config).window_model
    rule, size = config.speech_token_rule, scale.batch_size
    windows = -(-int(rule.frames(round(scale.seconds * 16_000))) // rule.window)
    tokens, width = windows * rule.tokens_per_window, config.text_config.hidden_size

    def count(run: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_total_flops())

    # Layer by layer, since the models themselves would look into the data to make their masks.
    def encode():
        encoder = model.speech_encoder
        hidden = encoder.feature_extractor(torch.empty(size, round(scale.seconds * 16_000), device="meta"))
        hidden = encoder.feature_projection(hidden.transpose(1, 2))
        hidden = hidden + encoder.encoder.pos_conv_embed(hidden)
        for layer in encoder.encoder.layers:
            hidden = layer(hidden)

    def read(length: int, gradient: bool):
        hidden = torch.empty(size, length, width, device="meta", requires_grad=gradient)
        rotary = model.language_model.rotary_emb(hidden, torch.arange(length, device="meta")[None])
        for layer in model.llm_layers:
            hidden = layer(hidden, position_embeddings=rotary)
        return hidden

    def project():
        return projector(torch.randn(1, rule.window, config.speech_hidden_size), torch.ones(1, rule.window))

    with torch.no_grad():
        encoder, text = count(encode), count(partial(read, scale.text_tokens, gradient=False))
    return {
        "speech encoder, forward": encoder,
        "text side, forward": text,
        "Q-Former, forward": count(project) * size * windows,
        "Q-Former, backward": count(project().sum().backward) * size * windows,
        "speech side, forward": count(partial(read, tokens, gradient=True)),
        "speech side, backward": count(read(tokens, gradient=True).sum().backward),
        "LM head over both sides": 2.0 * size * (tokens + scale.text_tokens) * width * config.text_config.vocab_size,
    }


# ---- report ----------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def summary(variants: list[Variant]) -> list[dict[str, float | str]]:
    totals = [sum(variant.seconds) for variant in variants]
    rows = []
    for i, variant in enumerate(variants):
        rows.append(
            {
                "variant": variant.name,
                "seconds_per_step": totals[i] / len(variant.seconds),
                "times_faster_than_published": totals[0] / totals[i],
                "times_faster_than_line_above": totals[max(i - 1, 0)] / totals[i],
                "preparation_seconds_per_batch": variant.preparation,
                "padding_share": variant.padding,
            }
        )
    return rows


def print_summary(similarity: str, rows: list[dict[str, Any]]) -> None:
    print(f"\ncontr-{'cos' if similarity == 'cosine' else 'wasser'}-all")
    print(f"  {'':<36}{'s/step':>8}{'faster':>8}{'by it':>8}{'s/data':>8}{'padding':>9}")
    for row in rows:
        print(
            f"  {row['variant']:<36}{row['seconds_per_step']:>8.3f}{row['times_faster_than_published']:>7.2f}x"
            f"{row['times_faster_than_line_above']:>7.2f}x{row['preparation_seconds_per_batch']:>8.3f}"
            f"{row['padding_share']:>9.1%}"
        )


def goals(similarity: str, found: dict[str, Any], scale: str) -> dict[str, bool]:
    """What was to be reached at this scale, and whether it was."""
    if scale == "small":
        wanted = TIMES_FASTER[similarity]
        return {f"{wanted}x faster than as published": found["variants"][-1]["times_faster_than_published"] >= wanted}
    share = LOSS_SHARE[similarity]
    return {
        f"loss at most {share:.0%} of a step": found["loss_share"] <= share,
        f"utilisation of {UTILISATION:.0%}": found["model_flops_utilisation"] >= UTILISATION,
    }


def print_flops(parts: dict[str, float]) -> None:
    total = sum(parts.values())
    for name, value in parts.items():
        print(f"  {name:<28}{value / 1e12:>9.3f} TFLOP{value / total:>8.1%}")
    print(f"  {'together':<28}{total / 1e12:>9.3f} TFLOP")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns what is printed."""
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    scale = SCALES.get(options.scale)
    size = options.batch_size or (scale.batch_size if scale else 16)
    if scale is None:
        (model, processor), rows = small_model(device, dtype, options.queries), small_rows(size * options.steps)
    else:
        (model, processor), rows = random_model(scale, device, dtype), random_rows(scale, size * options.steps)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    report: dict[str, Any] = {**machine(device), **settings, "batch_size": size, "similarities": {}}
    ceiling = matrix_product_ceiling(device, dtype)
    report["matrix_product_flop_per_second"] = ceiling
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Both at once, so that the two losses can be compared with each other too.
        groups = {name: make_variants(folder, model, processor, rows, size, name) for name in options.similarity}
        take_turns([variant for group in groups.values() for variant in group], options.steps)
        for name, group in groups.items():
            table, ours = summary(group), group[-1]
            print_summary(name, table)
            ours_alone = loss_seconds(ours)
            flops, seconds = counted_flops(ours), ours.seconds[0]
            with Cost() as cost:
                ours.step(0)
            found = {
                "variants": table,
                "loss_share": ours_alone / table[-1]["seconds_per_step"],
                "flop_per_step": flops,
                "model_flops_utilisation": flops / seconds / ceiling,
                "peak_memory_bytes": cost.measured["peak_memory_bytes"],
            }
            found["goals"] = goals(name, found, options.scale)
            print(
                f"  loss alone {ours_alone:.3f} s, {found['loss_share']:.1%} of a step; model FLOPs utilisation "
                f"{found['model_flops_utilisation']:.0%} of {ceiling / 1e12:.2f} TFLOP/s; peak memory "
                f"{found['peak_memory_bytes'] / 2**30:.2f} GiB"
            )
            for text, met in found["goals"].items():
                print(f"  goal: {text}: {'met' if met else 'NOT met'}")
            report["similarities"][name] = found
        if len(groups) == 2:
            cosine, wasserstein = (sum(groups[name][-1].seconds) for name in ("cosine", "wasserstein"))
            report["wasserstein_to_cosine"] = wasserstein / cosine
            print(f"\nWasserstein takes {wasserstein / cosine:.3f} times the time of cosine (goal: at most 1.15)")
        most = options.largest_batch
        if most is None:
            most = 1280 if device.type == "cuda" else 0
        if most and scale:
            for similarity in options.similarity:
                for chunk in (0, scale.batch_size):
                    for checkpointing in (False, True):
                        fits = largest_batch(folder, model, processor, scale, similarity, most, chunk, checkpointing)
                        key = f"largest_batch{'_gradcache' * bool(chunk)}{'_checkpointing' * checkpointing}"
                        report["similarities"][similarity][key] = fits
                        print(f"{similarity}: {key.replace('_', ' ')}: {fits}")
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretraining_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Reading the table: `faster` is against the first line, `by it` against the line above, `s/data` the "
        "time to make\na batch ready. On a CPU measure on a core of its own: taskset -c 1 python -m "
        "benchmarks.pretraining_step",
    )
    parser.add_argument(
        "--scale",
        choices=["small", "paper", "tiny"],
        default="small",
        help="small: SmolLM2-135M, Whisper tiny.en and recorded speech (fetched once); paper: HuBERT-large and "
        "Llama-3.1-8B shapes with random weights and noise, for a GPU; tiny: to try the benchmark out",
    )
    parser.add_argument("--similarity", nargs="+", choices=list(BY_LOOP), default=list(BY_LOOP))
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant (default: 3)")
    parser.add_argument("--batch-size", type=int, default=0, help="default: small 16, paper 20, tiny 4")
    parser.add_argument(
        "--queries", type=int, default=1, help="small: speech tokens per third of a second (default: 1; the paper: 4)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the frozen parts")
    parser.add_argument("--threads", type=int, default=1, help="threads of a CPU (default: 1)")
    parser.add_argument(
        "--largest-batch",
        type=int,
        metavar="N",
        help="look for the largest batch that fits, up to N, with and without GradCache and gradient checkpointing "
        "(random weights only; default: 1280 on a GPU, else 0, as on a CPU nothing says when it does not fit)",
    )
    parser.add_argument(
        "--flops", action="store_true", help="only count the operations of a step by part; nothing is run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        default=Path("runs/benchmarks/pretraining_step.json"),
        help="where everything goes as JSON (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.flops:
        if options.scale not in SCALES:
            parser.error("--flops counts for --scale paper or tiny")
        report = {"flop_by_part": flops_by_part(SCALES[options.scale])}
        print_flops(report["flop_by_part"])
    else:
        report = run(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nWritten to {options.output}")


if __name__ == "__main__":
    main()
