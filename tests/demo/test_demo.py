"""The demo without a browser: what it answers, what it refuses and in which words, and the Space around it."""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'speechllm[demo]'")

import gradio as gr
from huggingface_hub import SpaceCard
from transformers import AutoProcessor

from speechllm import SpeechLLMForConditionalGeneration
from speechllm.audio_speechllm import AudioError
from speechllm.cli import main
from speechllm.evaluation.transcription import Transcriber
from speechllm.hub.demo import Demo, DemoError, as_message, demo_page, draw


SPACE = Path(__file__).parents[2] / "space"


@pytest.fixture(scope="module")
def demo(checkpoint):
    model = SpeechLLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    return Demo(model, AutoProcessor.from_pretrained(checkpoint), max_audio_seconds=10.0)


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        ("Transcribe", None),
        ("Translate", "Translate the speech into Welsh."),
        ("Ask a question", "Who speaks?"),
    ],
)
def test_answer_grows_into_that_of_generate(demo, checkpoint, recordings, task, prompt):
    answers = list(demo.answer(str(recordings / "good.wav"), task, " Welsh ", "Who\nspeaks?"))
    expected = Transcriber(checkpoint)(recordings / "good.wav", prompt=prompt)
    assert answers[-1].strip() == expected and "a" in expected
    assert len(answers) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(answers))


def test_leaving_ends_the_answer(demo, recordings):
    answer = demo.answer(str(recordings / "good.wav"), "Transcribe", "", "")
    so_far = next(answer)
    answer.close()
    alignment = demo.align(str(recordings / "good.wav"), "abc")  # waits until the model is free
    assert len(so_far) < 50 and alignment.tokens == ["a", "b", "c"]


def test_what_was_superseded_or_stopped_while_it_waited_is_not_answered(demo, recordings):
    """And the last one once, by whichever click's turn comes first."""
    page = {function.name: function for function in demo_page(demo, "tiny").fns.values()}
    assert [page[name].trigger_mode for name in ("begin", "answer", "end")] == ["multiple"] * 3  # no click is ignored
    begin, answer, end = (page[name].fn for name in ("begin", "answer", "end"))

    nothing = [(gr.skip(), gr.skip())]

    def click(last, question):
        return asyncio.run(begin(last, str(recordings / "good.wav"), "Ask a question", "", question))

    first = click(None, "Who?")
    second = click(first, "Where?")
    assert first.ended and list(answer(first)) == nothing
    expected = list(demo.answer(str(recordings / "good.wav"), "Ask a question", "", "Where?"))
    assert [text for text, _ in answer(second)][1:] == expected
    assert list(answer(second)) == nothing
    third = click(second, "When?")
    asyncio.run(end(third))
    assert list(answer(third)) == nothing


def test_failure_of_the_model_is_told_and_frees_it(demo, recordings, monkeypatch):
    monkeypatch.setattr("speechllm.hub.demo.MAX_NEW_TOKENS", -1)  # `generate` refuses it
    with pytest.raises(ValueError) as error:
        list(demo.answer(str(recordings / "good.wav"), "Transcribe", "", ""))
    assert "The model failed on this input (ValueError)" in as_message(error.value)
    assert not demo.busy.locked()


@pytest.mark.parametrize(
    ("recording", "error", "words"),
    [
        (None, DemoError, "There is no recording"),
        ("bad.wav", AudioError, "not audio that can be decoded"),
        ("long.wav", AudioError, "longer than 10 seconds"),
    ],
)
def test_recordings_refused(demo, recordings, recording, error, words):
    path = recording and str(recordings / recording)
    with pytest.raises(error, match=words):
        next(demo.answer(path, "Transcribe", "", ""))
    with pytest.raises(error, match=words):
        demo.align(path, "a sentence")


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), (" \n ", "is empty"), (None, "is empty"), ("a" * 301, "shorten"), ("<|audio|>", "leave it out")],
)
def test_texts_refused(demo, recordings, text, words):
    path = str(recordings / "good.wav")
    for attempt in (
        lambda: demo.align(path, text),
        lambda: next(demo.answer(path, "Translate", text, "")),
        lambda: next(demo.answer(path, "Ask a question", "", text)),
    ):
        with pytest.raises(DemoError, match=words):
            attempt()


def test_messages_are_escaped():
    assert "&lt;script&gt;" in as_message(DemoError("<script>"))


def test_each_layer_has_its_drawing(demo, recordings):
    alignment = demo.align(str(recordings / "good.wav"), "abc")
    assert draw(None, 0) == ("", "")
    drawings = [draw(alignment, layer) for layer in range(demo.layers + 1)]
    assert len(set(drawings)) == demo.layers + 1 == 4
    assert f"cost {alignment.transport_cost(3):.2f}" in drawings[3][1]


def test_taken_port(checkpoint, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert main(["demo", "--model", str(checkpoint), "--port", port]) == 1
    assert f"port {port}: it is taken" in capsys.readouterr().err


# ---- the Space -------------------------------------------------------------------------------------------------------


def test_space_card():
    card = SpaceCard.load(SPACE / "README.md").data
    assert card.sdk == "gradio" and (SPACE / card.app_file).is_file()
    assert len(card.short_description) <= 60  # the Hub's limit
    assert (SPACE / "requirements.txt").read_text().split() == ["speechllm[demo]"]


def test_space_needs_a_model():
    environment = {name: value for name, value in os.environ.items() if name != "MODEL_ID"}
    found = subprocess.run([sys.executable, SPACE / "app.py"], env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1].startswith("MODEL_ID is not set")
