"""What survives, where: linear probes of utterances' mean states at the encoder, at the LLM's input, and at its layers.

For each label, place and split:

1. The rows are split by near-duplicate cluster of their text, so that no sentence is on both sides, and, where every
   class can still be on both, by speaker too: a gender probe must not recognise voices it was trained on.
2. A linear model is fitted on the training side's states, standardised there: logistic regression for classes, ridge
   regression for numbers, and for words (which of the frequent words does the utterance hold?) ridge regression on 0
   and 1. Its strength of regularisation is chosen on a quarter of the training texts.
3. On the test side: accuracy for classes (guessing: the training side's most frequent class), R^2 for numbers (guessing:
   the training side's mean), and for words the area under the ROC curve, averaged over words (guessing: 1/2); it
   compares utterances of one language only, or a probe that tells languages would pass for one that knows words.

Values are means over splits (`seeds`). Intervals are 95% percentiles of a bootstrap over the texts of the test
utterances (all utterances of a text together; one draw for all splits, places and models, so that differences between
models are paired) and, where the splits share no speaker, over the speakers too: a row counts as often as its text is drawn
times as often as its speaker is (Owen, 2007). They say how much hangs on the test utterances, not on the training of model or probe.

A probe tells what a linear model can read off, not what the LLM uses; states of more dimensions give more away. A probe
above guessing on an *untrained* projector shows what any projection of the encoder lets through: compare with it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from ..data.feature_cache import FeatureCache
from ..data.prompts import shared_prefix
from ..data.schema import Row, SetAside, with_ids
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..objectives import parse_layers
from ..processing_speechllm import SpeechLLMProcessor
from ..projector_speechllm import SpeechLLMProjector
from .page import strict_json
from .pooled_states import PooledSpeech, pooled_speech
from .probe_labels import MINIMUM, Label
from .probe_report import write_probes
from .probe_splits import Split, plan_probes, some_of, testable, text_clusters


METRICS = {"classes": "accuracy", "number": "R^2", "words": "AUC"}
STRENGTHS = {"classes": (1e-3, 1e-2, 1e-1, 1.0), "number": (1e1, 1e2, 1e3, 1e4), "words": (1e1, 1e2, 1e3, 1e4)}
States = Mapping[str, Mapping[str, np.ndarray]]  # model -> place -> (rows, dim)


def probe_layers(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    rows: list[Row],
    labels: Sequence[str],
    layers: str = "all",
    *,
    name: str = "trained",
    compare: Mapping[str, tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor, FeatureCache | None]]
    | None = None,
    untrained: int | None = None,
    output: Path | None = None,
    prefix: str = "auto",
    batch_size: int = 16,
    frames: FeatureCache | None = None,
    set_aside: Sequence[SetAside] = (),
    **options: Any,
) -> dict[str, Any]:
    """Probe a model, and others beside it.

    Args:
        rows: utterances with `audio`, `text` (for splits and words) and the labels' columns (`probe_labels.py`).
        labels: names of labels, such as speaker, gender, rate, noise, reverberation, words.
        layers: "emb", "all" (the paper's), or hidden-state indices.
        name: what the report calls the model.
        compare: name -> a further model, its processor, and a cache of its encoder's frames; places that all models
            have are compared.
        untrained: seed of a freshly initialised projector, as one more model, "untrained".
        output: folder for `probes.json`, `probes.html` (one file, loads nothing) and `plots/`.
        prefix: as in pretraining.
        frames: cache of the encoder's frames (`trainers/frozen_states.py`).
        set_aside: rows that were left out before, for the report.
        options: see `probe_states`.

    Returns:
        The report of `probe_states`, with `set_aside` (rows whose audio cannot be used).

    Raises:
        ProbeError: if a label cannot be probed (told before any model runs).
        ValueError: if no row can be used, or the layers or the prefix do not exist.
    """
    rows = with_ids(rows)
    plan_probes(rows, labels, **{name: value for name, value in options.items() if name != "bootstrap"})

    def states(model, processor, cache) -> PooledSpeech:
        indices = parse_layers(layers, len(model.model.llm_layers))
        ids = shared_prefix(prefix, processor)
        return pooled_speech(model, processor, rows, indices, prefix=ids, frames=cache, batch_size=batch_size)

    found = {name: states(model, processor, frames)}
    if untrained is not None:
        with fresh_projector(model, untrained):
            found["untrained"] = states(model, processor, frames)
    for other, loaded in (compare or {}).items():
        found[other] = states(*loaded)
    common = set.intersection(*({row["id"] for row in pooled.rows} for pooled in found.values()))
    arrays, usable = {}, []
    for model_name, pooled in found.items():
        kept = [i for i, row in enumerate(pooled.rows) if row["id"] in common]
        arrays[model_name] = {place: state[kept].numpy() for place, state in pooled.states.items()}
        usable = [pooled.rows[i] for i in kept]  # the same for all
    report = probe_states(arrays, usable, labels, **options)
    left_out = {item.id: item.reason for items in (set_aside, *(p.set_aside for p in found.values())) for item in items}
    report["set_aside"] = strict_json([{"id": item, "reason": reason} for item, reason in left_out.items()])
    if output is not None:
        write_probes(report, Path(output))
    return report


@contextmanager
def fresh_projector(model: SpeechLLMForConditionalGeneration, seed: int) -> Iterator[None]:
    """The model with a projector as new, for a while."""
    trained = model.model.projector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = SpeechLLMProjector(model.config).apply(model.model._initialize_weights)
    weight = next(trained.parameters())
    model.model.projector = fresh.to(weight.device, weight.dtype).eval()
    try:
        yield
    finally:
        model.model.projector = trained


def probe_states(
    states: States,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    seeds: int = 3,
    test_share: float = 0.3,
    bootstrap: int = 1000,
    by_speaker: bool = True,
    minimum: int = MINIMUM,
) -> dict[str, Any]:
    """Probe states that are there already.

    Args:
        states: model -> place -> (rows, dim). The first model is compared with each of the others.
        seeds: splits.
        test_share: part of the texts (and of the speakers) to test on.
        bootstrap: draws.
        by_speaker: `False` splits by text alone.
        minimum: utterances of a class, or with a word, that a probe needs.

    Returns:
        `places` and `labels`: label -> `metric`, `names` (of classes or words), `utterances`, `test_utterances` (of each
        split), `split_by`, `set_aside`, `notes`, `guessing` (value and interval), and `models`: model -> place ->
        `value`, `interval`, `seeds` (one value each), `above_guessing` and, but for the first model, `first_minus_this`
        (differences with intervals).

    Raises:
        ProbeError: if a label cannot be probed, or no split leaves every class on both sides.
    """
    places = [p for p in next(iter(states.values())) if all(p in of_model for of_model in states.values())]
    clusters = text_clusters(rows)
    report = {}
    for label, splits, split_by in plan_probes(rows, labels, seeds, test_share, by_speaker, minimum):
        chosen = [rows[i] for i in label.index]
        of_label = {m: {p: np.asarray(s[p], np.float32)[label.index] for p in places} for m, s in states.items()}
        report[label.name] = {
            "metric": METRICS[label.kind],
            "names": label.names,
            "utterances": len(chosen),
            "test_utterances": [len(test) for _, test in splits],
            "split_by": split_by,
            "set_aside": label.set_aside,
            "notes": _notes(label, chosen, split_by),
            **_probe(label, of_label, chosen, clusters[label.index], splits, bootstrap, "speaker" in split_by),
        }
    return strict_json(
        {"models": list(states), "places": places, "utterances": len(rows), "seeds": seeds, "labels": report}
    )


def _notes(label: Label, rows: list[Row], split_by: list[str]) -> list[str]:
    notes = []
    if label.kind == "classes":
        languages = [{r.get("language") for r, v in zip(rows, label.values) if v == c} for c in range(len(label.names))]
        if len(set.union(*languages)) > 1 and all(len(some) == 1 for some in languages):
            notes.append("Every class has one language: the probe may tell languages apart.")
    if label.name != "speaker" and "speaker" not in split_by:
        notes.append("Test and training utterances share speakers.")
    return notes


# ---- fitting and measuring -------------------------------------------------------------------------------------------


# Of weights (draws, test rows): how often each draw of the bootstrap has each test row. The first draw has each once.
Measure = Callable[[np.ndarray], np.ndarray]  # -> (draws,)


def _probe(
    label: Label,
    states: States,
    rows: list[Row],
    clusters: np.ndarray,
    splits: list[Split],
    bootstrap: int,
    draw_speakers: bool,
) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    weights = _draws(clusters, bootstrap, generator)
    if draw_speakers:
        weights = weights * _draws(np.array([str(row.get("speaker")) for row in rows]), bootstrap, generator)
    languages = np.array([str(row.get("language")) for row in rows])

    def over_splits(measure_of: Callable[[int, np.ndarray, np.ndarray], Measure]) -> np.ndarray:
        """(splits, draws)"""
        return np.stack([measure_of(n, train, test)(weights[:, test]) for n, (train, test) in enumerate(splits)])

    def probe_at(x: np.ndarray) -> np.ndarray:
        def measure_of(seed: int, train: np.ndarray, test: np.ndarray) -> Measure:
            scores = _fit(label, x, train, test, clusters, seed)
            return _measure(label, scores, train, test, languages)

        return over_splits(measure_of)

    guessing = over_splits(lambda n, train, test: _measure(label, _guess(label, train, test), train, test, languages))
    measured = {model: {place: probe_at(x) for place, x in of_model.items()} for model, of_model in states.items()}
    first = next(iter(measured.values()))
    return {
        "guessing": _summary(guessing),
        "models": {
            model: {
                place: {
                    **_summary(values),
                    "seeds": values[:, 0],
                    "above_guessing": _summary(values - guessing),
                    **({} if at_places is first else {"first_minus_this": _summary(first[place] - values)}),
                }
                for place, values in at_places.items()
            }
            for model, at_places in measured.items()
        },
    }


def _draws(units: np.ndarray, bootstrap: int, generator: np.random.Generator) -> np.ndarray:
    """(1 + bootstrap, rows): how often each row's unit is drawn with replacement; first, once each."""
    numbers = np.unique(units, return_inverse=True)[1]
    count = int(numbers.max()) + 1
    draws = generator.multinomial(count, np.full(count, 1 / count), size=bootstrap)
    return np.concatenate([np.ones((1, count), draws.dtype), draws])[:, numbers]


def _summary(values: np.ndarray) -> dict[str, Any]:
    """values: (splits, draws), the first draw being the data themselves."""
    means = _mean_of_finite(values)
    drawn = means[1:][np.isfinite(means[1:])]
    return {"value": means[0], "interval": np.percentile(drawn, [2.5, 97.5]) if len(drawn) else [np.nan, np.nan]}


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """(anything, draws) -> (draws,); a draw of the bootstrap may leave a split or a word with nothing to measure."""
    count = np.isfinite(values).sum(0)
    return np.divide(np.nansum(values, axis=0), count, out=np.full(len(count), np.nan), where=count > 0)


def _fit(label: Label, x: np.ndarray, train: np.ndarray, test: np.ndarray, clusters: np.ndarray, seed: int):
    """What a probe says of the test rows: (rows,) classes or numbers, or (rows, words) scores."""
    held_out = np.isin(clusters[train], some_of(clusters[train], 0.25, np.random.default_rng(seed)))
    inner, validation = train[~held_out], train[held_out]

    def quality(strength: float) -> float:
        scores = _fit_once(label, x, inner, validation, strength)
        ones = np.ones((1, len(validation)))
        return float(np.nan_to_num(_measure(label, scores, inner, validation)(ones)[0], nan=-np.inf))

    usable = label.kind != "classes" or len(np.unique(label.values[inner])) > 1
    strengths = STRENGTHS[label.kind]
    best = max(strengths, key=quality) if usable and len(validation) > 1 else strengths[len(strengths) // 2]
    return _fit_once(label, x, train, test, best)


def _fit_once(label: Label, x: np.ndarray, train: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    scaler = StandardScaler().fit(x[train])
    if label.kind == "classes":
        probe = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
    else:
        probe = Ridge(alpha=strength)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest regularisation, which then does not win
        probe.fit(scaler.transform(x[train]), label.values[train].astype(float if label.kind != "classes" else int))
    return probe.predict(scaler.transform(x[test]))


def _guess(label: Label, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    values = label.values[train]
    if label.kind == "classes":
        return np.full(len(test), np.bincount(values).argmax())
    return np.full((len(test), *values.shape[1:]), values.mean() if label.kind == "number" else 0.0)


def _measure(
    label: Label, scores: np.ndarray, train: np.ndarray, test: np.ndarray, languages: np.ndarray | None = None
) -> Measure:
    truth = label.values[test]
    if label.kind == "classes":
        return lambda weights: _mean((scores == truth).astype(float), weights)
    if label.kind == "number":
        return lambda weights: r_squared(scores, truth, weights)
    strata = np.zeros(len(test)) if languages is None else languages[test]
    words = np.flatnonzero(testable(label, train, test))

    def macro_auc(weights: np.ndarray) -> np.ndarray:
        nothing = np.full(len(weights), np.nan)
        areas = [area_under_roc(scores[:, w], truth[:, w], weights, strata) for w in words]
        return _mean_of_finite(np.stack([nothing, *areas]))

    return macro_auc


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(1)
    return np.divide(weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0)


def r_squared(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 - sum w (t - p)^2 / sum w (t - mean t)^2 of each row of weights: (draws, n) -> (draws,)."""
    error, variance = _mean((truth - predicted) ** 2, weights), _mean(truth**2, weights) - _mean(truth, weights) ** 2
    return 1 - np.divide(error, variance, out=np.full(len(error), np.nan), where=variance > 1e-12)


def area_under_roc(scores: np.ndarray, present: np.ndarray, weights: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Probability that a row with the word scores above one of the same stratum without it (ties: 1/2), weighted.

    scores: (n,), present: (n,) bool, weights: (draws, n), strata: (n,) -> (draws,), NaN where there is no pair
    """
    above = np.sign(scores[present][:, None] - scores[~present]) / 2 + 0.5  # (with, without)
    same = (strata[present][:, None] == strata[~present]).astype(float)
    having, lacking = weights[:, present].astype(float), weights[:, ~present].astype(float)
    pairs, won = ((having @ matrix * lacking).sum(1) for matrix in (same, above * same))
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
