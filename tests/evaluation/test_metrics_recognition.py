"""Normalisers and error rates: by hand, against jiwer, and (slow) against NIST's sclite and OpenAI's normaliser."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import zipfile

import jiwer
import numpy as np
import pytest

from speechllm.downloads import Archive, fetch, read_debian_members
from speechllm.evaluation.metrics import normalisation
from speechllm.evaluation.metrics.error_rates import (
    CHARACTER_COUNTS,
    EDITS,
    WORD_COUNTS,
    edit_counts,
    recognition,
    recognition_metrics,
)
from speechllm.evaluation.metrics.normalisation import normalise, normaliser


WHISPER_NORMALIZER = Archive(
    name="whisper-normalizer",
    version="0.1.15",
    sha256="2871b3c56557628dc30749bf3ffac7bc4ac3d3f497b0b24df27d0c4c434e113f",
    kind="wheel",
    licence="MIT",
    credit="OpenAI (Whisper), tysto.com; packaged by Kurian Benoy",
    megabytes=0.04,
)
SCTK = Archive(
    name="sctk",
    version="2.4.10-20151007-1312Z+dfsg2-3.1",
    sha256="5fe1eab7c08f814d1fc130e73fa7b434be68d92a7503db2e2c6b880ab26f603e",
    kind="debian",
    licence="public domain",
    credit="NIST",
    megabytes=0.6,
)


MORE_ITERTOOLS = Archive(
    name="more-itertools",
    version="11.2.1",
    sha256="35a7377edd1dd6608dcb2cdf534ded55ea32d49448875ad042cd3f879fb1ded0",
    kind="wheel",
    licence="MIT",
    credit="",
    megabytes=0.1,
)


def random_pairs(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """References and hypotheses with deletions, substitutions, insertions, and a tenth that have nothing in common."""
    rng = random.Random(seed)
    vocabulary = [letter + mark for letter in "abcdefghij" for mark in ("", "é", "ж")]
    references, hypotheses = [], []
    for i in range(count):
        reference = rng.choices(vocabulary, k=rng.randint(1, 25))
        hypothesis = []
        for word in reference:
            kind = rng.random()
            if kind >= 0.15:
                hypothesis.append(word if kind >= 0.35 else rng.choice(vocabulary))
            if kind > 0.85:
                hypothesis.append(rng.choice(vocabulary))
        if i % 10 == 0:
            hypothesis = rng.choices(vocabulary, k=rng.randint(0, 25))
        references.append(" ".join(reference))
        hypotheses.append(" ".join(hypothesis))
    return references, hypotheses


def test_normalisation():
    assert normalise("  Don’t — STOP, 'now'! ") == "don't stop now"
    assert normalise("naïve café_1") == "naïve café 1"
    assert normalise("हिन्दी।") == "हिन्दी"  # vowel signs belong to the word
    assert normalise("...") == ""
    assert normalise("it's 3, 여러분 안녕, Привет мир") == "it's 3 여러분 안녕 привет мир"  # these have spaces
    assert normaliser("none")(" A,  b ") == "A, b"
    assert normaliser("whisper-basic")("Hello, [noise] World!") == "hello world"
    with pytest.raises(ValueError, match="no normaliser 'whisper'"):
        normaliser("whisper")


def test_punctuation_is_no_error_in_scripts_without_spaces():
    for spoken, written in (
        ("今天天气很好我们去公园", "今天天气很好，我们去公园。"),
        ("トムクルーズさんこんにちは", "トム・クルーズさん、こんにちは！"),
        ("สวัสดีครับยินดีที่ได้รู้จัก", "สวัสดีครับ ยินดีที่ได้รู้จัก"),
        ("ສະບາຍດີຂອບໃຈ", "ສະບາຍດີ, ຂອບໃຈ"),
        ("សួស្តីអរគុណ", "សួស្តី។ អរគុណ"),
        ("မင်္ဂလာပါကျေးဇူး", "မင်္ဂလာပါ။ ကျေးဇူး"),
    ):
        assert recognition_metrics([written], [spoken]) == {"wer": 0, "cer": 0}
    assert normalise("我用 iPhone 15，很好。 对") == "我用 iphone 15 很好对"  # spaces beside other scripts stay
    assert normaliser("none")("很好， 对") == "很好， 对"


def test_english_normalisation_needs_no_network(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path))
    normaliser.cache_clear()
    text = "Mr. Smith won't take twenty-five dollars, um, for the aeroplane's colour."
    assert normaliser("whisper-english")(text) == "mister smith will not take $25 for the airplane is color"
    assert not [*tmp_path.iterdir()]  # nothing was fetched
    assert "MIT License" in normalisation.SPELLINGS.with_suffix(".LICENSE").read_text()


def test_error_rates_by_hand():
    metrics, counts = recognition(["one two three four", "Five", "..."], ["one two tree", "five!", "x"])
    assert [counts[name] for name in WORD_COUNTS] == [1, 1, 1, 5]
    assert [counts[name] for name in CHARACTER_COUNTS] == [0, 6, 1, 22]
    assert metrics["wer"].score == pytest.approx(
        3 / 5
    )  # all edits over all words, the word said into silence among them
    assert metrics["cer"].score == pytest.approx(7 / 22)
    assert metrics["mean_utterance_wer"].score == pytest.approx((2 / 4 + 0) / 2)  # the third has no rate
    assert recognition_metrics(["a b"], ["a b c"]) == {"wer": 1 / 2, "cer": 2 / 3}


def test_an_empty_hypothesis_is_all_deletions():
    metrics, counts = recognition(["one two three"], [""])
    assert counts["deletions"] == counts["reference_words"] == 3
    assert counts["character_deletions"] == counts["reference_characters"] == 13
    assert metrics["wer"].score == metrics["cer"].score == 1
    with pytest.raises(ValueError, match="2 references, but 1"):
        recognition(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="No reference has a word"):
        recognition(["!"], ["a"])


def test_error_rates_are_those_of_jiwer():
    references, hypotheses = random_pairs(100)
    metrics, counts = recognition(references, hypotheses)
    words = jiwer.process_words(references, hypotheses)
    assert metrics["wer"].score == words.wer
    assert metrics["cer"].score == jiwer.cer(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    for prefix, expected in (("", words), ("character_", characters)):
        assert [counts[prefix + kind] for kind in EDITS] == [getattr(expected, kind) for kind in EDITS]
    mean = np.mean([jiwer.wer(*pair) for pair in zip(references, hypotheses)])
    assert metrics["mean_utterance_wer"].score == pytest.approx(mean, abs=1e-12)


def test_alignment_of_sclite_by_hand():
    def edits(reference, hypothesis):
        return edit_counts([reference], [hypothesis], alignment="sclite")[0].tolist()

    assert edits("a b c d e", "d e x y z") == [0, 3, 3, 5]  # 18 instead of 5 substitutions, 20
    assert edits("a b c", "c x y") == [3, 0, 0, 3]  # 12 both ways: substitutions
    assert edits("a b", "") == [0, 2, 0, 2]
    assert edits("", "a b") == [0, 0, 2, 0]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["word", "character"])
def test_error_rates_are_those_of_sclite(tmp_path, unit):
    """1,000 pairs: with its alignment every count of every utterance; by the fewest edits the same number of errors
    in all but a few."""
    for _, content in read_debian_members(fetch(SCTK), lambda name: name.endswith("/bin/sclite")):
        program = tmp_path / "sclite"
        program.write_bytes(content)
        program.chmod(0o755)
    references, hypotheses = random_pairs(1000)
    for name, texts in (("reference", references), ("hypothesis", hypotheses)):
        if unit == "character":  # as words; the space is one too
            texts = [" ".join(text.replace(" ", "_")) for text in texts]
        lines = [f"{text} (speaker_{i})\n" for i, text in enumerate(texts)]
        (tmp_path / f"{name}.trn").write_text("".join(lines), encoding="utf-8")
    command = [program, "-r", "reference.trn", "trn", "-h", "hypothesis.trn", "trn", "-i", "rm", "-s", "-e", "utf-8"]
    command += ["-o", "pralign", "stdout"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = re.findall(r"id: \(speaker_(\d+)\)\nScores: \(#C #S #D #I\) \d+ (\d+) (\d+) (\d+)", done.stdout)
    theirs = np.zeros((1000, 3))
    for name, *counts in found:
        theirs[int(name)] = [float(count) for count in counts]
    assert len(found) == 1000
    ours = edit_counts(references, hypotheses, unit, "sclite")[:, :3]
    assert (ours == theirs).all()
    fewest = edit_counts(references, hypotheses, unit)[:, :3].sum(1)
    assert (fewest <= theirs.sum(1)).all()
    assert (fewest == theirs.sum(1)).sum() >= (990 if unit == "word" else 850)


@pytest.mark.slow
def test_english_normalisation_is_that_of_whisper(tmp_path):
    """Against OpenAI's own code, as `whisper-normalizer` packs it, in a process of its own."""
    texts = [
        "Mr. Smith won't pay $20 million, he said -- um -- in the 1960s.",
        "It's twenty-five and a half percent; one oh one, double seven.",
        "The colour of the aeroplane (grey) was analysed by Prof. O'Neill!",
        "I'ma go, y'all shouldn't've been naïve: 3.14 is a hundred and three.",
        "He'd been first; she's got £5 and 7 cents, [laughs] and twenty-first-century problems.",
    ]
    for archive in (WHISPER_NORMALIZER, MORE_ITERTOOLS):
        zipfile.ZipFile(fetch(archive)).extractall(tmp_path)
    original = (tmp_path / "whisper_normalizer" / "normalizers" / "english.json").read_bytes()
    assert normalisation.SPELLINGS.read_bytes() == original
    code = (
        "import json, sys; from whisper_normalizer.english import EnglishTextNormalizer as Original; "
        "print(json.dumps([Original()(text) for text in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = [" ".join(text.split()) for text in json.loads(done.stdout)]
    assert [normaliser("whisper-english")(text) for text in texts] == theirs
    assert "color" in theirs[2] and "analyzed" in theirs[2]
