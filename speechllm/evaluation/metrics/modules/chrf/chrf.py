"""chrF++ of a corpus by sacreBLEU, 0 to 100, with its signature. bootstrap: resamples, for `chrf++_interval` (95%)."""

import datasets
import evaluate

from speechllm.evaluation.metrics.tasks import summary
from speechllm.evaluation.metrics.translation import translation


class ChrfPlusPlus(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, bootstrap=0, seed=0):
        metrics, signatures = translation(references, predictions, [None] * len(references))
        return summary({"chrf++": metrics["chrf++"]}, {"signature": signatures["chrf++_signature"]}, bootstrap, seed)
