"""Exact match and F1 of SQuAD v1.1, 0 to 100. references: the acceptable answers of each question.

bootstrap: resamples, for `<metric>_interval` (95%).
"""

import datasets
import evaluate

from speechllm.evaluation.metrics.question_answering import question_answering
from speechllm.evaluation.metrics.tasks import summary


class Squad(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, bootstrap=0, seed=0):
        return summary(question_answering(references, predictions), {}, bootstrap, seed)
