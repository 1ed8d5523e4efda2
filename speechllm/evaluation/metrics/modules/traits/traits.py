"""Accuracy and macro-F1 of labels named in answers (fractions).

choices: the labels an answer may name; default: those of the references.
bootstrap: resamples, for `<metric>_interval` (95%).
"""

import datasets
import evaluate

from speechllm.evaluation.metrics.tasks import summary
from speechllm.evaluation.metrics.traits import classification, named_choice


class Traits(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, choices=None, bootstrap=0, seed=0):
        choices = choices or sorted(set(references))
        named = [named_choice(answer, choices) for answer in predictions]
        return summary(classification(references, named), {}, bootstrap, seed)
