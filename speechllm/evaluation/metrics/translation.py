"""BLEU (Papineni et al., 2002) and chrF++ (Popović, 2017) by sacreBLEU (Post, 2018), with signatures.

The tokenizer of BLEU is sacreBLEU's own choice for the target language: 13a, for Chinese `zh`, for Japanese and Korean
`ja-mecab` and `ko-mecab`. With several target languages each is scored by itself and the mean over languages is the
result, as papers average over directions. A code and its English name ("de", "German") are one language.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from ...data.prompts import LANGUAGES
from .resampling import CorpusMetric


# How data sets write languages whose BLEU needs a tokenizer of its own: one of the words of their names.
TOKENIZED_BY_LANGUAGE = {
    "zh": ("chinese", "mandarin", "cantonese", "cmn", "yue", "zho"),
    "ja": ("japanese", "jpn"),
    "ko": ("korean", "kor"),
}


def translation(
    references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str | None]
) -> tuple[dict[str, CorpusMetric], dict[str, str]]:
    """The metrics `bleu` and `chrf++` (0 to 100) and their `..._signature`.

    Args:
        languages: target language of each utterance, a code ("de", "zh-CN") or an English name ("Chinese"); None: 13a.

    Returns:
        With several languages also `bleu_<language>`, `chrf++_<language>` and their signatures, by the language's first
        name in alphabetical order.

    Raises:
        ModuleNotFoundError: if sacreBLEU, or what it needs for Japanese or Korean, is not installed.
    """
    try:
        import sacrebleu
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'BLEU and chrF++ need sacreBLEU. Install it with `pip install "speechllm[evaluation]"`.'
        ) from error

    metrics, signatures, first = {}, {}, {}
    for name in sorted({str(language) for language in languages}):
        first.setdefault(LANGUAGES.get(name, name), name)
    languages = [first[LANGUAGES.get(name, name)] for name in map(str, languages)]
    names = list(first.values())
    for name, make in (
        ("bleu", lambda language: sacrebleu.BLEU(tokenize=bleu_tokenizer(language))),
        ("chrf++", lambda language: sacrebleu.CHRF(word_order=2)),
    ):
        parts = []
        for language in names:
            metric = make(language)
            chosen = np.array([other == language for other in languages])
            statistics = metric._extract_corpus_statistics(  # sacreBLEU's own way for resampling
                [text for text, mine in zip(hypotheses, chosen) if mine],
                [[text for text, mine in zip(references, chosen) if mine]],
            )
            table = np.zeros((len(references), len(statistics[0])))
            table[chosen] = statistics
            part = CorpusMetric(table, _score_of(metric))
            parts.append(part)
            suffix = "" if len(names) == 1 else f"_{language}"
            metrics[f"{name}{suffix}"] = part
            signatures[f"{name}{suffix}_signature"] = str(metric.get_signature())
        if len(names) > 1:
            metrics[name] = mean_of(parts)
    return metrics, signatures


def bleu_tokenizer(language: str | None) -> str:
    """sacreBLEU's tokenizer for a target language.

    Raises:
        ModuleNotFoundError: if it needs a package that is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU

    words = re.findall(r"[^\W_]+", str(language).lower())  # "zh-CN", "Chinese (Simplified)"
    code = next((code for code, others in TOKENIZED_BY_LANGUAGE.items() if {code, *others}.intersection(words)), None)
    tokenizer = BLEU._TOKENIZER_MAP.get(code, BLEU.TOKENIZER_DEFAULT)
    if tokenizer.endswith("-mecab"):
        try:
            BLEU(tokenize=tokenizer)
        except (ImportError, RuntimeError) as error:
            raise ModuleNotFoundError(
                f"BLEU for {language} needs a tokenizer that is not installed. "
                f'Install it with `pip install "sacrebleu[{code}]"`.'
            ) from error
    return tokenizer


def _score_of(metric) -> Callable[[np.ndarray], float]:
    # All zero: no utterance of this language is in the sample.
    return lambda sums: metric._compute_score_from_stats(sums.tolist()).score if sums.any() else np.nan


def mean_of(metrics: Sequence[CorpusMetric]) -> CorpusMetric:
    """The unweighted mean of those metrics on the same utterances that are defined."""
    ends = np.cumsum([metric.statistics.shape[1] for metric in metrics])[:-1]
    return CorpusMetric(
        np.concatenate([metric.statistics for metric in metrics], axis=1),
        lambda sums: float(np.nanmean([metric.value(part) for metric, part in zip(metrics, np.split(sums, ends))])),
    )
