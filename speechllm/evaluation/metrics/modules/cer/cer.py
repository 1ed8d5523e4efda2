"""Character error rate of a corpus, spaces included (a fraction), with counts of errors. Options: see `wer`."""

import datasets
import evaluate

from speechllm.evaluation.metrics.error_rates import CHARACTER_COUNTS, recognition
from speechllm.evaluation.metrics.normalisation import normaliser
from speechllm.evaluation.metrics.tasks import summary


class CharacterErrorRate(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, normalisation="basic", alignment="levenshtein", bootstrap=0, seed=0):
        metrics, counts = recognition(references, predictions, normaliser(normalisation), alignment)
        counts = {name: counts[name] for name in CHARACTER_COUNTS}
        return summary({"cer": metrics["cer"]}, counts, bootstrap, seed)
