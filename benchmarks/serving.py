"""What `speechllm serve` costs over bare `generate`, and what batching gains: ratios, and a JSON file.

*Overhead*: time of a chat request over loopback, divided by the time of the same work in this process (decoding the file,
features, prompt, `generate`). The two take turns on the same prompts.

*Gain*: requests per second with 1, 4 and 16 clients that ask without pause, divided by that with one. Answers have a fixed
number of tokens, so that every run does the same work; the server runs in a process of its own on the same cores.

    python -m benchmarks.serving --model DIR
"""

import argparse
import base64
import io
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import soundfile
import torch
from transformers import AutoProcessor

from speechllm import SpeechLLMForConditionalGeneration


PROMPT = "Transcribe the speech."


def utterance(seed: int, seconds: float) -> bytes:
    """A WAV file of noise with the envelope of syllables; what is said matters to no timing here."""
    generator = np.random.default_rng(seed)
    time_axis = np.arange(int(seconds * 16_000)) / 16_000
    samples = generator.standard_normal(len(time_axis)) * (0.1 + 0.1 * np.sin(2 * np.pi * 4 * time_axis))
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    return file.getvalue()


class Bare:
    """The work of a request without a server."""

    def __init__(self, model: str, tokens: int):
        self.model = SpeechLLMForConditionalGeneration.from_pretrained(model).eval()
        self.model.generation_config.eos_token_id = None
        self.processor, self.tokens = AutoProcessor.from_pretrained(model), tokens

    def __call__(self, audio: bytes) -> str:
        parts = [{"type": "audio", "audio": audio}, {"type": "text", "text": PROMPT}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Served:
    """A running server, as a client sees it."""

    def __init__(self, model: str, tokens: int, batch_size: int):
        self.tokens = tokens
        command = [sys.executable, "-m", "speechllm", "serve", "--model", model, "--port", "0", "--timeout", "600"]
        command += ["--max-batch-size", str(batch_size)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        found = re.match(r"Serving (\S+) at (\S+) ", line)
        if not found:
            raise RuntimeError(f"The server did not start: {line!r}")
        self.name, self.address = found.groups()

    def __call__(self, audio: bytes) -> str:
        part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(audio).decode(), "format": "wav"}}
        content = [part, {"type": "text", "text": PROMPT}]
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "max_tokens": self.tokens}
        request = Request(
            f"{self.address}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urlopen(request, timeout=600) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    def requests_per_second(self, audios: list[bytes], clients: int) -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(self, audios))
        return len(audios) / (time.perf_counter() - begin)


def without_end_of_turn(model: str, folder: Path) -> str:
    """The checkpoint again, with links to its files, but with answers that go on to their limit."""
    for path in Path(model).iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).symlink_to(path.resolve())
    settings = json.loads((Path(model) / "generation_config.json").read_text())
    settings["eos_token_id"] = None
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def timed(function, audio: bytes) -> float:
    begin = time.perf_counter()
    function(audio)
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each utterance")
    parser.add_argument("--requests", type=int, default=8, help="per client count; 32 with 16 clients at least")
    parser.add_argument("--output", default="serving.json")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        model = without_end_of_turn(options.model, Path(folder))
        audios = [utterance(i, options.seconds * (0.8 + 0.1 * (i % 5))) for i in range(max(32, options.requests))]
        served = Served(model, options.tokens, batch_size=16)
        try:
            bare = Bare(model, options.tokens)
            same = sum(served(audio) == bare(audio) for audio in audios[:2])  # and a warm-up of both
            pairs = [(timed(bare, audio), timed(served, audio)) for audio in audios[: options.requests]]
            rates = {n: served.requests_per_second(audios[: max(options.requests, 2 * n)], n) for n in (1, 4, 16)}
        finally:
            served.process.terminate()
            served.process.wait()
    result = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "tokens": options.tokens,
        "audio_seconds": options.seconds,
        "same_answers_of_2": same,
        "bare_seconds": statistics.median(bare for bare, _ in pairs),
        "served_seconds": statistics.median(served for _, served in pairs),
        "overhead": statistics.median(served / bare for bare, served in pairs),
        "requests_per_second": rates,
        "gain": {n: rate / rates[1] for n, rate in rates.items()},
    }
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"latency: {result['overhead']:.2f} x bare generate ({result['served_seconds']:.2f} s, one client)")
    for n, rate in rates.items():
        print(f"{n:>2} client(s): {rate:.2f} requests/s, {rate / rates[1]:.2f} x one client")


if __name__ == "__main__":
    main()
