"""Generated passages and questions: extractive, deterministic, apart from each other."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import save_base_models

from speechllm import CheckpointError
from speechllm.data.prompts import chat_of
from speechllm.synthesis.passages import TEMPLATES, WORDS, generate_passages, question_rows
from speechllm.synthesis.spoken_questions import Answerer, _answerable, candidates, load_answers


def test_every_answer_stands_in_its_passage_and_not_in_its_question():
    rows = question_rows(generate_passages(400, seed=3), "train")
    for row in rows:
        assert re.search(rf"\b{re.escape(row['target'])}\b", row["text"]), row
        assert not re.search(rf"\b{re.escape(row['target'])}\b", row["question"]), row
        assert "{" not in row["text"] + row["question"]
        assert row["answers"] == [row["target"]] and len(row["text"].split()) <= 22
        chat_of({**row, "audio": "x.flac"})
    assert len({row["id"] for row in rows}) == len(rows)
    questions = {(row["passage_id"], row["question"]) for row in rows}
    assert len(questions) == len(rows)


def test_passages_are_the_same_for_the_same_seed():
    assert generate_passages(50, seed=1) == generate_passages(50, seed=1)
    assert generate_passages(50, seed=1) != generate_passages(50, seed=2)


def test_test_and_training_share_no_two_slot_values():
    test = generate_passages(60, "test 0")
    train = generate_passages(900, "train 0", test)
    forbidden = set().union(*(passage.pairs for passage in test))
    assert len({passage.text for passage in train}) == 900
    assert not any(passage.pairs & forbidden for passage in train)
    freely = generate_passages(900, "train 0")
    assert any(passage.pairs & forbidden for passage in freely)  # so the condition is not empty


def test_no_answer_can_be_guessed_from_the_question():
    """Within a template's question, the most frequent answer is rare."""
    passages = generate_passages(2000, seed=0)
    for number, (_, questions) in enumerate(TEMPLATES):
        of_template = passages[number :: len(TEMPLATES)]
        for place in range(len(questions)):
            answers = [passage.questions[place][1] for passage in of_template]
            most = max(answers.count(answer) for answer in answers) / len(answers)
            assert most < 0.35, questions[place]


def test_words_have_one_spelling_and_one_slot():
    for kind, words in WORDS.items():
        assert len(set(words)) == len(words) and all(re.fullmatch(r"[A-Za-z' ]+", word) for word in words), kind


def test_impossible_numbers_are_told():
    with pytest.raises(ValueError, match="Ask for fewer"):
        generate_passages(20, 0, apart_from=generate_passages(100_000 // 20, "other"))


def test_answers_of_an_interrupted_run_are_not_asked_again(tmp_path):
    asked = []

    def answerer(rows):  # knows every answer
        asked.extend(row["id"] for row in rows)
        return [row["target"] for row in rows]

    def interrupted(rows):
        if len(asked) > 60:
            raise RuntimeError("out of memory")
        return answerer(rows)

    arguments = (60, "train", candidates(60, "train"))
    with pytest.raises(RuntimeError, match="out of memory"):
        _answerable(*arguments, interrupted, tmp_path, progress=False)
    first = {*asked}
    asked.clear()
    passages, rows = _answerable(*arguments, answerer, tmp_path, progress=False)
    assert len(passages) == 60 and asked and not first & {*asked}
    asked.clear()
    assert _answerable(*arguments, answerer, tmp_path, progress=False) == (passages, rows) and not asked
    assert _answerable(*arguments, answerer, tmp_path / "anew", progress=False) == (passages, rows)


def test_answers_may_hold_any_line_break(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"id": "a", "answer": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_answers(path) == {"a": "one\u2028two"}


def test_a_pickled_llm_does_not_answer(tmp_path):
    save_base_models(tmp_path)
    weights = tmp_path / "llm/model.safetensors"
    torch.save(load_file(weights), tmp_path / "llm/pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"the LLM '.*pytorch_model.bin.* are pickled.*convert"):
        Answerer(str(tmp_path / "llm"))
