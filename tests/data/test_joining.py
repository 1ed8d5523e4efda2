import pytest
import torch
from tiny import tiny_config, tiny_processor, tone

from speechllm.data.items import AnswerItems, SpeechCollator
from speechllm.data.joining import joined_rows


ROWS = [
    {"id": f"r{i}", "audio": tone(0.5 + 0.1 * i, i), "text": f"word{i}", "duration": 0.5 + 0.1 * i} for i in range(8)
]


def test_parts_are_heard_in_the_order_of_the_text():
    for row in joined_rows(ROWS, 50, maximum_seconds=2.0):
        assert 1 <= len(row["parts"]) <= 4
        assert row["text"] == " ".join(part["text"] for part in row["parts"])
        assert (
            row["duration"] == pytest.approx(sum(part["duration"] for part in row["parts"])) and row["duration"] <= 2.0
        )
        assert len({part["id"] for part in row["parts"]}) == len(row["parts"])


def test_a_seed_decides():
    def texts(seed):
        return [row["text"] for row in joined_rows(ROWS, 20, 2.0, seed)]

    assert texts(0) == texts(0) != texts(1)


def test_speech_of_a_joined_row_is_that_of_its_parts():
    processor = tiny_processor(tiny_config("whisper"))
    row = joined_rows(ROWS, 1, 2.0)[0]
    whole = AnswerItems([row], processor)
    parts = AnswerItems(row["parts"], processor)
    batch, apart = SpeechCollator(whole)([whole[0]]), SpeechCollator(parts)([parts[i] for i in range(len(parts))])
    assert torch.equal(batch["input_features"], apart["input_features"])
    count = [(b["input_ids"] == processor.audio_token_id).sum().item() for b in (batch, apart)]
    assert count[0] == count[1] > 0


def test_an_utterance_longer_than_the_limit_comes_alone():
    rows = joined_rows(ROWS, 20, maximum_seconds=0.9)
    assert {len(row["parts"]) for row in rows} == {1}
    assert max(row["duration"] for row in rows) > 0.9


def test_every_word_is_heard_about_as_often():
    rows = [{**ROWS[0], "text": "hello"}, {**ROWS[1], "text": "all of these words are one text"}]
    parts = [part["id"] for row in joined_rows(rows, 2000, maximum_seconds=0.1) for part in row["parts"]]
    assert parts.count("r1") / parts.count("r0") == pytest.approx(7, rel=0.3)


def test_no_rows_cannot_be_joined():
    with pytest.raises(ValueError, match="no rows to join"):
        joined_rows([], 1, maximum_seconds=1.0)
