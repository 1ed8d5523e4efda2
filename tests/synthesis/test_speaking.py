"""Speaking through a command template: the engine is a small script that really writes WAV files."""

import json
import os
import stat
import sys
from datetime import datetime
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from speechllm.cli import main
from speechllm.data.schema import load_rows
from speechllm.synthesis import spoken_questions, variants
from speechllm.synthesis.engines import SynthesisError, check_rates, own_engine, parse_voices
from speechllm.synthesis.passages import WORDS
from speechllm.synthesis.speaking import synthesise


ENGINE = """#!{python} -S
import math, struct, sys, wave
voice, rate, wav, log, *text = sys.argv[1:]
text = text[0] if text else sys.stdin.buffer.read().decode()
with open(log, "a") as file:
    file.write(repr((voice, rate, text)) + "\\n")
if "crash" in text:
    sys.exit("this word hurts")
seconds = 0 if "nothing" in text else len(text) / 15 / float(rate)
if "stay silent" not in text:
    pitch = {{"anna": 220, "bob": 110}}[voice]
    tone = [int(9000 * math.sin(2 * math.pi * pitch * i / 8000)) for i in range(int(8000 * seconds))]
    with wave.open(wav, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(struct.pack(f"<{{len(tone)}}h", *tone))
"""


FLITE = """#!{python} -S
import os, struct, sys, wave
if "--version" in sys.argv:
    sys.exit(print("version: flite-2.2"))
with open("{log}", "a") as file:
    file.write(repr([part for part in sys.argv[1:] if not part.endswith(".wav")]) + "\\n")
if len(open("{log}").readlines()) >= 7 and not os.path.exists("{log}.broken"):
    os.close(os.open("{log}.broken", os.O_CREAT | os.O_EXCL))
    sys.exit("it broke down")
wav = next(part for part in sys.argv if part.endswith(".wav"))
with wave.open(wav, "wb") as file:
    file.setparams((1, 2, 8000, 0, "NONE", ""))
    file.writeframes(struct.pack("<16000h", *(1000 * (i % 7) for i in range(16000))))
"""


@pytest.fixture
def engine(tmp_path):
    """The command template of the script, and a function that reads its log: (voice, rate, text) of each call."""
    script = tmp_path / "my tts"
    script.write_text(ENGINE.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"

    def calls():
        return sorted(eval(line) for line in log.read_text().splitlines()) if log.exists() else []

    return f"'{script}' {{voice}} {{rate}} {{wav}} '{log}' {{text}}", calls


def speak(engine, texts, output, **options):
    voices = parse_voices(["anna=female", "bob=male"], own=True)
    return synthesise(texts, output, voices, engine=own_engine(engine[0]), progress=False, workers=2, **options)


def test_every_text_in_every_voice_at_every_rate(engine, tmp_path):
    rows = [
        {"text": "Where is Bob?", "task": "sqa", "question": "Who?", "answers": ["Bob"], "id": "a"},
        "A second text.",
    ]
    spoken = speak(engine, rows, tmp_path / "out", rates=(0.8, 1.0))
    assert [row["id"] for row in spoken.rows[:4]] == ["a anna 0.8", "a anna 1", "a bob 0.8", "a bob 1"]
    assert len(spoken.rows) == 8 and not spoken.set_aside and spoken.reused == 0
    assert len(engine[1]()) == 8
    first = spoken.rows[0]
    assert (first["speaker"], first["gender"], first["rate"]) == ("command:anna", "female", 0.8)
    assert first["question"] == "Who?" and first["answers"] == ["Bob"] and first["text"] == "Where is Bob?"
    for row in spoken.rows:
        samples, rate = soundfile.read(row["audio"])
        assert rate == 16_000 and len(samples) == pytest.approx(16_000 * row["duration"], abs=1)
        assert row["duration"] == pytest.approx(len(row["text"]) / 15 / row["rate"], abs=0.01)
        pitch = np.abs(np.fft.rfft(samples)).argmax() / row["duration"]
        assert pitch == pytest.approx({"female": 220, "male": 110}[row["gender"]], abs=2)
    read = load_rows(tmp_path / "out" / "manifest.jsonl")
    assert [row["id"] for row in read] == [row["id"] for row in spoken.rows]
    assert all(soundfile.info(row["audio"]).samplerate == 16_000 for row in read)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_the_text_reaches_the_engine_as_it_is(engine, tmp_path):
    texts = ["$(touch stolen); `id` && \"quoted\" 'twice' | {wav} {text}", "--help me", "two\nlines  and\tspaces"]
    speak(engine, texts, tmp_path / "out", takes=1)
    assert {text for *_, text in engine[1]()} == {texts[0], texts[1], "two lines and spaces"}
    without_text = engine[0].removesuffix(" {text}")
    speak((without_text, None), ["Größe über stdin"], tmp_path / "stdin", takes=1)
    assert "Größe über stdin" in {text for *_, text in engine[1]()}


def test_an_interrupted_run_goes_on_where_it_stopped(engine, tmp_path):
    texts = [f"Sentence number {number}." for number in range(6)]
    speak(engine, texts[:3], tmp_path / "out")
    half_written = tmp_path / "out" / "audio" / "ab" / ".rest.flac.123"
    half_written.parent.mkdir(exist_ok=True)
    half_written.write_bytes(b"half")
    spoken = speak(engine, texts, tmp_path / "out")
    assert spoken.reused == 6 and len(engine[1]()) == 12 == len(spoken.rows)
    next(iter((tmp_path / "out" / "audio").rglob("[!.]*.flac"))).unlink()
    assert speak(engine, texts, tmp_path / "out").reused == 11 and len(engine[1]()) == 13
    assert speak(engine, [*texts[:5], "Another one."], tmp_path / "out").reused == 10  # a changed text is spoken


@pytest.fixture
def flite_log(tmp_path, monkeypatch):
    """`flite` is a script that writes WAV files, and breaks down once, at the seventh; the cache is empty."""
    program, log = tmp_path / "bin" / "flite", tmp_path / "log"
    program.parent.mkdir()
    program.write_text(FLITE.format(python=sys.executable, log=log))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path / "cache"))
    return log


def test_an_interrupted_ready_made_set_goes_on_where_it_stopped(flite_log, monkeypatch):
    vocabulary = sorted({word for words in WORDS.values() for word in words if word.isalpha()})
    sentences = [{"id": str(i), "text": " ".join(vocabulary[5 * i : 5 * i + 5])} for i in range(36)]
    monkeypatch.setattr(variants, "wordnet_examples", lambda: sentences)
    options = {"voices": parse_voices(["flite:slt", "flite:rms"]), "rates": (1.0,), "progress": False}
    with pytest.raises(SynthesisError, match="broke down"):
        variants.spoken_traits(4, 2, **options)
    before = flite_log.read_text().splitlines()
    splits = variants.spoken_traits(4, 2, **options)
    spoken = flite_log.read_text().splitlines()
    assert [len(rows) for rows in splits.values()] == [8, 4] and all(Path(r["audio"]).is_file() for r in splits["test"])
    assert len(spoken) == 12 + 1 and len(set(spoken)) == 12 and before == spoken[: len(before)]  # the broken one again


def test_questions_in_a_voice_of_unknown_gender(flite_log, monkeypatch):
    monkeypatch.setattr(spoken_questions, "Answerer", lambda model: lambda rows: [row["target"] for row in rows])
    for voice, genders in (("flite:other", {None}), ("flite:other=female", {"female"})):  # two sets in the cache
        splits = spoken_questions.spoken_question_answering(2, 1, parse_voices([voice]), "llm", progress=False)
        rows = [row for split in splits.values() for row in split]
        assert {row.get("gender") for row in rows} == genders and {row["speaker"] for row in rows} == {"flite:other"}
        assert {row["rate"] for row in rows} == {1.0} and all(Path(row["audio"]).is_file() for row in rows)


def test_rates_that_espeak_ng_does_not_speak_are_refused(flite_log, tmp_path):
    slow = parse_voices(["flite:slt", "espeak-ng:en-us+f3"])
    for rates in ((0.3,), (1.0, 0.47)):
        with pytest.raises(SynthesisError, match=r"espeak-ng speaks no slower than 0\.48, 84 words per minute"):
            synthesise(["One line."], tmp_path / "out", slow, rates, progress=False)
        with pytest.raises(SynthesisError, match=r"no slower than 0\.48"):
            variants.spoken_traits(1, 1, slow, rates, progress=False)
    assert not flite_log.exists()
    check_rates((0.48, 2.6, 10), slow)
    assert len(synthesise(["One line."], tmp_path / "out", slow[:1], (0.3,), progress=False).rows) == 1


def test_one_recording_serves_equal_texts(engine, tmp_path):
    spoken = speak(engine, ["The same.", "The same."], tmp_path / "out", takes=None)
    assert len(spoken.rows) == 4 and len(engine[1]()) == 2
    assert len({row["id"] for row in spoken.rows}) == 4 and len({row["audio"] for row in spoken.rows}) == 2


def test_takes_are_drawn_by_seed_and_do_not_depend_on_the_other_texts(engine, tmp_path):
    texts = [{"id": f"t{number}", "text": f"Sentence number {number}."} for number in range(12)]
    drawn = [row["id"] for row in speak(engine, texts, tmp_path / "a", rates=(0.8, 1.2), takes=1).rows]
    assert len(drawn) == 12 and len({name.split(" ", 1)[1] for name in drawn}) == 4
    assert [row["id"] for row in speak(engine, texts[6:], tmp_path / "b", rates=(0.8, 1.2), takes=1).rows] == drawn[6:]
    other = [row["id"] for row in speak(engine, texts, tmp_path / "a", rates=(0.8, 1.2), takes=1, seed=1).rows]
    assert other != drawn


def test_bad_texts_are_set_aside_with_the_reason(engine, tmp_path):
    texts = [
        "",
        "  ",
        "?!",
        None,
        "nul \0 byte",
        "caf\ufffd",
        "x" * 1001,
        "crash here",
        "stay silent",
        "nothing",
        "fine",
    ]
    spoken = speak(engine, [{"text": text} for text in texts], tmp_path / "out", takes=1)
    assert [row["text"] for row in spoken.rows] == ["fine"]
    reasons = [item.reason for item in spoken.set_aside]
    for reason, word in zip(
        reasons,
        [
            "no text",
            "no text",
            "no letter",
            "no text",
            "control",
            "wrong encoding",
            "1001",
            "this word hurts",
            "wrote no",
        ],
        strict=False,
    ):
        assert word in reason
    assert len(reasons) == 10
    recorded = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    assert [item["reason"] for item in recorded] == reasons
    speak(engine, ["fine"], tmp_path / "out")
    assert not (tmp_path / "out" / "set_aside.jsonl").exists()  # it told of another run
    with pytest.raises(SynthesisError, match="row 1: there is no text"):
        speak(engine, ["fine", ""], tmp_path / "strict", strict=True)
    with pytest.raises(SynthesisError, match="this word hurts"):
        speak(engine, ["fine", "crash"], tmp_path / "strict", strict=True)


def test_a_broken_engine_stops_the_run_early(engine, tmp_path):
    with pytest.raises(SynthesisError, match="first 20 texts all failed.*this word hurts"):
        speak(engine, [f"crash {number}" for number in range(500)], tmp_path / "out", takes=1)
    assert len(engine[1]()) < 60
    with pytest.raises(SynthesisError, match="None of 2 text"):
        speak(engine, ["crash", ""], tmp_path / "out", takes=1)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("say {text}", "where {wav} goes"),
        ("say {wav} {loudness}", "no meaning for {loudness}"),
        ("say 'unclosed {wav}", "quotation"),
        ("no-such-program {wav} {text}", "no-such-program"),
    ],
)
def test_bad_templates(command, words):
    with pytest.raises(SynthesisError, match=words):
        own_engine(command)


def test_voices():
    found = parse_voices(["flite:slt", "flite:awb", "espeak-ng:en-us+f3", "espeak-ng:de+m7", "espeak-ng:fr"])
    assert [voice.gender for voice in found] == ["female", "male", "female", "male", None]
    names = ["flite:slt", "espeak-ng:fr=male", "espeak-ng:de"]
    assert [voice.with_gender for voice in parse_voices(names)] == names
    assert parse_voices(["flite:slt=female"])[0].with_gender == "flite:slt"
    for names, word in (
        (["slt"], "engine:name"),
        (["festival:x"], "engine:name"),
        (["flite:slt", "flite:slt"], "twice"),
    ):
        with pytest.raises(SynthesisError, match=word):
            parse_voices(names)
    with pytest.raises(SynthesisError, match="woman"):
        parse_voices(["anna=woman"], own=True)


def test_the_command_speaks_a_manifest_and_adds_conditions(engine, tmp_path, capsys):
    manifest = tmp_path / "texts.csv"
    manifest.write_text("id,text,question\na,Where is Anna?,Who?\nb,,Nothing\nc,The last one.,What?\n")
    command = [
        "synthesize",
        "--command",
        engine[0],
        "--voices",
        "anna=female",
        "bob",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--data", str(manifest), "--rates", "1", "1.5", "--snr", "clean", "5"]) == 0
    printed = capsys.readouterr().out
    assert "16 recording(s)" in printed and "1 set aside" in printed and "b: there is no text" in printed
    rows = load_rows(tmp_path / "out" / "manifest.jsonl")
    assert len(rows) == 16 and sum(row.get("snr_db") == 5 for row in rows) == 8
    assert {row["question"] for row in rows} == {"Who?", "What?"}
    lines = tmp_path / "texts.txt"
    lines.write_text("One line.\n\nAnother line.\n")
    assert main([*command, "--data", str(lines), "--takes", "1"]) == 0
    assert len(load_rows(tmp_path / "out" / "manifest.jsonl")) == 2


def test_the_command_speaks_data_with_other_names_of_columns(engine, tmp_path, datasets_cache):
    texts = ["Where is Anna?", "The last one."]
    data = datasets.Dataset.from_dict(
        {
            "sentence": texts,
            "who": ["x", "y"],
            "when": [datetime(2024, 1, 1)] * 2,  # which JSON cannot hold
            "audio": [{"bytes": b"another", "path": None}] * 2,
            "words": [[{"word": "Where", "start": 0.0, "end": 9.0}]] * 2,  # of that other recording
        }
    )
    (tmp_path / "repository").mkdir()
    data.to_parquet(tmp_path / "repository" / "test.parquet")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.csv").write_text("sentence,who\n" + "".join(f"{text},{who}\n" for text, who in zip(texts, "xy")))
    (tmp_path / "more.txt").write_text("One line.\n")
    columns = ["--columns", json.dumps({"text": "sentence"})]
    for number, (sources, expected) in enumerate(
        (
            ([f"{tmp_path / 'a.csv'}", *columns], texts),
            ([f"{tmp_path / 'a.csv'}?columns.text=sentence&only.who=y"], texts[1:]),
            ([f"hub:{tmp_path / 'repository'}?split=test", *columns], texts),
            ([f"{tmp_path / 'saved'}?split=test", f"{tmp_path / 'more.txt'}", *columns], [*texts, "One line."]),
            ([f"{tmp_path / 'saved'}?split=test&fraction=0.5", *columns], None),
        )
    ):
        out = tmp_path / f"out{number}"
        arguments = ["--command", engine[0], "--voices", "anna=female", "--output", str(out)]
        assert main(["synthesize", "--data", *sources, *arguments]) == 0
        rows = load_rows(out / "manifest.jsonl")
        assert [row["text"] for row in rows] == expected if expected else len(rows) == 1
        assert not {"when", "words", "sentence"} & rows[0].keys()
        assert rows[0]["who"] in "xy" and rows[0]["duration"] == pytest.approx(len(rows[0]["text"]) / 15, abs=0.01)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "--data"),
        (["--data", "TABLE.CSV"], 1, "has no column `text`, but 'sentence'"),
        (["--data", "TABLE.CSV", "--columns", "text"], 2, "is not JSON"),
        (["--wordnet", "3", "--columns", "{}"], 2, "--columns names the columns of --data"),
        (["--data", "nobody/nothing"], 1, "hub:nobody/nothing"),
        (["--data", "nowhere.txt"], 1, "nowhere.txt"),
        (["--data", "TEXTS", "--rates", "0"], 1, "rates"),
        (["--data", "TEXTS", "--takes", "9"], 1, "9 takes"),
        (["--data", "TEXTS", "--snr", "loud"], 2, "loud"),
        (["--questions", "3", "2", "--rates", "2"], 2, "--rates does not go"),
        (
            ["--traits", "3", "2", "--voices", "flite:slt", "espeak-ng:en-us"],
            2,
            "e.g. espeak-ng:en-us=female, or leave",
        ),
        (["--traits", "3", "2", "--voices", "espeak-ng:en-us=male", "--rates", "0.4"], 1, "no slower than 0.48"),
        (["--wordnet", "0"], 2, "above 0"),
        (["--data", "EMPTY"], 1, "has no text"),
        (["--data", "LATIN"], 1, "not UTF-8"),
    ],
)
def test_usage_errors(options, code, words, engine, tmp_path, capsys):
    (tmp_path / "TEXTS").write_text("One line.\n")
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "LATIN").write_bytes("Größe\n".encode("latin-1"))
    (tmp_path / "TABLE.CSV").write_text("sentence\nOne line.\n")
    options = [str(tmp_path / option) if option.isupper() else option for option in options]
    if "--data" in options:
        options += ["--command", engine[0]]
    try:
        found = main(["synthesize", *options, "--output", str(tmp_path / "out")])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert found == code and words in error and "Traceback" not in error
