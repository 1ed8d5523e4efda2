"""Questions that the paper leaves open, each as a list of rows over a scale (`speechllm reproduce --study NAME`).

A study's rows are the scale's own, or variants of them: the same settings but for what the study is about. Runs of one
folder share cells, so that a row that the grid has run is not run again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..recipes import UsageError
from .data import LANGUAGES_ENGLISH, LANGUAGES_OWN, languages_test
from .plan import Row, Scale, Settings
from .scales import ONE_SEED


@dataclass(frozen=True)
class Variant:
    """A row of the scale under another name, with other settings; `layers` also replace what a schedule ends with."""

    name: str
    of: str
    settings: Settings = field(default_factory=dict)
    fine_tuning: Settings | None = None  # if given, pretraining is `of`'s own
    fractions: tuple[int, ...] = (100,)


@dataclass(frozen=True)
class Study:
    """
    rows: of the scale, with the scale's seeds.
    variants: with one seed; so are the rows they are compared with, `rows`, where `seeds` is 1.
    fractions: on which `rows` are fine-tuned.
    at_paper: it can be run at the paper's scale. Some need data that the command makes for the others; some would compare
        what the paper's settings make the same.
    """

    question: str
    rows: tuple[str, ...]
    variants: tuple[Variant, ...] = ()
    fractions: tuple[int, ...] = (100,)
    seeds: int = 1
    probed: bool = False
    at_paper: bool = True


def _at_layers(name: str, layers: str) -> Variant:
    return Variant(f"contr-cos-{name}", "contr-cos-all", {"layers": layers})


_NEGATIVES = {"symmetric": True, "text_state_cache": "data/cache"}  # which the paper's recipes do without
STUDIES = {
    "layers": Study(
        "Which layers should be aligned: a single one, a few, or many?",
        ("contr-cos-emb", "contr-cos-all"),
        (
            *(_at_layers(f"layer-{layer}", layer) for layer in ("5", "10", "15", "20", "25")),
            _at_layers("layer-last", "-1"),
            _at_layers("first-and-last", "0,-1"),
            _at_layers("first-middle-last", "0,15,-1"),
        ),
    ),
    "data": Study(
        "Does more pretraining data help? 29% are to all of it what the paper's 400 hours are to its 1,400.",
        ("contr-cos-all",),
        (Variant("contr-cos-all-29-percent", "contr-cos-all", {"train_fraction": 0.29}),),
    ),
    "negatives": Study(
        "Do the other direction, mined hard negatives, or more negatives help?",
        ("contr-cos-all",),
        (
            Variant("symmetric", "contr-cos-all", _NEGATIVES),
            Variant("hard-negatives", "contr-cos-all", {**_NEGATIVES, "hard_negatives": 4, "hard_negatives_refresh": 50}),
            Variant("text-bank", "contr-cos-all", {**_NEGATIVES, "text_bank": 128}),
        ),
    ),
    "wasserstein": Study(
        "What does the Wasserstein distance cost for the same number of steps, and is it worth it?",
        ("contr-cos-all", "contr-wasser-all"),
        (
            Variant("contr-wasser-all-equal-steps", "contr-cos-all", {"similarity": "wasserstein"}),
            Variant("transport-cost-equal-steps", "contr-cos-all", {"similarity": "transport_cost"}),
        ),
        at_paper=False,
    ),
    "traits": Study(
        "What of the voice can be told from the states, at which layer, after which pretraining?",
        ("none", "asr-pretraining", "contr-cos-emb", "contr-cos-all", "contr-wasser-all"),
        fractions=(),
        probed=True,
        at_paper=False,
    ),
    "languages": Study(
        "Speech in other languages, aligned with its own transcript or with the English text?",
        (),
        tuple(
            Variant(manifest.stem, "contr-cos-all", {
                "train_data": str(manifest), "eval_data": str(languages_test(manifest))}, fractions=())
            for manifest in (LANGUAGES_OWN, LANGUAGES_ENGLISH)
        ),
        at_paper=False,
    ),
    "curve": Study(
        "How much fine-tuning data does it take?",
        ("none", "asr-pretraining", "contr-cos-all"),
        fractions=(100, 50, 25, 10, 5, 1),
    ),
    "joint": Study(
        "Contrast and answers at once (joint at 0%: the projector alone is trained), instead of one after the other?",
        ("contr-cos-all",),
        (
            Variant("joint", "contr-cos-all-asr", {"train_data": "fine-tuning"}, fractions=(0, 100)),
            Variant("contr-cos-all-projector-alone", "contr-cos-all", fine_tuning={"lora_rank": 0}),
        ),
        at_paper=False,
    ),
    "lora": Study(
        "What does LoRA on the LLM add to the projector alone, as the paper trains it?",
        ("none", "contr-cos-all"),
        (
            Variant("none-projector-alone", "none", fine_tuning={"lora_rank": 0}),
            Variant("contr-cos-all-projector-alone", "contr-cos-all", fine_tuning={"lora_rank": 0}),
        ),
        at_paper=False,
    ),
}  # fmt: skip


def scale_of(scale: Scale, name: str) -> Scale:
    """The scale with the study's rows, and what they start from.

    Raises:
        UsageError: if there is no such study, or not at this scale.
    """
    if name not in STUDIES:
        raise UsageError(f"--study: there is no {name!r}. Choose from {', '.join(STUDIES)}.")
    study = STUDIES[name]
    if not study.at_paper and scale.name == "paper":
        raise UsageError(f"--study {name} is for the scales tiny and small. Choose one of these.")
    known = {row.name: row for row in scale.rows}
    rows = [
        replace(known[row], seeds=study.seeds, fractions=study.fractions, probed=study.probed) for row in study.rows
    ]
    rows += [_row(variant, known, scale) for variant in study.variants]
    starts = {needed for row in rows for needed in (row.start, row.pretrained_as)} - {None} - {row.name for row in rows}
    # Rows that others start from are known to the plan, and run only as far as that.
    rows += [replace(known[start], fractions=()) for start in sorted(starts)]
    return replace(
        scale,
        rows=tuple(rows),
        fractions=study.fractions,
        seeds=study.seeds,
        notes=(study.question, ONE_SEED),
        fine_tuning_notes=scale.fine_tuning_notes if any(row.fractions != () for row in rows) else (),
    )


def _row(variant: Variant, known: Mapping[str, Row], scale: Scale) -> Row:
    row = replace(known[variant.of], name=variant.name, seeds=1, fractions=variant.fractions, probed=False)
    if variant.fine_tuning is not None:
        return replace(
            row, recipe=None, settings={}, start=None, pretrained_as=variant.of, fine_tuning=variant.fine_tuning
        )
    settings = {**row.settings, **variant.settings}
    if "layers" in variant.settings and "layer_schedule" in settings:
        settings["layer_schedule"] = settings["layer_schedule"].replace(":all", f":{variant.settings['layers']}")
    if settings.get("train_data") == "fine-tuning":
        settings["train_data"] = scale.fraction_settings[100]["train_data"]
    return replace(row, settings=settings)
