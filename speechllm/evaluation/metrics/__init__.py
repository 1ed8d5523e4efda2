"""What answers are worth: the field's metrics, with confidence intervals and paired tests. See docs/metrics.md.

`score` and `paired_test` take rows of the schema and predictions by id. The functions they call take plain lists.
`MODULES` is a folder of `evaluate` modules over the same functions: `evaluate.load(str(MODULES / "wer"))`.
"""

from pathlib import Path

from .tasks import MAIN_METRIC, ScoringError, corpus_metrics, paired_test, paired_tests, score, utterance_scores


MODULES = Path(__file__).parent / "modules"

__all__ = [
    "MAIN_METRIC",
    "MODULES",
    "ScoringError",
    "corpus_metrics",
    "paired_test",
    "paired_tests",
    "score",
    "utterance_scores",
]
