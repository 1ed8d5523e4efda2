"""The three scales: which rows, with which settings, on which fractions of the data.

Rows are those of the paper's tables, distillation (docs/paper_index.md), and the text-only oracle. What `tiny` and `small`
change in `recipes/small` is here; `paper` changes nothing in `recipes/paper`.
"""

from dataclasses import replace

from .data import PRETRAINING, PRETRAINING_TEST, TRAITS, test_manifest, train_manifest
from .plan import Row, Scale


ORACLE = Row("text-only-oracle", seeds=1, fractions=(100, 0), pretrained_as="none", oracle=True)
DISTILLATION = {"contrastive_weight": 0, "distillation_weight": 1, "distillation_temperature": 2}

# ---- tiny: two hours on two cores ------------------------------------------------------------------------------------

# About 300 s of one core each. Aligning all layers at once hardly learns for hundreds of steps from a random projector,
# so that half of the time goes into the LLM's input first. Next-token losses need no negatives and learn more from many
# small batches than from few large ones; so does fine-tuning.
#
# Three seeds for the rows that the claims compare most; a tenth of the data for one of them.
ONE_SEED = "Rows with one seed: their intervals and tests know the test set alone, not what another seed would give."
_SMALL_BATCHES = {"per_device_train_batch_size": 8}
TINY = Scale(
    name="tiny",
    recipes="small",
    rows=(
        Row("none", probed=True),
        Row("asr-pretraining", "asr-pretraining", {"max_steps": 125, **_SMALL_BATCHES}, probed=True),
        Row("contr-cos-emb", "contr-cos-emb", {"max_steps": 500}, probed=True),
        Row(
            "contr-cos-all",
            "contr-cos-all",
            {"max_steps": 300, "layer_schedule": "0:emb 235:all"},
            fractions=(100, 10),
            probed=True,
        ),
        Row("contr-wasser-all", "contr-wasser-all", {"max_steps": 230, "layer_schedule": "0:emb 180:all"}, probed=True),
        replace(ORACLE, fractions=(100,)),
        Row("warm-start", "contr-cos-emb", {"max_steps": 235}, seeds=1, fractions=()),
        Row("contr-cos-all-asr", "contr-cos-all-asr", {"max_steps": 18, "warmup_steps": 2}, "warm-start", seeds=1),
        Row("mixed-nwp", "mixed-nwp", {"max_steps": 400, **_SMALL_BATCHES}, seeds=1),
        Row("distillation", "contr-cos-all", {**DISTILLATION, "max_steps": 95, **_SMALL_BATCHES}, seeds=1),
    ),
    fractions=(100,),
    pretraining={
        "train_data": str(PRETRAINING),
        "eval_data": str(PRETRAINING_TEST),
        "eval_strategy": "no",
    },
    fine_tuning={
        "eval_data": str(test_manifest("tiny")),
        "predict_with_generate": False,
        "lora_rank": 8,
        "bf16": True,
        "max_steps": 120,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 20,
        "warmup_steps": 10,
        "max_new_tokens": 48,
    },
    fraction_settings={percent: {"train_data": str(train_manifest("tiny", percent))} for percent in range(1, 101)},
    tasks={"asr": (1200, 60), "sqa": (300, 60), "traits": (300, 96)},
    probing={
        "data": str(TRAITS),
        "labels": ["speaker", "gender", "rate", "noise", "reverberation", "words"],
        "layers": "all",
        "dtype": "bfloat16",
        "feature_cache": "data/small/cache",
        "bootstrap": 300,
    },
    prepared=True,
    notes=(
        "Every row is pretrained for about the same time on two cores (a number of steps fixed beforehand, seconds as "
        "measured): a warm start at the LLM's input is part of it.",
        "The text-only oracle reads the transcript in the place of the audio, fine-tuned as the others (0%: straight away). "
        "It cannot know the traits.",
        "Probes are of the first seed.",
        ONE_SEED,
    ),
    fine_tuning_notes=(
        "Fine-tuning trains the projector and, unless a row's name says otherwise, LoRA (rank 8) on the LLM: one of 135 "
        "million parameters cannot translate, and a projector cannot teach it to. The paper trains the projector alone.",
        "No translation: fine-tuned on 90 rows of it, this LLM reaches 1.2 BLEU from the transcript itself, so that hearing "
        "decides nothing. Claims on translation and question answering are judged by the latter.",
        "Every fraction is fine-tuned for the same 120 steps of 4 rows, two thirds of them recognition, drawn from all "
        "recordings or from a tenth of them. With all data most of it is never seen, so that the fractions differ less "
        "than in the paper.",
    ),
)

# ---- small: one GPU, ten minutes a row -------------------------------------------------------------------------------

# The models and the data of `tiny`, trained for longer, with all seeds and fractions for every row. The numbers of steps
# are estimates.
_LONGER = {"per_device_train_batch_size": 64}
_LONGER_ROWS = {
    "asr-pretraining": {"max_steps": 4000},
    "contr-cos-emb": {"max_steps": 8000, **_LONGER},
    "contr-cos-all": {"max_steps": 3000, "layer_schedule": "0:emb 1000:all", **_LONGER},
    "contr-wasser-all": {"max_steps": 2000, "layer_schedule": "0:emb 1000:all", **_LONGER},
    "warm-start": {"max_steps": 1000, **_LONGER},
    "contr-cos-all-asr": {"max_steps": 1500, "warmup_steps": 20, **_LONGER},
    "mixed-nwp": {"max_steps": 4000},
    "distillation": {"max_steps": 3000},
    "contr-cos-all-29-percent": {"max_steps": 3000, "layer_schedule": "0:emb 1000:all", **_LONGER},
}
SMALL = replace(
    TINY,
    name="small",
    rows=tuple(
        ORACLE
        if row.oracle
        else replace(
            row,
            settings={**row.settings, **_LONGER_ROWS.get(row.name, {})},
            seeds=None,
            fractions=() if row.fractions == () else None,
        )
        for row in (*TINY.rows, Row("contr-cos-all-29-percent", "contr-cos-all-29-percent"))
    ),
    fractions=(100, 25, 10, 5, 1, 0),
    fine_tuning={
        **TINY.fine_tuning,
        "eval_data": str(test_manifest("small")),
        "max_steps": 600,
        "per_device_train_batch_size": 16,
        "warmup_steps": 50,
    },
    fraction_settings={percent: {"train_data": str(train_manifest("small", percent))} for percent in range(1, 101)},
    tasks={"asr": (1200, 120), "st": (800, 120), "sqa": (800, 120), "traits": (800, 96)},
    notes=(
        "The models and the speech of `tiny`, and translation; the training is longer.",
        *TINY.notes[1:],
    ),
    fine_tuning_notes=TINY.fine_tuning_notes[:1],
)

# ---- paper: the published setting ------------------------------------------------------------------------------------

# The manifests that `recipes/paper` names must be there (docs/paper_index.md).
_AT_THE_END = {"eval_strategy": "no", "save_strategy": "no"}  # which is when a cell is measured, apart from its cost
PAPER = Scale(
    name="paper",
    recipes="paper",
    rows=(
        Row("none"),
        *(
            Row(name, name)
            for name in (
                "asr-pretraining",
                "contr-cos-emb",
                "contr-cos-all",
                "contr-wasser-all",
                "contr-cos-all-asr",
                "contr-wasser-all-asr",
                "contr-cos-all-giga",
                "mixed-nwp",
                "contr-cos-emb-mixed",
                "contr-wasser-emb",
            )
        ),
        Row("distillation", "contr-cos-all", DISTILLATION),
        replace(ORACLE, fractions=(0,)),  # the projector alone is trained, and nothing of the LLM
    ),
    fractions=(100, 25, 10, 5, 1, 0),
    pretraining=_AT_THE_END,
    fine_tuning={**_AT_THE_END, "eval_data": "data/tasks/test.jsonl"},  # the recipe names the development set
    notes=(
        "The text-only oracle reads the transcript in the place of the audio, straight away: nothing of the LLM is trained "
        "here. It stands beside rows whose projector has seen the tasks.",
    ),
)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER)}
