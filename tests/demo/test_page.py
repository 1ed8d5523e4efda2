"""The demo's page in a real browser: Chromium without a window, driven by Playwright.

Screenshots are kept in `runs/screenshots`.
"""

import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'speechllm[demo]'")
import httpx


playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need Chromium: apt-get install chromium")

SCREENSHOTS = Path(__file__).parents[2] / "runs" / "screenshots"
PHONE = {"width": 390, "height": 844}
WAIT = 90_000  # ms, for a busy machine
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
).split()
expect = playwright.expect


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory):
    """Where `speechllm demo` shows the tiny checkpoint."""
    log, port = tmp_path_factory.mktemp("server") / "log.txt", free_port()
    command = [sys.executable, "-m", "speechllm", "demo", "--model", checkpoint, "--port", port]
    with open(log, "w") as output:
        server = subprocess.Popen(
            [*map(str, command), "--max-audio-seconds", "10", "--max-upload-mb", "2.5"], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 240
        while not (shown := re.search(r"Showing tiny-model at (http://127\.0\.0\.1:\d+/)", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield shown[1]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, freshly opened; afterwards there must have been no error in the console and no request elsewhere."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    page.wrong, page.expected = wrong, expected = [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
    page.goto(address)
    expect(page.get_by_role("button", name="Answer")).to_be_visible()
    yield page
    page.close()
    assert [message for message in wrong if message not in expected] == []


def upload(page, path) -> None:
    page.set_input_files("#recording input[type=file]", path)
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()


def compare(page, sentence) -> None:
    page.get_by_role("textbox", name="Sentence").fill(sentence)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#plan figure svg")).to_be_visible()


def screenshot(page, name) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_ask_and_see(page, recordings):
    upload(page, recordings / "good.wav")
    page.get_by_role("button", name="Answer").click()
    answer = page.get_by_role("textbox", name="Answer")
    expect(answer).to_have_value(re.compile("a"))
    page.get_by_role("button", name="Stop").click()

    compare(page, "Hello there")
    heat_map, plan, layer = page.locator("#heat-map"), page.locator("#plan"), page.get_by_role("slider")
    expect(heat_map).to_contain_text("Similarity at layer 1")
    pictures = heat_map.locator("image").first, plan.locator("image").first
    seen = {tuple(picture.get_attribute("xlink:href") for picture in pictures)}
    layer.focus()
    for key, expected in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("Home", 0)):
        page.keyboard.press(key)
        expect(heat_map).to_contain_text(f"Similarity at layer {expected}")
        expect(plan).to_contain_text(f"Transport plan at layer {expected}")
        seen.add(tuple(picture.get_attribute("xlink:href") for picture in pictures))
    assert len(seen) == 4  # layers 0 to 3 look different
    assert len({similarity for similarity, _ in seen}) == len({plan for _, plan in seen}) == 4
    box = layer.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    expect(heat_map).to_contain_text("Similarity at layer 3")
    compare(page, "Bye")
    compare(page, "Good")
    compare(page, "Hello there")  # while the others are drawn: the last one is what is shown in the end
    expect(heat_map).to_contain_text("\N{OPEN BOX}")
    # The axes: the sentence's tokens, and the recording's seconds.
    texts = heat_map.locator("text").all_text_contents()
    assert "speech (seconds)" in texts and "1.4" in texts
    assert [t for t in texts if len(t) == 1] == [*"Hello", "\N{OPEN BOX}", *"there"]
    screenshot(page, "demo")

    page.locator("#recording").get_by_role("button", name="Clear").click()
    expect(heat_map.locator("figure")).to_have_count(0)  # nothing of an old recording stays
    expect(answer).to_have_value("")


def test_stop_and_clear_at_any_time(page, recordings):
    """Before, while and after an answer is given, and twice: no error, and nothing of an old recording comes back."""
    answer = page.get_by_role("textbox", name="Answer")
    ask, stop = (page.get_by_role("button", name=name) for name in ("Answer", "Stop"))
    stop.click()
    upload(page, recordings / "good.wav")
    ask.click()
    stop.click()
    ask.click()
    expect(answer).to_have_value(re.compile("a"))
    stop.click()
    stop.click()
    page.wait_for_timeout(1000)
    stopped = answer.input_value()
    page.wait_for_timeout(500)
    assert answer.input_value() == stopped
    ask.click()
    page.locator("#recording").get_by_role("button", name="Clear").click()
    expect(answer).to_have_value("")
    page.wait_for_timeout(2000)
    expect(answer).to_have_value("")
    stop.click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_asking_again_begins_anew(page, recordings):
    """Also at once, and right after Stop: the last click is the one that counts."""
    answer = page.get_by_role("textbox", name="Answer")
    ask, stop = (page.get_by_role("button", name=name) for name in ("Answer", "Stop"))
    ended = page.locator("#answer .wrap.hide")  # Gradio's progress over the box, once it is gone
    upload(page, recordings / "good.wav")
    ask.click()
    expect(answer).to_have_value(re.compile("a"))
    expect(ended).to_be_attached()
    whole = answer.input_value()
    for clicks in ([ask], [ask, ask], [ask, stop, ask], [ask, ask, stop, ask]):
        ask.click()
        expect(answer).not_to_have_value(whole)
        expect(answer).to_have_value(re.compile("a"))  # it is being answered
        for button in clicks:
            button.click(no_wait_after=True)
        expect(answer).to_have_value(whole)
    clicks = "names => names.forEach(name => [...document.querySelectorAll('button')].find(b => b.innerText == name).click())"
    for names in (["Answer", "Stop", "Answer"], ["Answer", "Answer", "Stop", "Stop", "Answer"]):
        page.evaluate(clicks, names)
        expect(answer).not_to_have_value(whole)
        expect(answer).to_have_value(whole)


def test_tasks_ask_for_what_they_need(page, recordings):
    language, question = page.get_by_label("Into which language?"), page.get_by_label("Question", exact=True)
    expect(language).to_be_hidden()
    expect(question).to_be_hidden()
    page.get_by_label("Translate").check()
    expect(language).to_be_visible()
    page.get_by_label("Ask a question").check()
    expect(language).to_be_hidden()
    expect(question).to_be_visible()
    upload(page, recordings / "good.wav")
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_role("alert")).to_have_text("The question is empty: type one first.")
    question.fill("Who speaks?")
    question.press("Enter")
    expect(page.get_by_role("textbox", name="Answer")).to_have_value(re.compile("a"))
    expect(page.get_by_role("alert")).to_have_count(0)


def test_what_is_wrong_is_said_in_one_sentence(page, recordings):
    alert = page.get_by_role("alert")
    page.get_by_role("button", name="Answer").click()
    expect(alert).to_have_text("There is no recording: record one or upload a file first.")
    page.set_input_files("#recording input[type=file]", recordings / "bad.wav")
    expect(alert).to_contain_text("The recording is not audio that can be decoded")
    page.expected.append("Waveform load error: MediaError")  # the player's own word on the file, in the console
    page.locator("#recording").get_by_role("button", name="Clear").click()
    page.set_input_files("#recording input[type=file]", recordings / "long.wav")
    expect(alert).to_have_text("The recording is longer than 10 seconds, the limit here. Cut it into parts.")
    page.locator("#recording").get_by_role("button", name="Clear").click()
    expect(alert).to_have_count(0)
    upload(page, recordings / "other.wav")
    page.get_by_role("button", name="Compare").click()
    expect(alert).to_have_text("The sentence is empty: type one first.")
    screenshot(page, "demo-message")


def test_upload_that_is_too_large(page, address, recordings):
    """The page says so before anything is sent; and the server takes no more from anyone else."""
    large = recordings / "large.wav"
    assert large.stat().st_size > 2.5 * 2**20 > (recordings / "long.wav").stat().st_size
    # Gradio asks how far the upload is that it has not begun.
    page.expected += ["Failed to load resource: the server responded with a status of 404 (Not Found)", "Response"]
    page.set_input_files("#recording input[type=file]", large)
    expect(page.get_by_text('exceed the maximum allowed size of 2.5 Mb: "large.wav"').last).to_be_visible()
    expect(page.get_by_role("button", name="Play", exact=True)).to_have_count(0)
    screenshot(page, "demo-too-large")

    def post(path):
        with open(path, "rb") as file:
            return httpx.post(f"{address}gradio_api/upload", files={"files": (path.name, file)}, timeout=WAIT / 1000)

    refused, taken = post(large), post(recordings / "good.wav")
    assert refused.status_code == 413 and "exceeded maximum allowed size" in refused.text
    assert taken.status_code == 200
    upload(page, recordings / "good.wav")  # and the page goes on


def test_microphone(page):
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(2000)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()
    compare(page, "beep")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_phone(page, recordings):
    page.set_viewport_size(PHONE)
    page.get_by_label("Ask a question").check()
    upload(page, recordings / "good.wav")
    compare(page, "A sentence of some length, as people say them")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for control in page.locator("button:visible, input:visible, textarea:visible, #heat-map svg, #plan svg").all():
        control.scroll_into_view_if_needed()
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] + 0.5, control.evaluate("e => e.outerHTML")
    screenshot(page, "demo-phone")


NAME_OF_FOCUSED = """() => {
    const e = document.activeElement;
    const name = e.getAttribute("aria-label") || e.labels?.[0]?.innerText.trim() || e.innerText || e.tagName;
    return name.split("\\n")[0].trim();
}"""
UPLOAD = "Drop an audio file here to upload"


def test_keyboard_reaches_everything_in_order(page):
    visited = []
    for _ in range(40):
        page.keyboard.press("Tab")
        visited.append(page.evaluate(NAME_OF_FOCUSED))
        if visited[-1] == "BODY" or (len(visited) > 1 and visited[-1] == visited[0]):
            break
    wanted = [UPLOAD, "Record audio", "Transcribe", "Answer", "Stop", "Sentence", "Compare", "range slider for Layer"]
    positions = [visited.index(control) for control in wanted]
    assert positions == sorted(positions), visited
    assert len(visited) < 40, visited  # the focus leaves the page again: no trap


def test_keyboard_alone(page, recordings):
    """Everything that the page is for, without a pointer."""

    def tab_to(name):
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate(NAME_OF_FOCUSED) == name:
                return
        raise AssertionError(f"Tab does not reach {name}.")

    def choose(key, task):
        page.keyboard.press(key)
        expect(page.get_by_label(task)).to_be_checked()
        expect(page.get_by_label(task)).to_be_focused()

    page.on("filechooser", lambda _: None)  # `expect_file_chooser` alone begins to listen too late for a key
    tab_to(UPLOAD)
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(recordings / "good.wav")
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()

    tab_to("Transcribe")
    choose("ArrowDown", "Translate")
    expect(page.get_by_label("Into which language?")).to_be_visible()
    choose("ArrowLeft", "Transcribe")
    choose("ArrowUp", "Ask a question")
    expect(page.get_by_label("Question", exact=True)).to_be_visible()
    tab_to("Question")
    page.keyboard.type("Who speaks?")
    tab_to("Answer")
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Answer")).to_have_value(re.compile("a"))
    tab_to("Stop")
    page.keyboard.press("Space")

    tab_to("Sentence")
    page.keyboard.type("Hello")
    tab_to("Compare")
    page.keyboard.press("Space")
    expect(page.locator("#plan figure svg")).to_be_visible()
    expect(page.locator("#heat-map")).to_contain_text("Similarity at layer 1")
    tab_to("range slider for Layer")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#heat-map")).to_contain_text("Similarity at layer 2")
    expect(page.get_by_role("alert")).to_have_count(0)
