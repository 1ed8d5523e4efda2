"""Word and character error rates of a corpus, by jiwer: all edits over all reference words or characters."""

import re
import unicodedata

import jiwer


def normalise(text: str) -> str:
    """Lower case, without punctuation, single spaces (the paper's normalisation); apostrophes inside words stay."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    # Letters, digits, and the marks that many scripts write their vowels with.
    return " ".join("".join(c if c == "'" or unicodedata.category(c)[0] in "LNM" else " " for c in text).split())


def recognition_metrics(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """Corpus `wer` and `cer` as fractions (they can exceed 1), both sides normalised.

    Raises:
        ValueError: if the lists differ in length or no reference has a word.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, but {len(hypotheses)} hypotheses.")
    pairs = [(normalise(reference), normalise(hypothesis)) for reference, hypothesis in zip(references, hypotheses)]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        raise ValueError("No reference has a word to score against.")
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {"wer": jiwer.wer(left, right), "cer": jiwer.cer(left, right)}
