"""What is done to texts before their words are compared.

| name | what it does | from |
|---|---|---|
| `basic` | lower case, no punctuation (apostrophes inside words stay), single spaces | the paper |
| `whisper-basic` | lower case, no brackets and what they hold, no symbols or punctuation | Radford et al., 2022, Appendix C |
| `whisper-english` | also contractions, numbers, titles, fillers, British to American spelling | the same; English only |
| `none` | single spaces | |

Whisper's normalisers are Transformers' copies. `whisper-english` needs a list of 1,741 spellings that Transformers does not
ship: it is read from the wheel `whisper-normalizer` (MIT; 40 KB, pinned), which is fetched once into the cache.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from functools import cache

from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ...downloads import Archive, fetch, read_wheel_member


Normaliser = Callable[[str], str]

SPELLINGS = Archive(
    name="whisper-normalizer",
    version="0.1.15",
    sha256="2871b3c56557628dc30749bf3ffac7bc4ac3d3f497b0b24df27d0c4c434e113f",
    kind="wheel",
    licence="MIT",
    credit="OpenAI (Whisper), tysto.com; packaged by Kurian Benoy",
    megabytes=0.04,
)


def normalise(text: str) -> str:
    """Lower case, without punctuation, single spaces (the paper's normalisation); apostrophes inside words stay."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    # Letters, digits, and the marks that many scripts write their vowels with.
    return " ".join("".join(c if c == "'" or unicodedata.category(c)[0] in "LNM" else " " for c in text).split())


@cache
def normaliser(name: str) -> Normaliser:
    """The normaliser of that name (see above).

    Raises:
        ValueError: if there is none.
        DownloadError: if the spellings of `whisper-english` are not in the cache and cannot be fetched.
    """
    if name == "basic":
        return normalise
    if name == "whisper-basic":
        return _single_spaced(BasicTextNormalizer())
    if name == "whisper-english":
        return _single_spaced(EnglishTextNormalizer(_english_spellings()))
    if name == "none":
        return _single_spaced(str)
    raise ValueError(f"There is no normaliser {name!r}. Use basic, whisper-basic, whisper-english or none.")


def _english_spellings() -> dict[str, str]:
    return json.loads(read_wheel_member(fetch(SPELLINGS), "whisper_normalizer/normalizers/english.json"))


def _single_spaced(normalise: Normaliser) -> Normaliser:
    return lambda text: " ".join(normalise(text).split())
