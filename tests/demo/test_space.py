"""The Space, started as the Hub starts it, and asked as its page asks."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'speechllm[demo]'")
import httpx

from speechllm.evaluation.transcription import Transcriber


APP = Path(__file__).parents[2] / "space/app.py"


@pytest.fixture(scope="module")
def space(checkpoint, tmp_path_factory):
    """A client of it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("space") / "log.txt"
    variables = {"MODEL_ID": str(checkpoint), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, APP], env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=False, timeout=120) as client:
                while not reachable(client):
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.5)
                yield client
        finally:
            process.terminate()
            process.wait(30)


def reachable(client: httpx.Client) -> bool:
    try:
        return client.get("/").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, button: str, data: list) -> list:
    """What the page's functions behind `button` give for `data`, through the page's queue."""
    config = client.get("/config").json()
    buttons = {part["id"]: part["props"].get("value") for part in config["components"] if part["type"] == "button"}
    first = next(
        dependency
        for dependency in config["dependencies"]
        if any(buttons.get(component) == button for component, _ in dependency["targets"])
    )
    second = [dependency for dependency in config["dependencies"] if dependency["trigger_after"] == first["id"]]
    if second:  # the first one only makes what the page keeps to itself
        call(client, button, first, [None, *data])
        return call(client, button, second[0], [None])
    return call(client, button, first, data)


def call(client: httpx.Client, visitor: str, function: dict, data: list) -> list:
    request = {"data": data, "fn_index": function["id"], "session_hash": visitor, "event_data": None}
    client.post("/gradio_api/queue/join", json=request).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": visitor}) as events:
        for line in events.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                assert message["success"], message
                return message["output"]["data"]
    raise AssertionError("the answer broke off")


def test_answer_and_alignment(space, checkpoint, recordings):
    page = space.get("/")
    assert page.status_code == 200 and "tiny-model" in page.text
    recording = recordings / "good.wav"
    upload = space.post("/gradio_api/upload", files={"files": ("good.wav", recording.read_bytes())})
    file = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}

    answer, message = ask(space, "Answer", [file, "Transcribe", "German", ""])
    assert answer.strip() == Transcriber(checkpoint)(recording) and answer.strip()
    assert message == ""

    _, heat_map, plan, message = ask(space, "Compare", [file, "abc", 2])
    assert "Similarity at layer 2" in heat_map and "<svg" in heat_map and "Transport plan at layer 2" in plan
    assert message == ""
    *_, message = ask(space, "Compare", [file, "", 2])
    assert "The sentence is empty" in message
