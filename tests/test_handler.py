"""The endpoint handler, started as Inference Endpoints start it, where this package is not installed."""

import json

import pytest
from tiny import enliven, tiny_model, tiny_processor
from without_package import run_without_package


# The way of the server that runs handlers: load the file by its path, with its folder among the import paths.
START = """
import base64, gc, importlib.util, io, json, random, resource, time, tracemalloc
import numpy as np
import soundfile
def start(folder="model"):
    spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
    sys.path.insert(0, folder)
    sys.modules["handler"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.EndpointHandler(folder)
def encoded(seconds=0.4, seed=0, rate=16000, **options):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).standard_normal(int(seconds * rate)).cumsum()
    soundfile.write(file, 0.9 * noise / np.abs(noise).max(), rate, **{"format": "WAV", **options})
    return file.getvalue()
def b64(data):
    return base64.b64encode(data).decode()
"""
ANSWERS = """
module, handler = start()
wav, mp3 = encoded(seed=1), encoded(seed=2, format="MP3")
few = {"max_new_tokens": 5}
def ask(inputs, parameters=few):
    return handler({"inputs": inputs, "parameters": parameters})
one = ask(wav)
assert one["text"] and ask(b64(wav)) == one == ask({"audio": b64(wav)}) == ask("data:audio/wav;base64," + b64(wav))
assert ask(wav, {"max_new_tokens": "5"}) == one, "numbers of a query string"
other = ask(wav, {"prompt": "Translate.", **few})
assert other != one and ask({"audio": b64(wav), "prompt": "Translate."}) == other
assert ask([b64(wav), {"audio": b64(wav), "prompt": "Translate."}, b64(mp3)]) == [one, other, ask(mp3)]
mixed = ask([b64(b"no audio"), b64(wav), "***"])
assert mixed[1] == one and [item.get("status") for item in mixed] == [400, None, 400] and "base64" in mixed[2]["error"]
config = handler.pipe.model.config.get_text_config()
context, config.max_position_embeddings = config.max_position_embeddings, 150
mixed = ask([b64(wav), b64(encoded(20)), {"audio": b64(wav), "prompt": "long " * 50}])
assert mixed[0] == one and [item.get("status") for item in mixed] == [None, 400, 400], mixed
assert all("LLM has a context of 150" in item["error"] for item in mixed[1:])
assert ask([b64(encoded(20))], {**few, "chunk_length_s": 1})[0]["chunks"], "shorter chunks fit"
config.max_position_embeddings = context
settings = handler.pipe.model.generation_config
settings.cache_implementation = "none of them"
try:
    ask([b64(wav)])
    raise SystemExit("the broken model answered")
except ValueError as error:
    assert not isinstance(error, module.RequestError), "a failure of the model is not the client's fault"
settings.cache_implementation = None
greedy = ask(wav, {"max_new_tokens": 20})
for sampling in ({"do_sample": True}, {"do_sample": "true"}, {}):
    assert ask(wav, {**sampling, "temperature": 2.0, "max_new_tokens": 20})["text"] != greedy["text"]
assert ask(wav, {"do_sample": "false", "max_new_tokens": 20}) == greedy
messages = {}
handler.max_bytes, handler.max_seconds = 100_000, 2
secret = "/etc/passwd"
for name, data in {
    "nothing": {}, "no object": [1], "no inputs": {"parameters": {}}, "null": {"inputs": None}, "number": {"inputs": 3},
    "empty": {"inputs": ""}, "empty list": {"inputs": []}, "many": {"inputs": [b64(wav)] * 33},
    "path": {"inputs": secret}, "address": {"inputs": "http://127.0.0.1/x.wav"}, "unknown key": {"inputs": {"url": secret}},
    "nested": {"inputs": {"audio": [1, 2]}}, "parameters": {"inputs": b64(wav), "parameters": 3},
    "unknown": {"inputs": b64(wav), "parameters": {"max_length": 3}},
    "tokens": {"inputs": b64(wav), "parameters": {"max_new_tokens": 10**9}},
    "nan": {"inputs": b64(wav), "parameters": {"temperature": "nan"}},
    "prompt": {"inputs": b64(wav), "parameters": {"prompt": "x" * 20000}},
    "placeholder": {"inputs": b64(wav), "parameters": {"prompt": "<|audio|>"}},
    "big": {"inputs": bytes(200_000)}, "big base64": {"inputs": "A" * 200_000},
    "long": {"inputs": encoded(60, rate=4000, format="FLAC", subtype="PCM_S8")[:99_000]}, "longer": {"inputs": encoded(2.5)},
}.items():
    try:
        messages[name] = [None, str(handler(data))]
    except module.RequestError as error:
        messages[name] = [error.status, str(error)]
assert "speechllm" not in sys.modules
print(json.dumps(messages))
"""
STATUS_413 = {"big", "big base64", "long", "longer"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handler")
    model = enliven(tiny_model("hubert-layer"))
    model.save_pretrained(folder / "model", kind="full")
    tiny_processor(model.config).save_pretrained(folder / "model")
    return folder


def test_answers_and_errors(folder):
    messages = run_without_package(START + ANSWERS, folder)
    for name, (status, message) in messages.items():
        assert status == (413 if name in STATUS_413 else 400), (name, status, message)
        assert len(message) < 250 and "root:" not in message, (name, message)
    assert "true" not in messages["nan"][1] and "a number from 0.01 to 5.0" in messages["nan"][1]
    assert "longer than 2 seconds" in messages["long"][1] and "limit" in messages["big"][1]


SOAK = """
module, handler = start()
handler.max_seconds = 2
generator = random.Random(0)
good = [encoded(0.2 + 0.1 * i, i, format=f) for i, f in enumerate(["WAV", "FLAC", "MP3", "OGG"])]
def mutated(data):
    data = bytearray(data)
    for _ in range(generator.randint(1, 20)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data[: generator.randint(1, len(data))])
def request(kind):
    audio = generator.choice(good)
    return {
        0: lambda: {"inputs": audio},
        1: lambda: {"inputs": b64(audio), "parameters": {"prompt": "Answer.", "max_new_tokens": 3}},
        2: lambda: {"inputs": [b64(audio), b64(mutated(audio)), {"audio": b64(audio), "prompt": "Go."}]},
        3: lambda: {"inputs": mutated(audio)},
        4: lambda: {"inputs": b64(mutated(audio))},
        5: lambda: {"inputs": b64(audio)[: generator.randint(0, 50)]},
        6: lambda: {"inputs": audio, "parameters": {"max_new_tokens": generator.choice([-1, 0, "x", 1e9, None, []])}},
        7: lambda: generator.choice([{}, None, [], "x", {"inputs": {}}, {"inputs": [[]]}, {"inputs": {"audio": {}}}]),
        8: lambda: {"inputs": encoded(3.0)},
        9: lambda: {"inputs": audio, "parameters": {"prompt": "\\ud800 \\x00 <|im_end|>", "max_new_tokens": 2}},
    }[kind]()
outcomes = {"answered": 0, "refused": 0}
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for i in range(500):
    if i == 250:
        before = resident()
    if i == 400:  # it slows Python down
        gc.collect()
        tracemalloc.start()
    data = request(i % 10)
    if isinstance(data, dict) and isinstance(data.get("inputs"), bytes):
        data.setdefault("parameters", {"max_new_tokens": 4})
    try:
        answer = handler(data)
        json.dumps(answer)
        outcomes["answered"] += 1
    except module.RequestError as error:
        assert error.status in (400, 413) and 10 < len(str(error)) < 600, str(error)
        outcomes["refused"] += 1
    answer = data = None
gc.collect()
outcomes.update(resident=resident() - before, traced=tracemalloc.get_traced_memory()[0])
assert handler({"inputs": good[0], "parameters": {"max_new_tokens": 3}})["text"]
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_500_mixed_requests_leave_nothing_behind(folder):
    outcomes = run_without_package(START + SOAK, folder)
    assert outcomes["answered"] + outcomes["refused"] == 500
    assert outcomes["answered"] >= 150 and outcomes["refused"] >= 150
    # 100 requests that each kept only their smallest audio (0.2 s as floats, 13 kB) would hold 1.3 MB.
    assert outcomes["traced"] < 0.7e6, json.dumps(outcomes)
    assert outcomes["resident"] < 60e6, json.dumps(outcomes)
