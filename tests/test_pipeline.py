"""Pipelines: Transformers' own with a chat, and the one that travels with a checkpoint, against plain `generate`."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny import enliven, tiny_model, tiny_processor, tone
from transformers import pipeline
from without_package import run_without_package

from speechllm import AudioError
from speechllm.audio_speechllm import cut_at_pauses
from speechllm.pipeline_speechllm import PROMPT, SpeechLLMPipeline


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A checkpoint's folder, and its model and processor."""
    folder = tmp_path_factory.mktemp("pipeline")
    model = enliven(tiny_model("whisper"))
    model.generation_config.eos_token_id = None  # full-length answers say more
    processor = tiny_processor(model.config)
    model.save_pretrained(folder / "model", kind="full")
    processor.save_pretrained(folder / "model")
    return folder, model, processor


@pytest.fixture(scope="module")
def pipe(parts):
    return pipeline("audio-text-to-text", model=str(parts[0] / "model"), trust_remote_code=True, device="cpu")


def expected(parts, samples, prompt=PROMPT, tokens=8):
    _, model, processor = parts
    chat = [{"role": "user", "content": [{"type": "audio", "audio": samples}, {"type": "text", "text": prompt}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output, skip_special_tokens=True).strip()


OPTIONS = dict(max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize(
    "give",
    [
        lambda x, path: str(path),
        lambda x, path: path,
        lambda x, path: path.read_bytes(),
        lambda x, path: x,
        lambda x, path: torch.from_numpy(x),
        lambda x, path: x.tolist(),
        lambda x, path: {"array": x, "sampling_rate": 16_000},
        lambda x, path: {"audio": x},
    ],
    ids=["str", "path", "bytes", "array", "tensor", "numbers", "dict", "dict with audio"],
)
def test_one_audio(parts, pipe, tmp_path, give):
    samples = tone(0.7, seed=1)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    answer = pipe(give(samples, tmp_path / "a.wav"), **OPTIONS)
    assert answer == {"text": expected(parts, samples)} and len(answer["text"]) > 3


def test_prompts_and_rates(parts, pipe):
    samples = tone(0.7, seed=1)
    other = expected(parts, samples, "Translate.")
    assert other != expected(parts, samples)
    assert pipe(samples, prompt="Translate.", **OPTIONS)["text"] == other
    assert pipe([{"audio": samples, "prompt": "Translate."}, samples], **OPTIONS) == [
        {"text": other}, {"text": expected(parts, samples)}
    ]  # fmt: skip
    assert pipe(samples, generate_kwargs=OPTIONS)["text"] == expected(parts, samples)
    fast = pipe(samples, sampling_rate=32_000, **OPTIONS)["text"]
    assert fast == pipe({"array": samples, "sampling_rate": 32_000}, **OPTIONS)["text"] != expected(parts, samples)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_lists_and_batches(parts, pipe, batch_size):
    audios = [tone(0.3 + 0.2 * (i % 3), seed=i) for i in range(5)]
    answers = [{"text": expected(parts, audio)} for audio in audios]
    assert pipe(audios, batch_size=batch_size, **OPTIONS) == answers
    assert len({answer["text"] for answer in answers}) > 3


def test_a_generator_is_read_as_answers_are_asked_for(parts, pipe):
    read = []

    def audios():
        for i in range(4):
            read.append(i)
            yield tone(0.4, seed=i)

    answers = pipe(audios(), batch_size=2, **OPTIONS)
    assert read == []
    assert next(answers)["text"] == expected(parts, tone(0.4, seed=0)) and read == [0, 1]
    assert len(list(answers)) == 3 and read == [0, 1, 2, 3]
    assert pipe([], **OPTIONS) == []


def test_long_audio_in_chunks_with_progress(parts, pipe, capsys):
    pause = np.full(3200, 1e-4, dtype=np.float32)
    samples = np.concatenate([tone(1.6, seed=1), pause, tone(1.7, seed=2), pause, tone(1.2, seed=3)])
    seen = []
    answer = pipe(
        [samples, tone(0.5)], chunk_length_s=2, batch_size=2, progress=lambda done, known: seen.append((done, known)),
        **OPTIONS,
    )[0]  # fmt: skip
    spans = [chunk["timestamp"] for chunk in answer["chunks"]]
    assert spans[0][0] == 0 and spans[-1][1] == len(samples) / 16_000
    for (start, end), (following, _) in itertools.pairwise(spans):
        assert end == following and end - start <= 2
    assert 1.6 <= spans[0][1] <= 1.8 and 3.5 <= spans[1][1] <= 3.7, "not cut in the pauses"
    for chunk in answer["chunks"]:
        start, end = (round(16_000 * t) for t in chunk["timestamp"])
        assert chunk["text"] == expected(parts, samples[start:end])
    assert answer["text"] == " ".join(chunk["text"] for chunk in answer["chunks"])
    assert seen[-1][0] == pytest.approx(seen[-1][1]) == pytest.approx(len(samples) / 16_000 + 0.5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) == 4
    pipe(samples, chunk_length_s=2, progress=True, **OPTIONS)
    assert "100%" in capsys.readouterr().err


def test_a_piece_is_not_judged_as_a_recording(parts, pipe):
    """Of a square wave one would say that it is clipped beyond use."""
    square = (0.3 * np.sign(np.sin(np.arange(48_000) / 20))).astype(np.float32)
    samples = np.concatenate([tone(1.0), square, tone(1.0, seed=1)])
    with pytest.raises(ValueError, match="clipped"):
        pipe(square)
    assert all(chunk["text"] for chunk in pipe(samples, chunk_length_s=1.5, **OPTIONS)["chunks"])


def test_a_recording_that_ends_muted_is_answered_whole(pipe):
    samples = np.concatenate([tone(3.0), np.zeros(48_000, np.float32)])
    chunks = pipe(samples, chunk_length_s=1.5, batch_size=1, **OPTIONS)["chunks"]
    assert chunks[0]["text"] and chunks[1]["text"] and chunks[-1]["text"] == ""


class Decoder:
    """As `datasets` gives audio: not a sequence, and not iterable, but with `[...]`."""

    def __init__(self, samples, rate):
        self.samples, self.rate = samples, rate

    def __getitem__(self, key):
        raise KeyError(key)

    def get_all_samples(self):
        if self.samples is None:
            raise RuntimeError("Could not open input file\n at ...")
        return SimpleNamespace(data=torch.from_numpy(self.samples)[None], sample_rate=self.rate)


def test_decoders_of_datasets(parts, pipe):
    samples = tone(1.0)
    decoder = Decoder(samples, 16_000)
    for given in (decoder, {"audio": decoder}):
        assert pipe(given, **OPTIONS)["text"] == expected(parts, samples)
    assert len(pipe([decoder, decoder], **OPTIONS)) == 2
    with pytest.raises(ValueError, match="The audio cannot be decoded: Could not open input file$"):
        pipe(Decoder(None, 16_000))


def test_an_answer_ends_with_the_context_and_cuts_no_other_short(pipe, monkeypatch):
    """A prompt that leaves no room for a whole answer is answered alone."""
    seen, generate = [], pipe.model.generate

    def noted(**inputs):
        seen.append((*inputs["input_ids"].shape, inputs["max_new_tokens"]))
        return generate(**inputs)

    monkeypatch.setattr(pipe.model, "generate", noted)
    pipe([tone(0.5), tone(2.0)], batch_size=2, max_new_tokens=1)
    ((_, length, _),) = seen
    seen.clear()
    monkeypatch.setattr(pipe.model.config.text_config, "max_position_embeddings", length + 3)
    short, long = tone(0.5), tone(2.0, seed=1)
    pipe([short, long, short, short], batch_size=4, max_new_tokens=8, do_sample=False)
    assert [(rows, tokens) for rows, _, tokens in seen] == [(1, 8), (1, 3), (2, 8)]
    assert seen[1][1] == length


def test_a_muted_stretch_is_answered_with_nothing(parts, pipe):
    """It is no bad audio, and a model would make something up."""
    samples = np.concatenate([tone(1.0), np.zeros(48_000, np.float32), tone(1.0, seed=1)])
    seen = []
    answer = pipe(samples, chunk_length_s=1.5, batch_size=2, progress=lambda *seconds: seen.append(seconds), **OPTIONS)
    assert seen[-1] == pytest.approx((5.0, 5.0))
    silent = [
        not np.ptp(samples[int(16_000 * a) : int(16_000 * b)]) for a, b in (c["timestamp"] for c in answer["chunks"])
    ]
    assert any(silent) and not all(silent)
    for chunk, is_silent in zip(answer["chunks"], silent):
        span = slice(*(round(16_000 * end) for end in chunk["timestamp"]))
        assert chunk["text"] == ("" if is_silent else expected(parts, samples[span]))


def test_the_installed_class_needs_no_remote_code(parts):
    own = pipeline("audio-text-to-text", str(parts[0] / "model"), pipeline_class=SpeechLLMPipeline, device="cpu")
    assert type(own) is SpeechLLMPipeline and type(own.model).__module__ == "speechllm.modeling_speechllm"
    assert own(tone(0.5), **OPTIONS)["text"] == expected(parts, tone(0.5))


def test_cutting_covers_all_and_leaves_no_scrap():
    generator = np.random.default_rng(0)
    for _ in range(200):
        samples = generator.standard_normal(generator.integers(500, 200_000)).astype(np.float32)
        longest = float(generator.uniform(0.3, 4))
        spans = cut_at_pauses(samples, longest)
        assert spans[0][0] == 0 and spans[-1][1] == len(samples)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        sizes = [end - start for start, end in spans]
        assert max(sizes) <= round(longest * 16_000) and (len(spans) == 1 or min(sizes) >= 400)


def test_what_cannot_be_answered(pipe, tmp_path):
    with pytest.raises(ValueError, match="there is no such file") as error:
        pipe(str(tmp_path / "absent.wav"))
    assert type(error.value).__name__ == AudioError.__name__
    with pytest.raises(ValueError, match="longer than 1 seconds"):
        pipe(tone(1.1), max_audio_s=1)
    with pytest.raises(ValueError, match="context of 4,096.*chunk_length_s"):
        pipe(tone(500.0, seed=3))
    with pytest.raises(ValueError, match="too short"):
        pipe(tone(1.1), chunk_length_s=0.1)
    with pytest.raises(ValueError, match="one answer to each audio"):
        pipe(tone(1.1), num_beams=2, num_return_sequences=2)


WITHOUT_PACKAGE = """
import json
import numpy as np
from transformers import pipeline
signal = np.sin(np.arange(40000) ** 1.3 / 50).astype(np.float32)
options = dict(max_new_tokens=6, do_sample=False)
chat = [{"role": "user", "content": [{"type": "audio", "audio": signal}, {"type": "text", "text": "Transcribe."}]}]
pipe = pipeline("any-to-any", model="model", trust_remote_code=True, device="cpu")
assert type(pipe.model).__module__.startswith("transformers_modules.")
answers = [pipe(chat, return_full_text=False, **options)[0]["generated_text"]]
assert pipe([chat, chat], return_full_text=False, **options)[1][0]["generated_text"] == answers[0]
named = pipeline("audio-text-to-text", model="model", trust_remote_code=True, device="cpu", **options)
assert type(named).__module__.startswith("transformers_modules.")
answers.append(named(signal, prompt="Transcribe.")["text"])
alone = pipeline(model="model", trust_remote_code=True, device="cpu", prompt="Transcribe.", **options)
answers += [answer["text"] for answer in alone([signal, signal], batch_size=2)]
long = alone(np.tile(signal, 4), chunk_length_s=3)
assert len(long["chunks"]) >= 4
alone.save_pretrained("again")
answers.append(pipeline(model="again", trust_remote_code=True, device="cpu")(signal, prompt="Transcribe.", **options)["text"])
assert "speechllm" not in sys.modules
print(json.dumps(answers))
"""


def test_both_pipelines_where_the_package_is_not_installed(parts):
    answers = run_without_package(WITHOUT_PACKAGE, parts[0])
    assert len(answers) == 5 and len({answer.strip() for answer in answers}) == 1 and answers[0].strip()
