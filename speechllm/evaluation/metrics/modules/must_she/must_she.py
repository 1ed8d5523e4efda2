"""Term coverage and gender accuracy of MuST-SHE (fractions), also by category.

references: columns GENDERTERMS ("right wrong;right wrong") and CATEGORY. bootstrap: resamples, for `<metric>_interval`.
"""

import datasets
import evaluate

from speechllm.evaluation.metrics.gender_terms import gender_terms
from speechllm.evaluation.metrics.tasks import summary


class MustShe(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("string"),
            "references": {"terms": datasets.Value("string"), "category": datasets.Value("string")},
        }
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, bootstrap=0, seed=0):
        terms, categories = ([reference[name] for reference in references] for name in ("terms", "category"))
        return summary(gender_terms(terms, categories, predictions), {}, bootstrap, seed)
