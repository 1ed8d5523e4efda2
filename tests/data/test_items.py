"""Items and batches: placeholder counts, frames and features mixed, set-aside items, padding."""

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_processor, tone
from tiny_training import tiny_rows, tiny_trainable

from speechllm.data.items import AlignmentItems, AnswerItems, SpeechCollator, approximate_length
from speechllm.data.schema import SetAside
from speechllm.trainers.frozen_states import fill_frame_cache, frame_cache


@pytest.mark.parametrize("speech", ["hubert-layer", "whisper"])
@pytest.mark.parametrize("cached", [False, True])
def test_placeholders_are_as_many_as_speech_tokens(tmp_path, speech, cached):
    model = tiny_trainable(speech=speech)
    processor = tiny_processor(model.config, segment_seconds=0.5)
    rows = [{"audio": tone(seconds), "text": "hi"} for seconds in (0.1, 0.33, 1.7)]  # the last in four segments
    frames = None
    if cached:
        frames = frame_cache(str(tmp_path), model.model, processor)
        assert fill_frame_cache(frames, rows_with_ids(rows), model.model, processor) == []
    for dataset in (AlignmentItems(rows, processor, frames, prefix=[5]), AnswerItems(rows, processor, frames)):
        batch = SpeechCollator(dataset)([dataset[i] for i in range(3)])
        inputs = {k: v for k, v in batch.items() if k.startswith(("input_", "speech_"))}
        assert ("speech_frames" in inputs) == cached
        with torch.no_grad():
            model.model(**inputs, attention_mask=batch["attention_mask"])  # raises on a mismatch
        found = (batch["input_ids"] == processor.audio_token_id).sum(-1).tolist()
        assert found == [processor.count_speech_tokens(len(row["audio"])) for row in rows]


def rows_with_ids(rows):
    return [{"id": str(i), **row} for i, row in enumerate(rows)]


def test_frames_and_features_in_one_batch(tmp_path):
    """What the cache lacks goes through the encoder, with the whole of its batch."""
    model = tiny_trainable()
    processor = tiny_processor(model.config)
    rows = tiny_rows(3)
    frames = frame_cache(str(tmp_path), model.model, processor)
    fill_frame_cache(frames, rows[:2], model.model, processor)
    dataset = AlignmentItems(rows, processor, frames, prefix=[5])
    mixed = SpeechCollator(dataset)([dataset[i] for i in range(3)])
    plain = AlignmentItems(rows, processor, prefix=[5])
    expected = SpeechCollator(plain)([plain[i] for i in range(3)])
    assert "speech_frames" not in mixed
    assert mixed.keys() == expected.keys()
    torch.testing.assert_close(mixed["input_values"], expected["input_values"])
    torch.testing.assert_close(mixed["input_ids"], expected["input_ids"])


def test_set_aside_items_leave_the_batch():
    processor = tiny_processor(tiny_config("hubert-layer"))
    rows = tiny_rows(3)
    rows[1]["audio"] = np.zeros(3200, np.float32)
    dataset = AnswerItems(rows, processor)
    items = [dataset[i] for i in range(3)]
    assert isinstance(items[1], SetAside) and items[1].id == "utterance 1" and "silent" in items[1].reason
    batch = SpeechCollator(dataset)(items)
    assert batch["rows"] == [0, 2] and batch["set_aside"] == [items[1]] and batch["weight"] == 1.0
    empty = SpeechCollator(dataset)([items[1]])
    assert empty["rows"] == [0] and empty["weight"] == 0.0 and (empty["labels"] == -100).all()
    assert (SpeechCollator(dataset)([dataset[0]])["labels"] != -100).any()  # the stand-in itself is unharmed


@pytest.mark.parametrize("what", ["text", "further", "answer"])
def test_items_longer_than_the_context_are_set_aside(what):
    processor = tiny_processor(tiny_config("hubert-layer"))
    rows = tiny_rows(2)
    rows[1]["text"] *= 5

    def items(context):
        if what == "answer":
            return AnswerItems(rows, processor, None, context)
        further = {"teacher": lambda row, _: {"input_ids": [0] * (2 * len(row["text"]))}}
        return AlignmentItems(rows, processor, None, context, prefix=[5], further=further if what == "further" else {})

    text = len(rows[1]["text"])
    answer = len(AnswerItems(rows, processor)[1]["input_ids"])
    length = {"text": 1 + text, "further": 2 * text, "answer": answer}[what]
    assert not isinstance(items(length)[1], SetAside)
    dataset = items(length - 1)
    first, second = dataset[0], dataset[1]
    assert not isinstance(first, SetAside)
    assert (second.id, second.kind) == ("utterance 1", "longer than the LLM's context")
    assert f"utterance 1 takes more tokens than the {length - 1} of the LLM's context, " in second.reason


def test_answers_and_prompts():
    processor = tiny_processor(tiny_config("hubert-layer"))
    rows = tiny_rows(2)
    item = AnswerItems(rows, processor)[0]
    answer = [token for token in item["labels"] if token != -100]
    assert processor.tokenizer.decode(answer) == rows[0]["text"] + "<|im_end|>"
    prompt = AnswerItems(rows, processor, with_answer=False)
    assert prompt[0]["input_ids"] == item["input_ids"][: -len(answer)]
    batch = SpeechCollator(prompt, padding_side="left")([prompt[0], prompt[1]])
    assert batch["attention_mask"][:, -1].all() and "labels" not in batch


def test_prefix_and_text_side():
    processor = tiny_processor(tiny_config("hubert-layer"))
    dataset = AlignmentItems(tiny_rows(2), processor, prefix=[7, 8])
    batch = SpeechCollator(dataset)([dataset[0], dataset[1]])
    assert (batch["input_ids"][:, :2] == torch.tensor([7, 8])).all()
    assert (batch["text_input_ids"][:, :2] == torch.tensor([7, 8])).all()
    lengths = [2 + len(row["text"]) for row in tiny_rows(2)]  # a byte is a token
    assert batch["text_attention_mask"].sum(-1).tolist() == lengths


def test_lengths_for_sorting(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"x" * 77)
    assert approximate_length({"audio": str(tmp_path / "a.wav")}) == 77 / 32_000
    assert approximate_length({"audio": str(tmp_path / "nowhere.wav")}) == 0
    assert approximate_length({"audio": {"array": np.zeros(9), "sampling_rate": 1}}) == 9
    assert approximate_length({"audio": b"x", "duration": "3.5"}) == 3.5
