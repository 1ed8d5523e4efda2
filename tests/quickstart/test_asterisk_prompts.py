"""Transcripts of the Asterisk prompts: what is spoken and what is not; decoding from small archives built here."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import soundfile

from speechllm.downloads import CACHE_VARIABLE, DownloadError
from speechllm.quickstart import asterisk_prompts as prompts


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        (" Press 5 to leave a message", "Press 5 to leave a message"),
        ("Press  1,   2 or 3.", "Press 1, 2 or 3."),
        ("[sound of monkeys screaming]", ""),
        ("<beep ascending>", ""),
        ("(10 seconds of silence)", ""),
        ("space [ ]", "space"),
        ("[!] punto esclamativo", "punto esclamativo"),
        ("Spiacente, [quello] non è un interno valido.", "Spiacente, non è un interno valido."),
        ("Hang up. (simple tone sound plays)", "Hang up."),
        ("Al termine abbassare. (un beep, ma non in questo file).", "Al termine abbassare."),
        ("il nostro (enfatico) glorioso moderatore", "il nostro glorioso moderatore"),
        ("au menu poli (ne m'appelez plus, jamais), appuyez", "au menu poli ne m'appelez plus, jamais, appuyez"),
        ("...to exit the menu.", "to exit the menu."),
        ("... for ...", "for"),
        ("Stai entrando nella conferenza numero…", "Stai entrando nella conferenza numero"),
        ('“Pour réduire, ..."', "Pour réduire"),
        ("I'm sorry. Wait... please.", "I'm sorry. Wait... please."),
        ("", ""),
    ],
)
def test_spoken_text(text, spoken):
    assert prompts.spoken_text(text, "fr") == spoken


def test_lost_italian_accents_come_back_and_questions_stay():
    text = "Il tempo sar? cos?, non pu? essere pi? tardi: ? piena. Cambia verso quale cartella?"
    expected = "Il tempo sarà cos?, non può essere più tardi: è piena. Cambia verso quale cartella?"
    assert prompts.spoken_text(text, "it") == expected
    assert prompts.spoken_text("così ? si", "fr") == "così ? si"


def test_symbols_are_written_as_english_speaks_them():
    assert prompts.spoken_text("press * to pause, press # to exit", "en") == "press star to pause, press pound to exit"
    assert prompts.spoken_text("premere * ora", "it") == "premere * ora"


TRANSCRIPT = """\ufeff; Core sounds: with a comment

activated: Activated.
beep: a simple beep, without brackets
conf-adminmenu: conf-adminmenu: Press 1.
digits/0: zero
digits/0: ten
empty:
menu-extended: More options. menu-only-one: Only one option.
menu-only-one: Another text for the same name.
note: This is: not a name.
silence/3: (3 seconds of silence)
tt-monkeys: [monkeys]
"""


def test_parse_transcript():
    assert prompts.parse_transcript(TRANSCRIPT, "en") == {
        "activated": "Activated.",
        "conf-adminmenu": "Press 1.",
        "digits/0": "zero",
        "menu-extended": "More options.",
        "menu-only-one": "Only one option.",
        "note": "This is: not a name.",
    }


def test_recordings_are_matched_by_name_and_then_without_case():
    texts = {"letters/O": "o", "vm-INBOX": "new", "vm-inbox": "other", "gone": "no recording"}
    recordings = {"letters/o": b"", "vm-INBOX": b"", "vm-inbox": b"", "no-text": b""}
    assert prompts.match_recordings(texts, recordings) == {"letters/o": "o", "vm-INBOX": "new", "vm-inbox": "other"}


def test_prompt_name():
    assert prompts.prompt_name("usr/share/asterisk/sounds/it_IT_m_Carlo/digits/h-1.g722") == "digits/h-1"
    assert prompts.prompt_name("usr/share/asterisk/sounds/en_US_f_Allison/hello.g722") == "hello"


@pytest.mark.parametrize("name", ["../../../etc/hello", "a/b/c", "/etc/hello", "..", "a/../b", ".hidden", "a b"])
def test_a_recording_cannot_choose_where_it_is_written(name):
    with pytest.raises(DownloadError, match="Unexpected recording"):
        prompts.prompt_name(f"usr/share/asterisk/sounds/en/{name}.g722")


def test_unknown_language_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'de'.*en, es, fr, it, ru"):
        prompts.asterisk_prompts("de")


def debian(path, files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    header = f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data.getvalue()):<10}`\n".encode()
    path.write_bytes(b"!<arch>\n" + header + data.getvalue())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_prompts_are_decoded_once_to_the_data_schema(tmp_path, monkeypatch):
    codec = pytest.importorskip("G722").G722(16_000, 64_000)
    import gzip

    seconds = np.arange(16_000) / 16_000
    tone = (8_000 * np.sin(2 * np.pi * 440 * seconds)).astype(np.int16)
    encoded = codec.encode(tone)
    text, audio = prompts.archives("en")
    sounds = "asterisk/sounds/en_US_f_Allison"
    debian(tmp_path / text.name, {"doc/x/core-sounds-en.txt.gz": gzip.compress(TRANSCRIPT.encode())})
    recordings = {f"{sounds}/{name}.g722": encoded for name in ("activated", "digits/0", "beep", "without-line")}
    debian(tmp_path / audio.name, recordings)
    fetched = []

    def fetch(archive):
        fetched.append(archive)
        return tmp_path / archive.name

    monkeypatch.setattr(prompts, "fetch", fetch)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    rows = prompts.asterisk_prompts("en")
    assert [(row["id"], row["text"]) for row in rows] == [("activated", "Activated."), ("digits/0", "zero")]
    for row in rows:
        assert set(row) == {"id", "audio", "text", "language", "task", "duration"}
        assert (row["language"], row["task"], row["duration"]) == ("en", "asr", 1.0)
        samples, rate = soundfile.read(row["audio"], dtype="int16")
        assert rate == 16_000 and samples.shape == (16_000,)
        spectrum = np.abs(np.fft.rfft(samples[4_000:12_000].astype(float)))
        assert spectrum.argmax() * 2 == 440  # Hz: the right rate and byte order
    assert prompts.asterisk_prompts("en") == rows
    assert fetched == [text, audio]
