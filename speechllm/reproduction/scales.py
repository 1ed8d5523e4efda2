"""The three scales: which rows, with which settings, on which fractions of the data.

Rows are those of the paper's tables, and distillation (docs/paper_index.md). What `tiny` changes in `recipes/small` is
here; `paper` changes nothing.
"""

from .data import PRETRAINING, PRETRAINING_TEST, TEST, train_manifest
from .plan import Row, Scale


CORE = ("none", "asr-pretraining", "contr-cos-emb", "contr-cos-all", "contr-wasser-all")
DISTILLATION = {"contrastive_weight": 0, "distillation_weight": 1, "distillation_temperature": 2}

# ---- tiny: two hours on two cores ------------------------------------------------------------------------------------

# About 140 s each on two cores. Aligning all layers at once hardly learns for hundreds of steps from a random
# projector, so that half of the time goes into the LLM's input first. Next-token losses need no negatives and learn more
# from many small batches than from few large ones.
_SMALL_BATCHES = {"per_device_train_batch_size": 8}
TINY = Scale(
    name="tiny",
    recipes="small",
    rows=(
        Row("none"),
        Row("asr-pretraining", "asr-pretraining", {"max_steps": 150, **_SMALL_BATCHES}),
        Row("contr-cos-emb", "contr-cos-emb", {"max_steps": 420}),
        Row("contr-cos-all", "contr-cos-all", {"max_steps": 250, "layer_schedule": "0:emb 210:all"}),
        Row("contr-wasser-all", "contr-wasser-all", {"max_steps": 190, "layer_schedule": "0:emb 155:all"}),
        Row("warm-start", "contr-cos-emb", {"max_steps": 210}, seeds=1, tested=False),
        Row("contr-cos-all-asr", "contr-cos-all-asr", {"max_steps": 22}, start="warm-start", seeds=1),
        Row("mixed-nwp", "mixed-nwp", {"max_steps": 150, **_SMALL_BATCHES}, seeds=1),
        Row("distillation", "contr-cos-all", {**DISTILLATION, "max_steps": 90, **_SMALL_BATCHES}, seeds=1),
    ),
    fractions=(100, 10),
    pretraining={
        "train_data": str(PRETRAINING),
        "eval_data": str(PRETRAINING_TEST),
        "eval_strategy": "no",
    },
    fine_tuning={
        "eval_data": str(TEST),
        "predict_with_generate": False,
        "lora_rank": 8,
        "max_steps": 75,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 20,
        "warmup_steps": 10,
        "max_new_tokens": 48,
    },
    fraction_settings={percent: {"train_data": str(train_manifest(percent))} for percent in range(1, 101)},
    notes=(
        "Every row is pretrained for about the same time on two cores (a number of steps fixed beforehand, seconds as "
        "measured): a warm start at the LLM's input is part of it.",
        "Fine-tuning trains the projector and LoRA (rank 8) on the LLM, in all rows: an LLM of 135 million parameters "
        "cannot translate, and a projector cannot teach it to. The paper trains the projector alone.",
        "Every fraction is fine-tuned for the same number of steps.",
    ),
)

SCALES = {scale.name: scale for scale in (TINY,)}
