"""What is done to texts before their words are compared.

| name | what it does | from |
|---|---|---|
| `basic` | lower case, no punctuation (apostrophes inside words stay), single spaces (none in unspaced scripts) | the paper |
| `whisper-basic` | lower case, no brackets and what they hold, no symbols or punctuation | Radford et al., 2022, Appendix C |
| `whisper-english` | also contractions, numbers, titles, fillers, British to American spelling | the same; English only |
| `none` | single spaces | |

Whisper's normalisers are Transformers' copies. The 1,739 spellings that `whisper-english` needs, which Transformers does not
ship, lie beside this file with their licence (MIT).
"""

import json
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer


Normaliser = Callable[[str], str]

SPELLINGS = Path(__file__).with_name("english_spellings.json")
# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer; Hiragana, Katakana, Han.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
    r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)


def normalise(text: str) -> str:
    """Lower case, without punctuation, single spaces (the paper's normalisation); apostrophes inside words stay.

    Between characters of scripts without spaces there are none, or a comma more or less would be an error.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    # Letters, digits, and the marks that many scripts write their vowels with.
    text = " ".join("".join(c if c == "'" or unicodedata.category(c)[0] in "LNM" else " " for c in text).split())
    return re.sub(rf"(?<=[{UNSPACED}]) (?=[{UNSPACED}])", "", text)


@cache
def normaliser(name: str) -> Normaliser:
    """The normaliser of that name (see above).

    Raises:
        ValueError: if there is none.
    """
    if name == "basic":
        return normalise
    if name == "whisper-basic":
        return _single_spaced(BasicTextNormalizer())
    if name == "whisper-english":
        return _single_spaced(EnglishTextNormalizer(json.loads(SPELLINGS.read_text(encoding="utf-8"))))
    if name == "none":
        return _single_spaced(str)
    raise ValueError(f"There is no normaliser {name!r}. Use basic, whisper-basic, whisper-english or none.")


def _single_spaced(normalise: Normaliser) -> Normaliser:
    return lambda text: " ".join(normalise(text).split())
