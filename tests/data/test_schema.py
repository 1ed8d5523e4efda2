"""Manifests of every kind, and what is wrong with the wrong ones."""

import json

import pytest

from speechllm.data.prompts import chat_of
from speechllm.data.schema import ManifestError, load_rows, with_ids


ROWS = [
    {"audio": "a.wav", "text": "It's, well", "duration": 1.5},
    {"audio": "/far/b.wav", "text": 'say "hi"', "id": "b"},
]
LINES = {
    "jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "json": json.dumps(ROWS),
    "csv": 'audio,text,duration,id\na.wav,"It\'s, well",1.5,\n/far/b.wav,"say ""hi""",,b\n',
    "tsv": 'audio\ttext\tduration\tid\na.wav\tIt\'s, well\t1.5\t\n/far/b.wav\tsay "hi"\t\tb\n',
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("kind", LINES)
def test_every_kind_gives_the_same_rows(tmp_path, kind, mark):
    path = tmp_path / f"train.{kind.upper()}"
    path.write_text(mark + LINES[kind], encoding="utf-8")
    audio = str(tmp_path / "a.wav")
    assert load_rows(path) == [{**ROWS[0], "audio": audio, "id": audio}, ROWS[1]]


def test_a_quotation_mark_does_not_swallow_lines_of_a_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text('audio\ttext\na.wav\t"Hello\nb.wav\tthere"\n')
    assert [row["text"] for row in load_rows(tmp_path / "a.tsv")] == ['"Hello', 'there"']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such manifest"),
        ("a.txt", "", "not a manifest"),
        ("a.jsonl", '{"audio": "a.wav"}\n{"audio": ', "line 2 is not JSON"),
        ("a.jsonl", '{"audio": "a.wav"}\n\n{"text": "x"}', "line 3: there is no `audio`"),
        ("a.jsonl", '{"audio": 5}', "line 1: there is no `audio`"),
        ("a.jsonl", '"a.wav"', "line 1: there is no `audio`"),
        ("a.jsonl", '{"audio": "a", "duration": "long"}', "line 1: the duration is 'long'"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "holds a dict"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "audio,text\na.wav,one, two\n", "line 2 has more fields"),
        ("a.csv", 'audio,text\na.wav,"one\n', "line 2: unexpected end"),
        ("a.csv", 'audio,"te"xt\na.wav,one\n', "a.csv, line 1: "),
        ("a.csv", "path,text\na.wav,one\n", "line 2: there is no `audio`"),
        ("a.csv", b"audio,text\na.wav,caf\xe9\n", "is not UTF-8"),
    ],
)
def test_errors_name_the_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError, match=message) as error:
        load_rows(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_ids_are_unique_and_stay(tmp_path):
    rows = with_ids(
        [{"audio": "a.wav"}, {"audio": "a.wav"}, {"audio": b"x"}, {"audio": b"x", "id": 7}, {"audio": "a.wav"}]
    )
    assert [row["id"] for row in rows] == ["a.wav", "a.wav #2", "row 2", "7", "a.wav #3"]
    assert with_ids(rows) == rows


def test_chats():
    row = {"id": "x", "audio": "a.wav", "text": "hello"}
    user, assistant = chat_of(row)
    assert user["content"] == [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "Transcribe the speech."}]
    assert assistant == {"role": "assistant", "content": "hello"}
    translation = {**row, "task": "st", "target_language": "German", "target": "hallo"}
    assert chat_of(translation)[0]["content"][1]["text"] == "Translate the speech into German."
    assert chat_of(translation)[1]["content"] == "hallo"
    assert len(chat_of({"id": "x", "audio": "a.wav"}, with_answer=False)) == 1
    for wrong, message in (
        ({"task": "st"}, "target_language"),
        ({"task": "juggle"}, "no prompt"),
        ({"text": ""}, "learn"),
    ):
        with pytest.raises(ValueError, match=message):
            chat_of({**row, **wrong})
