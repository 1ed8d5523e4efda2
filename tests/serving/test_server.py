"""The server as a process of its own, spoken to by OpenAI's client over loopback."""

import base64
import io
import json
import logging
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import openai
import pytest
import soundfile
import uvicorn
from starlette.testclient import TestClient
from tiny import tone

from speechllm.serving.app import LOOPBACK, Limits, Service
from speechllm.serving.server import _hosts


NAME = "tiny-model"
ENDLESS = 90_000  # tokens


def encoded(seconds=0.5, seed=0, **options):
    file = io.BytesIO()
    soundfile.write(file, tone(seconds, seed=seed), 16_000, **{"format": "WAV", **options})
    return file.getvalue()


def chat(audio=None, text="Say it.", audio_format="wav"):
    parts = [{"type": "text", "text": text}]
    if audio is not None:
        data = base64.b64encode(audio).decode()
        parts.insert(0, {"type": "input_audio", "input_audio": {"data": data, "format": audio_format}})
    return [{"role": "user", "content": parts}]


def same_chat(audio, text="Say it."):
    """The chat of `chat` as the processor takes it."""
    return [{"role": "user", "content": [{"type": "audio", "audio": audio}, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def server(parts):
    """A running `speechllm serve`: the process and its address."""
    options = "--port 0 --max-wait-ms 150 --max-audio-seconds 5 --max-upload-mb 1 --timeout 100 --max-requests 20"
    command = [sys.executable, "-m", "speechllm", "serve", "--model", str(parts[0]), *options.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = process.stdout.readline()
        found = re.match(rf"Serving {NAME} at (http://127\.0\.0\.1:\d+)/v1", line)
        assert found, f"the server did not start: {line!r}"
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0, timeout=100)


def get(address):
    try:
        with urlopen(address, timeout=30) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


# ---- answers -------------------------------------------------------------------------------------------------------


def test_health_and_models(server, client):
    status, health = get(f"{server[1]}/health")
    assert status == 200 and health["status"] == "ok" and health["in_flight"] == 0
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "speechllm"


@pytest.mark.parametrize("audio_format", ["wav", "mp3", "flac"])
def test_chat_with_audio(client, answer, audio_format):
    audio = encoded(seed=1, format=audio_format.upper())
    completion = client.chat.completions.create(
        model=NAME, messages=chat(audio, audio_format=audio_format), max_completion_tokens=9
    )
    choice = completion.choices[0]
    assert choice.message.content == answer(same_chat(audio), 9) and choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert completion.usage.completion_tokens == 9
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 9 > 20


def test_text_only_and_several_turns(client, answer, parts):
    messages = [
        {"role": "system", "content": "Be brief."},
        *chat(encoded(seed=1)),
        {"role": "assistant", "content": "So?"},
        {"role": "user", "content": "Again."},
    ]
    completion = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6)
    same = [messages[0], *same_chat(encoded(seed=1)), *messages[2:]]
    assert completion.choices[0].message.content == answer(same, 6)
    inputs = parts[2].apply_chat_template(same, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert completion.usage.prompt_tokens == inputs["input_ids"].shape[1]
    text = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}], max_tokens=6)
    assert text.choices[0].message.content == answer([{"role": "user", "content": "Hi"}], 6)


def test_streaming(client, answer):
    audio = encoded(seed=2)
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=chat(audio), max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answer(same_chat(audio), 12)
    assert len(list(filter(None, pieces))) == 12, "the text did not come piece by piece"
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_sampling_and_stop(client, answer):
    def ask(**options):
        completion = client.chat.completions.create(
            model=NAME, messages=chat(encoded(seed=1)), max_tokens=12, **options
        )
        return completion.choices[0]

    greedy = ask(temperature=0).message.content
    seeded = [ask(temperature=2, top_p=0.95, seed=seed).message.content for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2] and greedy not in seeded
    stopped = ask(stop=greedy[4:6])
    assert stopped.message.content == greedy[: greedy.find(greedy[4:6])] and stopped.finish_reason == "stop"


def test_transcription(client, answer):
    audio = encoded(seed=3)
    expected = answer(same_chat(audio, "Transcribe the speech."), 256)

    def ask(**options):
        return client.audio.transcriptions.create(model=NAME, file=("speech.wav", audio), **options)

    assert ask().text == expected.strip()
    assert ask(response_format="text").strip() == expected.strip()
    verbose = ask(response_format="verbose_json", language="en", timestamp_granularities=["segment"])
    assert verbose.text == expected.strip() and verbose.language == "en" and verbose.duration == 0.5
    assert [(s.start, s.end, s.text) for s in verbose.segments] == [(0, 0.5, expected.strip())]
    assert [s.finish_reason for s in verbose.segments] == ["length"], "the model never ends, so the text is cut off"
    assert ask(prompt="Translate.").text == answer(same_chat(audio, "Translate."), 256).strip()


def test_long_audio_is_transcribed_in_pieces(client, server):
    before = get(f"{server[1]}/health")[1]["prompts"]
    verbose = client.audio.transcriptions.create(
        model=NAME, file=("speech.flac", encoded(4.8, format="FLAC")), response_format="verbose_json"
    )
    assert len(verbose.segments) >= 3 and verbose.segments[-1].end == pytest.approx(4.8)
    assert all(a.end == b.start for a, b in zip(verbose.segments, verbose.segments[1:]))
    assert verbose.text == " ".join(segment.text for segment in verbose.segments)
    assert get(f"{server[1]}/health")[1]["prompts"] - before == len(verbose.segments)


def test_a_muted_stretch_is_transcribed_as_nothing(client):
    """And costs nobody else's request, though its pieces share batches."""

    def transcribed(middle):
        file = io.BytesIO()
        samples = np.concatenate([tone(1.0), middle.astype(np.float32), tone(1.0, seed=1)])
        soundfile.write(file, samples, 16_000, format="WAV")
        name = ("meeting.wav", file.getvalue())
        return client.audio.transcriptions.create(model=NAME, file=name, response_format="verbose_json")

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(transcribed, tone(2.8, seed=2))
        muted = transcribed(np.zeros(46_000))
    texts = [segment.text for segment in muted.segments]
    assert "" in texts and texts[0] and texts[-1] and muted.text == " ".join(filter(None, texts))
    assert all(segment.text for segment in other.result().segments)
    square = transcribed(0.3 * np.sign(np.sin(np.arange(46_000) / 20)))  # of which one would say that it is clipped
    assert all(segment.text for segment in square.segments)


def test_the_batcher_is_told_the_context_and_the_prompts_lengths(parts, monkeypatch):
    service = Service(parts[1], parts[2], NAME, Limits(), max_batch_size=8, max_wait=0.01)
    jobs, submit = [], service.batcher.submit
    monkeypatch.setattr(service.batcher, "submit", lambda *some: (jobs.extend(some), submit(*some)))
    client = TestClient(service.app(["testserver"]))
    answer = client.post("/v1/chat/completions", json={"model": NAME, "messages": chat(), "max_tokens": 2}).json()
    client.post("/v1/audio/transcriptions", data={"model": NAME}, files={"file": ("a.wav", encoded())})
    service.batcher.close()
    assert jobs[0].prompt_tokens == answer["usage"]["prompt_tokens"] and jobs[1].prompt_tokens > 0
    assert service.context == 100_000 and service.batcher.context == math.inf  # rotary positions have no end
    monkeypatch.setattr(parts[1].config.text_config, "rope_parameters", None)
    learned = Service(parts[1], parts[2], NAME, Limits(), max_batch_size=8, max_wait=0.01)
    learned.batcher.close()
    assert learned.batcher.context == 100_000


def test_extreme_sampling_is_greedy_or_nearly(client):
    def ask(**options):
        return client.chat.completions.create(model=NAME, messages=chat(), max_tokens=6, **options).choices[0].message

    def transcribe(**options):
        return client.audio.transcriptions.create(model=NAME, file=("a.wav", encoded()), **options).text

    assert ask(temperature=1e-40).content == ask().content
    assert transcribe(temperature=1e-40) == transcribe()
    assert ask(temperature=1.0, top_p=0).content


def test_word_timestamps_are_refused_in_any_order(client):
    for granularities in (["word", "segment"], ["segment", "word"]):
        with pytest.raises(openai.BadRequestError, match="segments only"):
            client.audio.transcriptions.create(
                model=NAME,
                file=("speech.wav", encoded()),
                response_format="verbose_json",
                timestamp_granularities=granularities,
            )


def test_sixteen_clients_share_batches(client, server, answer):
    before = get(f"{server[1]}/health")[1]
    audios = [encoded(0.3 + 0.05 * (i % 6), seed=i) for i in range(16)]

    def ask(i):
        completion = client.chat.completions.create(model=NAME, messages=chat(audios[i]), max_tokens=4 + i)
        return completion.choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert answers == [answer(same_chat(audio), 4 + i) for i, audio in enumerate(audios)]
    after = get(f"{server[1]}/health")[1]
    assert after["prompts"] - before["prompts"] == 16 and after["batches"] - before["batches"] <= 8


# ---- errors --------------------------------------------------------------------------------------------------------


def part(**values):
    return [{"role": "user", "content": [values]}]


GOOD = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@pytest.mark.parametrize(
    "changes, status, told",
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"model": None}, 400, "provide `model`"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": "Hi"}, 400, "`messages` must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "`role`"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, 400, "`role`"),
        ({"messages": [{"role": "user"}]}, 400, "`content`"),
        ({"messages": part(type="image_url", image_url={"url": "http://x"})}, 400, "not 'image_url'"),
        ({"messages": part(type="input_audio", input_audio={"data": "***", "format": "wav"})}, 400, "base64"),
        ({"messages": part(type="input_audio", input_audio={"data": "AAAA", "format": "webm"})}, 415, "webm"),
        ({"messages": part(type="input_audio", input_audio={"data": "AAAA", "format": "wav"})}, 400, "not audio"),
        ({"messages": part(type="input_audio", input_audio="/etc/passwd")}, 400, "needs"),
        ({"messages": part(type="text", text="a <|audio|> b")}, 400, "placeholder"),
        ({"messages": part(type="text", text="\ud800")}, 400, "messages[0].content[0] must be valid Unicode"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content must be valid Unicode"),
        ({"messages": part(type="text", text="long " * 25_000)}, 400, "context_length_exceeded"),
        ({"messages": chat(encoded(5.2))}, 413, "longer than 5 seconds"),
        ({"messages": chat(encoded(3.0)) + chat(encoded(3.0))}, 413, "more than 5 seconds of audio, the limit here"),
        ({"messages": chat(encoded(0.5)) * 17}, 400, "up to 16"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": 1, "top_p": -1}, 400, "top_p"),
        ({"temperature": 1, "seed": 2**70}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"n": 2}, 400, "`n` = 2"),
        ({"tools": [{"type": "function"}]}, 400, "`tools`"),
        ({"logprobs": True}, 400, "`logprobs`"),
        ({"tempreature": 1}, 400, "tempreature"),
    ],
    ids=str,
)
def test_bad_chats(server, changes, status, told):
    request = Request(
        f"{server[1]}/v1/chat/completions",
        json.dumps({**GOOD, **changes}).encode(),
        {"content-type": "application/json"},
    )
    found, body = get(request)
    assert found == status, body
    assert told in json.dumps(body) and body["error"]["message"] and len(body["error"]["message"]) < 400


def test_errors_as_the_client_raises_them(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4o", messages=GOOD["messages"])
    with pytest.raises(openai.BadRequestError, match="not audio") as error:
        client.audio.transcriptions.create(model=NAME, file=("a.wav", b"no audio at all"))
    assert error.value.code == "invalid_audio"
    with pytest.raises(openai.BadRequestError, match="srt|response_format"):
        client.audio.transcriptions.create(model=NAME, file=("a.wav", encoded()), response_format="srt")
    with pytest.raises(openai.BadRequestError, match="not streamed"):
        client.audio.transcriptions.create(model=NAME, file=("a.wav", encoded()), stream=True)
    with pytest.raises(openai.APIStatusError, match="more than 1 MB") as error:
        client.audio.transcriptions.create(model=NAME, file=("a.wav", bytes(2_500_000)))
    assert error.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match="more than 1 MB"):
        client.chat.completions.create(model=NAME, messages=chat(bytes(1_500_000)))


@pytest.mark.parametrize(
    "path, body, kind, status",
    [
        ("chat/completions", b"{", "application/json", 400),
        ("chat/completions", b"[" * 100_000, "application/json", 400),
        ("chat/completions", b"[]", "application/json", 400),
        ("chat/completions", b"\xff\xfe", "application/json", 400),
        ("chat/completions", b"{}", "text/plain", 415),
        ("audio/transcriptions", b"{}", "application/json", 415),
        ("audio/transcriptions", b"", "multipart/form-data", 400),
        ("audio/transcriptions", b"nothing", "multipart/form-data; boundary=x", 400),
        ("audio/transcriptions", b"--x\r\ncontent-disposition: form-data; name=file\r\n\r\nabc\r\n--x--", "multipart/form-data; boundary=x", 400),
        ("nothing", b"{}", "application/json", 404),
        ("models", b"{}", "application/json", 405),
    ],
)  # fmt: skip
def test_bad_bodies(server, path, body, kind, status):
    found, answer = get(Request(f"{server[1]}/v1/{path}", body, {"content-type": kind}))
    assert found == status and answer["error"]["message"], answer


def test_a_client_that_leaves_frees_its_place(client, server):
    stream = client.chat.completions.create(model=NAME, messages=chat(encoded()), max_tokens=ENDLESS, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(model=NAME, messages=chat(encoded()), max_tokens=ENDLESS)
    for _ in range(200):
        if get(f"{server[1]}/health")[1]["in_flight"] == 0:
            break
        time.sleep(0.1)
    assert get(f"{server[1]}/health")[1]["in_flight"] == 0
    client.chat.completions.create(**GOOD)  # and the model is free


def test_too_many_requests(client, server):
    endless = [
        client.chat.completions.create(model=NAME, messages=chat(encoded()), max_tokens=ENDLESS, stream=True)
        for _ in range(20)
    ]
    with pytest.raises(openai.RateLimitError, match="in progress"):
        client.chat.completions.create(**GOOD)
    for stream in endless:
        stream.close()


@pytest.fixture
def impatient(parts):
    """A server in a thread that gives every request two seconds."""
    service = Service(parts[1], parts[2], NAME, Limits(timeout=2.0), max_batch_size=4, max_wait=0.0)
    running = uvicorn.Server(uvicorn.Config(service.app(), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield service, running.servers[0].sockets[0].getsockname()
    running.should_exit = True
    thread.join(30)


def test_time_runs_out(impatient):
    service, (host, port) = impatient
    client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
    endless = dict(model=NAME, messages=GOOD["messages"], max_tokens=ENDLESS)
    with pytest.raises(openai.InternalServerError, match="longer than 2 seconds") as error:
        client.chat.completions.create(**endless)
    assert error.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than 2 seconds"):
        for _ in client.chat.completions.create(**endless, stream=True):
            pass
    with socket.create_connection((host, port)) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        slow.settimeout(60)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert service.in_flight == 0
    assert client.chat.completions.create(**GOOD).usage.completion_tokens == 3  # the model is free again


def test_an_upload_that_is_too_large_takes_no_place(impatient):
    """Refused by what it declares, or as soon as it has sent too much; answered when it has been sent."""
    service, address = impatient
    service.limits.max_upload_mb = 0.1
    for how in ("content-length: 300000", "transfer-encoding: chunked"):
        chunked = "chunked" in how
        with socket.create_connection(address) as large:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{how}\r\n\r\n"
            body = b"x" * 150_000
            part = b"%x\r\n%s\r\n" % (len(body), body) if chunked else body
            large.sendall(head.encode() + part)
            large.settimeout(0.5)
            with pytest.raises(TimeoutError):
                large.recv(100)
            assert service.in_flight == 0, how
            large.sendall(part + (b"0\r\n\r\n" if chunked else b""))
            large.settimeout(60)
            assert large.recv(100).startswith(b"HTTP/1.1 413"), how


def test_an_upload_that_declares_too_much_is_refused_before_its_body(impatient):
    service, address = impatient
    service.limits.timeout, service.limits.max_upload_mb = 0.5, 0.1
    with socket.create_connection(address) as large:
        large.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 300000\r\n\r\nx"
        )
        large.settimeout(60)
        assert large.recv(100).startswith(b"HTTP/1.1 413")  # not 408: nobody waited for a body


def test_a_transcript_may_be_as_long_as_its_audio_allows(impatient):
    service, _ = impatient
    assert service.transcript_limit(8_000) == service.limits.default_max_tokens == 256
    assert service.transcript_limit(30 * 16_000) == 900


def host_is_served(address, host):
    try:
        return urlopen(Request(f"{address}/health", headers={"Host": host}), timeout=30).status == 200
    except HTTPError as error:
        assert error.code == 400
        return False


def test_names_of_other_machines_are_refused(server):
    """As in DNS rebinding, where a page's own name leads to this machine."""
    port = server[1].rpartition(":")[2]
    for host in ("localhost", "127.0.0.1", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert host_is_served(server[1], host), host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
        assert not host_is_served(server[1], host), host


def test_names_that_a_server_goes_by():
    assert _hosts("192.168.0.7", ["asr.example"]) == [*LOOPBACK, "192.168.0.7", "asr.example"]
    assert "[::1]" in _hosts("::1", []) and _hosts("0.0.0.0", []) == ["*"]
    assert _hosts("0.0.0.0", ["asr.example"]) == [*LOOPBACK, "asr.example"]


@pytest.mark.parametrize(
    "path, kind",
    [("chat/completions", "application/json"), ("audio/transcriptions", "multipart/form-data; boundary=b")],
)
def test_leaving_in_the_middle_of_a_request_is_no_failure_of_the_server(impatient, caplog, path, kind):
    service, address = impatient
    log = logging.getLogger("uvicorn.error")  # which does not pass records on
    log.addHandler(caplog.handler)
    try:
        with socket.create_connection(address) as leaving:
            request = (
                f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: 99\r\n\r\n--b"
            )
            leaving.sendall(request.encode())
            while not service.in_flight:
                time.sleep(0.01)
        while service.in_flight:
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        log.removeHandler(caplog.handler)
    assert not caplog.records


# Last, for it ends the server of this module.
def test_shutdown_finishes_what_was_begun_and_refuses_what_comes(client, server):
    process, address = server
    stream = client.chat.completions.create(model=NAME, messages=chat(encoded()), max_tokens=1500, stream=True)
    chunks = iter(stream)
    next(chunks)
    text = []
    reader = threading.Thread(target=lambda: text.extend(chunk.choices[0] for chunk in chunks))
    process.send_signal(signal.SIGTERM)
    while get(f"{address}/health")[0] == 200:
        time.sleep(0.02)
    with pytest.raises(openai.InternalServerError, match="shutting down") as error:
        client.chat.completions.create(**GOOD)
    assert error.value.status_code == 503
    reader.start()
    reader.join(120)
    assert text[-1].finish_reason == "length"
    assert sum(len(choice.delta.content or "") for choice in text) >= 1499
    assert process.wait(30) == 0
