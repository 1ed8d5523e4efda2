"""BLEU of a corpus by sacreBLEU, 0 to 100, with its signature.

language: of the references; it decides the tokenizer. bootstrap: resamples, for `bleu_interval` (95%).
"""

import datasets
import evaluate

from speechllm.evaluation.metrics.tasks import summary
from speechllm.evaluation.metrics.translation import translation


class Bleu(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, language=None, bootstrap=0, seed=0):
        metrics, signatures = translation(references, predictions, [language] * len(references))
        return summary({"bleu": metrics["bleu"]}, {"signature": signatures["bleu_signature"]}, bootstrap, seed)
