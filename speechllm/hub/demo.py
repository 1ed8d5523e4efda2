"""A page to try a checkpoint in a browser: ask it about a recording, and see where speech and text meet inside the LLM.

`speechllm demo` shows it on this machine and `space/app.py` as a Space on the Hub.

1. The page reads nothing from the network: system fonts, no analytics, no share link.
2. A recording is bounded in bytes by the server, in seconds by the decoder, and checked as soon as it is there. Whatever
   is wrong is said in one sentence below the button.
3. The model runs for one visitor at a time. An answer is generated in a thread of its own, which ends within a token of
   being stopped.
4. The layers of an utterance and a sentence are computed once; the slider only draws.
"""

import asyncio
import html
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from transformers import AutoProcessor, StoppingCriteriaList, TextIteratorStreamer

from ..audio_speechllm import load_audio
from ..configuration_speechllm import AUDIO_TOKEN
from ..data.prompts import chat_of, shared_prefix
from ..evaluation.alignment import Alignment, align, plan_figure, similarity_figure
from ..evaluation.plots import colour_variables, inline_svg, svg_document
from ..modeling_speechllm import SpeechLLMForConditionalGeneration


logger = logging.getLogger(__name__)

TASKS = {"Transcribe": "asr", "Translate": "st", "Ask a question": "sqa"}
MAX_NEW_TOKENS, MAX_SECONDS_OF_ANSWER = 256, 120.0
LONGEST_TEXT = 300  # characters of a question or a sentence
WAITING = 20  # visitors whose request may wait; more are told to come back
DRAWING = threading.Lock()  # matplotlib's settings are those of the whole process
KEPT = 3600  # seconds that recordings and alignments are kept for their visitor

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
STYLE = f"""
:root {{ {colour_variables(dark=False)} --plot-font: var(--font); }}
.dark {{ {colour_variables(dark=True)} }}
.gradio-container {{ max-width: 1080px !important; margin: 0 auto !important; }}
.html-container {{ padding: 0 !important; }}
#answer-message:not(:has(.message)), #alignment-message:not(:has(.message)) {{ display: none; }}
#recording .source-selection button {{ width: 44px; height: 40px; display: inline-flex; align-items: center;
    justify-content: center; }}
#recording .source-selection button svg {{ width: 20px; height: 20px; }}
.message {{ margin: 0; padding: 0.6em 0.9em; border-left: 3px solid var(--plot-red); color: var(--body-text-color);
    overflow-wrap: anywhere; }}
figure.alignment {{ margin: 0; color: var(--body-text-color); }}
figure.alignment figcaption {{ margin-bottom: 0.4em; }}
figure.alignment svg {{ display: block; width: 100%; max-width: 560px; height: auto; }}
:focus-visible {{ outline: 2px solid var(--plot-blue) !important; outline-offset: 2px; }}
"""
# Gradio puts every radio button into a group of its own, so that arrow keys do not lead from one to the next.
ARROW_KEYS = """
() => document.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step || !event.target.closest("#task")) return;
    event.preventDefault();
    const tasks = [...document.querySelectorAll("#task input")];
    const next = tasks.at((tasks.indexOf(event.target) + step) % tasks.length);
    next.focus();
    next.click();
})
"""


class DemoError(ValueError):
    """What the visitor has to change, in one sentence."""


class Demo:
    """The page's functions, without the page.

    Args:
        model, processor: a model in evaluation mode and its processor.
        max_audio_seconds: longest recording to accept.
    """

    def __init__(self, model, processor, max_audio_seconds: float = 60.0):
        self.model, self.processor, self.max_audio_seconds = model, processor, max_audio_seconds
        self.layers = len(model.model.llm_layers)
        self.busy = threading.Lock()  # reading states at some layers changes the LLM while it runs
        try:
            self.prefix = shared_prefix("auto", processor)
        except ValueError:  # this LLM's user turns open with nothing
            self.prefix = []

    def load(self, path: str | None) -> np.ndarray:
        """Samples (samples,) at 16 kHz of a recording.

        Raises:
            DemoError, AudioError: if there is none, or it cannot be used.
        """
        if not path or not Path(path).is_file():  # old ones are deleted
            raise DemoError("There is no recording: record one or upload a file first.")
        return load_audio(
            Path(path).read_bytes(),
            name="The recording",
            shortest=self.processor.shortest,
            max_seconds=self.max_audio_seconds,
        )

    def answer(self, path: str | None, task: str, language: str, question: str) -> Iterator[str]:
        """The answer so far, again and again as it grows.

        Raises:
            DemoError, AudioError: if the recording or the text cannot be used.
        """
        row = {"id": "the recording", "audio": self.load(path), "task": TASKS[task]}
        if task == "Translate":
            row["target_language"] = checked_text(language, "language")
        if task == "Ask a question":
            row["question"] = checked_text(question, "question")
        inputs = self.processor.apply_chat_template(
            chat_of(row, with_answer=False), add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(self.model.device)
        text = ""
        for piece in self._generate(inputs):
            text += piece
            yield text
        if not text.strip():
            yield "(The model answered with nothing.)"

    def _generate(self, inputs) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        left, errors = threading.Event(), []

        def reader_left(input_ids, scores, **kwargs) -> torch.Tensor:
            return torch.full((len(input_ids),), left.is_set(), device=input_ids.device)

        def work() -> None:
            try:
                with self.busy:
                    self.model.generate(
                        **inputs,
                        streamer=streamer,
                        do_sample=False,
                        max_new_tokens=MAX_NEW_TOKENS,
                        max_time=MAX_SECONDS_OF_ANSWER,
                        stopping_criteria=StoppingCriteriaList([reader_left]),
                    )
            except Exception as error:
                errors.append(error)
                streamer.end()

        threading.Thread(target=work, name="answer", daemon=True).start()
        try:
            yield from streamer
        finally:
            left.set()
        if errors:
            raise errors[0]

    def align(self, path: str | None, sentence: str) -> Alignment:
        """Recording and sentence at all layers.

        Raises:
            DemoError, AudioError: if one of them cannot be used.
        """
        samples, sentence = self.load(path), checked_text(sentence, "sentence")
        with self.busy:
            return align(self.model, self.processor, samples, sentence, self.prefix)


def checked_text(text: str | None, name: str) -> str:
    """The text on one line.

    Raises:
        DemoError: if it is empty, too long, or holds the placeholder of audio.
    """
    text = " ".join((text or "").split())
    if not text:
        raise DemoError(f"The {name} is empty: type one first.")
    if len(text) > LONGEST_TEXT:
        raise DemoError(f"The {name} has {len(text)} characters: shorten it to {LONGEST_TEXT}.")
    if AUDIO_TOKEN in text:
        raise DemoError(f"The {name} holds {AUDIO_TOKEN}, which stands for audio: leave it out.")
    return text


@dataclass
class Request:
    """An answer that is being given or waits for its turn, and what was asked. Gradio's own way to stop one, `cancels`, is
    an error in the browser when the answer has just ended."""

    asked: tuple[str | None, str, str, str]  # see `Demo.answer`
    begun: bool = False
    ended: bool = False
    seen: bool = True  # whether the page still shows it


# ---- page ------------------------------------------------------------------------------------------------------------


def demo_page(demo: Demo, name: str) -> gr.Blocks:
    """The page around a `Demo`; `name` is what it calls the model."""

    async def begin(last, *asked):  # coroutines, as these run in the order of the clicks, and threads need not
        await end(last)
        return Request(asked)

    async def end(request, seen=True):
        if request is not None:
            request.ended, request.seen = True, seen

    async def check(path, request):
        """A new recording, or none: what is shown of the last one goes."""
        await end(request, seen=False)
        message = ""
        try:
            if path:
                await asyncio.to_thread(demo.load, path)
        except Exception as error:
            message = as_message(error)
        return message, "", None, "", "", ""

    def answer(request):  # the last one, by the time that the model is free: another may have waited for it too
        if request.begun or request.ended:
            yield gr.skip(), gr.skip()  # a generator of nothing would empty the page
            return
        request.begun = True
        yield "", ""
        try:
            for text in itertools.takewhile(lambda _: not request.ended, demo.answer(*request.asked)):
                yield text, ""
        except Exception as error:
            yield "", as_message(error)
        if not request.seen:
            yield "", gr.skip()  # the page shows the last thing it was sent once more, after it was cleared

    def compare(path, sentence, layer):
        try:
            alignment = demo.align(path, sentence)
        except Exception as error:
            return None, "", "", as_message(error)
        return alignment, *draw(alignment, layer), ""

    with gr.Blocks(
        title=f"{name}: speech and text in one LLM", analytics_enabled=False, delete_cache=(KEPT, KEPT)
    ) as page:
        gr.Markdown(
            f"# {html.escape(name)}\nA text LLM that hears: give it a recording of up to {demo.max_audio_seconds:g} "
            "seconds and a task, then see where speech and text meet inside it."
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                recording = gr.Audio(
                    sources=["upload", "microphone"],
                    type="filepath",
                    label="Recording",
                    editable=False,
                    buttons=[],
                    elem_id="recording",
                )
            with gr.Column(min_width=300):
                task = gr.Radio(list(TASKS), value="Transcribe", label="Task", elem_id="task")
                language = gr.Textbox("German", label="Into which language?", max_lines=1, visible=False)
                question = gr.Textbox(
                    label="Question", placeholder="What is the speaker asking for?", max_lines=3, visible=False
                )
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=120)
                answer_message = gr.HTML(elem_id="answer-message")
                answer_text = gr.Textbox(label="Answer", lines=3, interactive=False, elem_id="answer")
        gr.Markdown(
            "## Where speech and text meet\nType what was said, or something else. At each layer of the LLM, the heat map "
            "compares every speech token with every token of the sentence; the transport plan moves the speech onto the "
            "sentence at the least cost."
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                sentence = gr.Textbox(label="Sentence", placeholder="What was said", max_lines=3)
                show = gr.Button("Compare")
            with gr.Column(min_width=300):
                layer = gr.Slider(
                    0,
                    demo.layers,
                    value=demo.layers // 2,
                    step=1,
                    label="Layer",
                    info=f"0: what enters the LLM, {demo.layers}: what leaves it",
                )
        alignment_message = gr.HTML(elem_id="alignment-message")
        alignment = gr.State(None, time_to_live=KEPT)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                heat_map = gr.HTML(elem_id="heat-map")
            with gr.Column(min_width=300):
                plan = gr.HTML(elem_id="plan")

        page.load(None, js=ARROW_KEYS)
        request = gr.State(None, time_to_live=KEPT)
        hidden = dict(api_visibility="private")  # a page for people; programs have the server and the pipeline
        model_runs = dict(hidden, concurrency_id="model", concurrency_limit=1)
        again = dict(trigger_mode="multiple")  # or a click while the last one is being answered would be ignored
        task.change(
            lambda chosen: (gr.update(visible=chosen == "Translate"), gr.update(visible=chosen == "Ask a question")),
            task,
            [language, question],
            show_progress="hidden",
            **hidden,
        )
        gr.on(
            [ask.click, question.submit, language.submit],
            begin,
            [request, recording, task, language, question],
            request,
            queue=False,
            show_progress="hidden",
            **again,
            **hidden,
        ).then(
            answer,
            request,
            [answer_text, answer_message],
            show_progress_on=answer_text,
            **again,
            **model_runs,
        )
        recording.change(
            check,
            [recording, request],
            [answer_message, answer_text, alignment, heat_map, plan, alignment_message],
            show_progress="hidden",
            queue=False,
            **hidden,
        )
        stop.click(end, request, queue=False, show_progress="hidden", **again, **hidden)
        gr.on(
            [show.click, sentence.submit],
            compare,
            [recording, sentence, layer],
            [alignment, heat_map, plan, alignment_message],
            show_progress_on=[heat_map, plan],
            trigger_mode="always_last",
            **model_runs,
        )
        layer.change(
            draw, [alignment, layer], [heat_map, plan], show_progress="hidden", trigger_mode="always_last", **hidden
        )
    return page.queue(max_size=WAITING)


def draw(alignment: Alignment | None, layer: int) -> tuple[str, str]:
    """Heat map and plan of one layer, as HTML; empty before there is anything to draw."""
    if alignment is None:
        return "", ""
    layer = int(layer)
    mean, cost = float(alignment.similarity[layer].mean()), alignment.transport_cost(layer)
    with DRAWING:
        return (
            _figure(
                "heat-map", f"Similarity at layer {layer}", f"mean {mean:.2f}", similarity_figure(alignment, layer)
            ),
            _figure("plan", f"Transport plan at layer {layer}", f"cost {cost:.2f}", plan_figure(alignment, layer)),
        )


def _figure(name: str, title: str, note: str, figure) -> str:
    picture = inline_svg(svg_document(figure), f"svg-{name}", f"{title}, {note}: speech by seconds, sentence by tokens")
    return f'<figure class="alignment"><figcaption><b>{title}</b>, {note}</figcaption>{picture}</figure>'


def as_message(error: Exception) -> str:
    """What the page says of an error. Ours explain themselves; of others the log has the rest."""
    if isinstance(error, ValueError) and type(error).__module__.startswith("speechllm"):
        text = str(error)
    else:
        logger.error("The demo failed.", exc_info=error)
        text = f"The model failed on this input ({type(error).__name__}): try another recording or text."
    return f'<p class="message" role="alert">{html.escape(text)}</p>'


def launch_demo(
    model: str | os.PathLike,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str | None = None,
    max_audio_seconds: float = 60.0,
    max_upload_mb: float = 25.0,
) -> None:
    """Show a checkpoint's page until a signal ends it.

    Args:
        model: checkpoint folder or Hub id.
        host: address to listen at. There is no authentication.
        port: default: the first free one from 7860.
        device: default: a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: if the checkpoint cannot be loaded.
        OSError: if the port is taken.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(model).to(device).eval()
    name = Path(os.path.abspath(model)).name if os.path.isdir(model) else str(model)
    page = demo_page(Demo(loaded, AutoProcessor.from_pretrained(model), max_audio_seconds), name)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            max_file_size=int(max_upload_mb * 2**20),  # the page tells it in these
            theme=gr.themes.Default(
                primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
            ),
            css=STYLE,
            footer_links=[],
            run_history=False,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise OSError(
            f"The page cannot be shown at port {port or '7860 to 7959'}: it is taken. Choose another."
        ) from error
    print(f"Showing {name} at {address} (stop with Ctrl-C)", flush=True)
    page.block_thread()
