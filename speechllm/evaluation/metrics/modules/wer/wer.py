"""Word error rate of a corpus, with counts of errors, and the mean of the utterances' own rates (fractions).

normalisation: basic, whisper-basic, whisper-english or none. alignment: levenshtein or sclite.
bootstrap: resamples, for `<metric>_interval` (95%).
"""

import datasets
import evaluate

from speechllm.evaluation.metrics.error_rates import WORD_COUNTS, recognition
from speechllm.evaluation.metrics.normalisation import normaliser
from speechllm.evaluation.metrics.tasks import summary


class WordErrorRate(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, normalisation="basic", alignment="levenshtein", bootstrap=0, seed=0):
        metrics, counts = recognition(references, predictions, normaliser(normalisation), alignment)
        counts = {name: counts[name] for name in WORD_COUNTS}
        return summary({name: metrics[name] for name in ("wer", "mean_utterance_wer")}, counts, bootstrap, seed)
