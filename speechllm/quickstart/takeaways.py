"""One or two sentences over each plot of the report, computed from the numbers below it.

Every function takes a part of the report (plain JSON values; parts and numbers may be missing) and returns a sentence,
or `None` when there is nothing to say yet. The sentences are as ready to say that something did not help as that it
did. Two rules keep them honest:

* a recall counts as better only if it rises by more than two standard errors, sqrt(p (1 - p) / n) of a fraction p
  measured on n utterances;
* word error rates that differ by less than `TIE` (2 points) count as equal, because that much changes from seed to seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from speechllm.evaluation.plots import diagonal_hits, layers_of, schedule_switches


TIE = 0.02
EQUAL_STEPS = "scratch_equal_steps"
EQUAL_COMPUTE = "scratch_equal_compute"


def mean(values: Mapping[Any, float | None] | None) -> float | None:
    """Mean of the numbers that are there."""
    numbers = [value for value in (values or {}).values() if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def in_hundred(fraction: float, noun: str = "") -> str:
    """A fraction as a count: "52 in 100", "fewer than 1 in 100", "none"; `noun` follows the 100."""
    tail = f" in 100{' ' + noun if noun else ''}"
    if fraction <= 0:
        return f"none{tail}"
    return f"fewer than 1{tail}" if fraction < 0.005 else f"{100 * fraction:.0f}{tail}"


def percent(fraction: float | None) -> str:
    """A fraction as a whole percentage, or a dash."""
    return "–" if fraction is None else f"{100 * fraction:.0f}%"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: "48 s", "3 min 20 s", "1 h 05 min"; a dash when unknown."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def standard_error(fraction: float, count: int) -> float:
    """Standard error of a fraction measured on `count` independent cases."""
    return math.sqrt(max(0.0, fraction * (1 - fraction)) / count)


def recall(pretraining: Mapping[str, Any], texts: int | None) -> str | None:
    """Retrieval before and after, averaged over the layers, with chance and the size of the pool."""
    moments = pretraining.get("recall_at_1") or {}
    before, middle, after = (mean(moments.get(name)) for name in ("before", "after_embedding", "after"))
    chance = pretraining.get("chance")
    texts = texts or (round(1 / chance) if chance else None)
    pool = f" among {texts}" if texts else ""
    guess = f"; guessing: {100 * chance:.1f}" if chance else ""
    latest, moment = (after, "after it") if after is not None else (middle, "after its first stage (layer 0 only)")
    if latest is None:
        if before is None:
            return None
        verb = "finds its" if in_hundred(before).startswith("1 in") else "find their"
        where = f"mean over {len(moments['before'])} layers{guess}"
        return f"Before pretraining {in_hundred(before, 'utterances')} {verb} transcript{pool} ({where})."
    layers = len(moments.get("after") or moments.get("after_embedding") or {})
    where = f"mean over {layers} layers{guess}" if layers > 1 else guess.removeprefix("; ")
    where = f" ({where})" if where else ""
    if before is None:
        return f"{moment.capitalize()}, {in_hundred(latest, 'utterances')} find their transcript{pool}{where}."
    verb = "finds its" if in_hundred(before).startswith("1 in") else "find their"
    numbers = f"{in_hundred(before, 'utterances')} {verb} transcript{pool}; {moment}, {in_hundred(latest)}{where}"
    if latest - before <= 2 * standard_error(max(latest, before), texts or 100):
        return f"Pretraining did not help retrieval: before it {numbers}."
    return f"Before pretraining {numbers}."


def recall_details(pretraining: Mapping[str, Any], texts: int | None) -> str | None:
    """What each stage of the curriculum did, the best and the worst layer, and how sure the figures are."""
    moments = pretraining.get("recall_at_1") or {}
    middle, after = moments.get("after_embedding") or {}, moments.get("after") or {}
    sentences = []
    if len(middle) > 1 and middle.get("0") is not None:
        deeper = mean({layer: value for layer, value in middle.items() if layer != "0"})
        if deeper is not None:
            text = f"The first stage trains layer 0 only and takes it to {percent(middle['0'])}"
            text += f", the deeper layers to {percent(deeper)} on average"
            later = mean({layer: value for layer, value in after.items() if layer != "0"})
            if later is not None:
                text += f"; training all layers brings these to {percent(later)}"
            sentences.append(f"{text}.")
    known = {layer: value for layer, value in (after or middle).items() if value is not None}
    if len(known) > 1:
        best, worst = max(known, key=known.get), min(known, key=known.get)
        if known[best] > known[worst]:
            sentences.append(
                f"Best at layer {best} ({percent(known[best])}), weakest at layer {worst} ({percent(known[worst])})."
            )
        if texts:
            error = 100 * standard_error(known[best], texts)
            sentences.append(f"With {texts} utterances, a single layer's figure is good to about ±{error:.0f} points.")
    return " ".join(sentences) or None


def losses(pretraining: Mapping[str, Any]) -> str | None:
    """From where to where the losses of the layers went, and why the total may jump."""
    history = pretraining.get("history") or []
    if len(history) < 2:
        return None
    ends = []
    for layer in layers_of(history):
        values = [value for entry in history if (value := entry.get(f"loss_layer_{layer}")) is not None]
        if len(values) > 1:
            ends.append((values[0], values[-1]))
    what = f"averaged over {len(ends)} layers" if len(ends) > 1 else "in training"
    if not ends:
        values = [value for entry in history if (value := entry.get("loss")) is not None]
        if len(values) < 2:
            return None
        ends, what = [(values[0], values[-1])], "in training"
    first, last = (sum(side) / len(ends) for side in zip(*ends, strict=True))
    if last < first:
        text = f"Per layer, the loss falls from {first:.2f} to {last:.2f} nats, {what}."
    else:
        text = f"The loss did not fall: {first:.2f} nats at the start, {last:.2f} at the end, {what}."
    steps = [entry["step"] for entry in history if entry.get("step") is not None]
    switches = [step for step, _ in schedule_switches(pretraining.get("schedule") or "") if step < max(steps)]
    if switches:
        text += f" The total jumps at step {switches[0]:g} because more layers are trained from there on."
    return text


def similarity(before: Sequence | None, after: Sequence | None) -> str | None:
    """How many recordings are closest to their own transcript, in one layer's matrices."""
    if not before and not after:
        return None
    count = len((after or before)[0])
    found, now = (diagonal_hits(matrix)[0] if matrix else None for matrix in (before, after))
    moment, first = ("After", now) if found is None else ("Before", found)
    text = f"{moment} pretraining {first} of {count} recordings {'is' if first == 1 else 'are'} closest to their own transcript"
    if found is None or now is None:
        return f"{text}."
    return f"{text}; after it, {now}{'' if now > found else ': no better'}."


def is_piece(token: str, text: str) -> bool:
    """Whether a token is a word of the text (not a single letter) or three letters or more of one, ignoring case."""
    token = token.replace("Ġ", " ").replace("▁", " ").strip().casefold()
    words = re.findall(r"\w+", text.casefold())
    whole = token in words and (len(token) > 1 or token.isdigit())
    return whole or (len(token) > 2 and any(token in word for word in words))


def nearest_tokens(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Share of speech tokens whose nearest LLM token belongs to their own transcript."""
    parts = []
    for name in ("before", "after"):
        tokens = [(token, row.get("text") or "") for row in rows for token in row.get(name) or []]
        if tokens:
            parts.append((name, sum(is_piece(*token) for token in tokens) / len(tokens)))
    if not parts:
        return None
    moment, share = parts[0]
    text = f"{moment.capitalize()} pretraining {in_hundred(share, 'speech tokens')} are nearest to a word, or a piece of one"
    text += f", of their own transcript{f'; after it, {in_hundred(parts[1][1])}' if len(parts) == 2 else ''}."
    if len(parts) == 2 and parts[1][1] <= parts[0][1]:
        text += " Pretraining did not bring them closer to the words."
    return text


def arm_named(fine_tuning: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The fine-tuning arm of that name, if it ran."""
    return next((arm for arm in fine_tuning.get("arms") or [] if arm.get("name") == name), None)


def comparison(fine_tuning: Mapping[str, Any], other: str) -> str | None:
    """The pretrained arm against one scratch arm, in word error rate and loss."""
    with_it, without = arm_named(fine_tuning, "pretrained"), arm_named(fine_tuning, other)
    if with_it is None or without is None or with_it.get("wer") is None or without.get("wer") is None:
        return None
    ours, theirs = with_it["wer"], without["wer"]
    steps, compute = without.get("steps"), without.get("llm_tokens_total")
    if other == EQUAL_STEPS:
        setting = f"After {steps} steps each" if steps is not None else "After equally many steps"
        conclusion = "Pretraining helps", "Pretraining hurts"
    else:
        budget = "may use the compute that pretraining cost as well"
        budget += f" ({compute / 1e6:.2f} million LLM token passes in all)" if compute else ""
        setting = f"If the projector from scratch {budget}" + (f", it trains {steps} steps. Then" if steps else ",")
        conclusion = "Pretraining pays for itself", "Pretraining does not pay for itself on this task"
    text = f"{setting} the pretrained projector gets {percent(ours)} of the words wrong"
    text += f", the one from scratch {percent(theirs)}"
    gap = theirs - ours
    if abs(gap) < TIE:
        text += ": no clear difference."
    else:
        text += f". {conclusion[gap < 0]}: {abs(gap) * 100:.0f} points {'fewer' if gap > 0 else 'more'}."
    if max(ours, theirs) > 1:
        text += " (More than 100% means more errors than there are words.)"
    if with_it.get("loss") is not None and without.get("loss") is not None:
        text += f" Held-out loss: {with_it['loss']:.2f} against {without['loss']:.2f} nats per token."
    return text


def best_arm(fine_tuning: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arm with the lowest word error rate."""
    arms = [arm for arm in fine_tuning.get("arms") or [] if arm.get("wer") is not None]
    return min(arms, key=lambda arm: arm["wer"]) if arms else None


def lora(model: Mapping[str, Any], fine_tuning: Mapping[str, Any]) -> str | None:
    """What fine-tuning trains besides the projector; `None` if nothing, or if the report does not say."""
    if not (rank := fine_tuning.get("lora_rank")):
        return None
    text, projector = f"LoRA matrices of rank {rank} on the LLM", model.get("trainable_parameters")
    arms = [count for arm in fine_tuning.get("arms") or [] if (count := arm.get("trainable_parameters")) is not None]
    return f"{text} ({max(arms) - projector:,} parameters)" if arms and projector is not None else text


def other_arms(fine_tuning: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str | None:
    """How the remaining arms do against the pretrained one."""
    base = arm_named(fine_tuning, "pretrained")
    parts = []
    for arm in arms:
        if arm.get("wer") is not None:
            text = f"{arm.get('label') or arm.get('name')}: {percent(arm['wer'])} of the words wrong"
            if base is not None and base.get("wer") is not None and arm is not base:
                gap = base["wer"] - arm["wer"]
                word = "about the same as" if abs(gap) < TIE else "fewer than" if gap > 0 else "more than"
                text += f", {word} the pretrained projector ({percent(base['wer'])})"
            parts.append(text)
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if parts else None


def fine_tuning_losses(fine_tuning: Mapping[str, Any]) -> str | None:
    """Which arm reaches the lowest loss on held-out speech."""
    arms = [arm for arm in fine_tuning.get("arms") or [] if arm.get("loss") is not None]
    if len(arms) < 2:
        return None
    best = min(arms, key=lambda arm: arm["loss"])
    others = "; ".join(f"{arm.get('label') or arm.get('name')}: {arm['loss']:.2f}" for arm in arms if arm is not best)
    return f"Lowest on held-out speech: {best.get('label') or best.get('name')}, {best['loss']:.2f} nats ({others})."


def transcripts(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """On how many samples the pretrained and the scratch arm of equal steps are closer to what was said."""
    pairs = [(wer.get("pretrained"), wer.get(EQUAL_STEPS)) for sample in samples if (wer := sample.get("wer") or {})]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return None
    ours, theirs = (sum(sign * (b - a) > 0 for a, b in pairs) for sign in (1, -1))
    text = f"On {len(pairs)} held-out utterances at equal steps, the pretrained projector is closer to what was said"
    return f"{text} on {ours}, the one from scratch on {theirs}, and {len(pairs) - ours - theirs} are a draw."


def time_spent(seconds: Mapping[str, float | None]) -> str | None:
    """The whole time and the longest stage."""
    known = {stage: value for stage, value in seconds.items() if value is not None}
    total = sum(known.values())
    if total <= 0:
        return None
    longest = max(known, key=known.get)
    return f"{duration(total)} in all; the longest part was {longest} ({percent(known[longest] / total)} of it)."
