"""The demo's page in a real browser, and what its server gives to programs that ask for more."""

from __future__ import annotations

import io
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import requests
from PIL import Image

import cobra
from cobra.config import DemoConfig, as_config
from cobra.demo.pictures import RED, draw_box, examples
from cobra.demo.session import Asker, Visit
from cobra.errors import ConfigError
from cobra.models.vlm import CobraVLM
from cobra.text.tokenizer import Tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BOX = "[0.25, 0.5, 0.75, 1.0]"
RANDOM = {"temperature": 2.0, "max_new_tokens": 30}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def compose(*overrides: str) -> DemoConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return as_config(DemoConfig, hydra.compose("demo", overrides=["load=x", *overrides]))


@pytest.fixture
def vlm(small_model: CobraVLM, tokenizer: Tokenizer) -> cobra.Cobra:
    """A model that says anything: its logits are small beside the temperature."""
    small_model.requires_grad_(False).llm.backbone.embedding.weight /= 10
    return cobra.Cobra(small_model, tokenizer, "small")


@pytest.fixture
def asker(vlm: cobra.Cobra) -> Asker:
    return Asker(vlm, compose().prompts, max_new_tokens=30)


@pytest.fixture
def images(small_data) -> list[Image.Image]:
    return [Image.open(small_data.image(n)) for n in range(2)]


def test_page_answers_as_the_model_does(asker: Asker, vlm: cobra.Cobra, images: list[Image.Image]) -> None:
    visit, expected = Visit(), vlm.chat(images[0])
    for question in ("what?", "and?"):
        *shown, last = asker.stream(visit, images[0], question, 2.0, 30)
        expected.ask(question, **RANDOM)
        assert last[0] == expected.history and "tokens/s" in last[1]
        assert len(shown) > 3 and all(turns[:-1] == expected.history[:-1] for turns, _ in shown)
    asked = asker.prompts.short.replace("{question}", "what?")
    assert asker.short(visit, images[0], "what?", 2.0, 30)[0] == vlm.generate(images[0], asked, **RANDOM)
    bars = asker.judge(visit, images[0], "it is red", "Yes / No")
    assert list(bars.values()) == vlm.score(
        images[0], asker.prompts.judge.replace("{question}", "it is red"), ["Yes", "No"]
    )
    assert asker.words() == ["True / False", "Yes / No"]
    assert visit.chat is not None and visit.chat.history == expected.history  # the other tabs are no part of it


def test_another_image_is_another_conversation(asker: Asker, images: list[Image.Image]) -> None:
    visit = Visit()
    for image in (images[0], images[1], None):
        *_, (turns, _) = asker.stream(visit, image, "what?", 0, 30)
        assert len(turns) == 1
    _, first = asker.see(visit, images[0])
    assert asker.see(visit, images[0].copy())[1] is first


def test_images_are_told_apart_by_their_colours(asker: Asker) -> None:
    red, blue = (Image.new("P", (8, 8)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert red.tobytes() == blue.tobytes()
    visit = Visit()
    _, chat = asker.see(visit, red)
    assert asker.see(visit, blue)[1] is not chat


def test_visitors_do_not_mix(asker: Asker, vlm: cobra.Cobra, images: list[Image.Image]) -> None:
    """Answers that grow at the same time."""
    streams = [asker.stream(Visit(), image, "what?", 2.0, 30) for image in images]
    latest = [None, None]
    while any(found := [next(stream, None) for stream in streams]):
        latest = [new or old for new, old in zip(found, latest, strict=True)]
    answers = [vlm.generate(image, "what?", **RANDOM) for image in images]
    assert [turns[0][1] for turns, _ in latest] == answers and answers[0] != answers[1]


def test_limits_are_the_servers(asker: Asker, images: list[Image.Image]) -> None:
    *_, (_, rate) = asker.stream(Visit(), images[0], "what?", 2.0, 10**9)
    assert int(rate.split()[0]) <= 30
    for wrong, message in (("", "Type something"), ("a" * 4001, "4000 are the limit")):
        with pytest.raises(ConfigError, match=message):
            list(asker.stream(Visit(), None, wrong, 0, 30))
    with pytest.raises(ConfigError, match="temperature"):
        asker.short(Visit(), None, "what?", -1, 30)
    with pytest.raises(ConfigError, match="There is no image"):
        asker.find(Visit(), None, "it", 0, 30)


def test_box_is_drawn_where_it_is() -> None:
    image = Image.new("RGBA", (60, 40), "white")
    drawn = np.asarray(draw_box(image, (0.25, 0.5, 0.75, 1.0)))
    rows, columns = np.nonzero((drawn == RED).all(axis=2))
    height, width = drawn.shape[:2]
    assert width == 480 and height == 320
    assert (columns.min(), columns.max()) == (width // 4, 3 * width // 4)
    assert (rows.min(), rows.max()) == (height // 2, height - 1)
    assert all(example.size == (256, 256) for example in examples())


def test_missing_gradio_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from cobra.demo.page import serve

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"^The demo needs gradio: pip install 'cobra-vlm\[demo\]'$"):
        serve(compose())
    for wrong in ("port=70000", "max_image_mb=0", "prompts.box=what", "temperature=-1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            compose(wrong)


@pytest.fixture
def address(vlm: cobra.Cobra, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A page whose model finds the same box everywhere."""
    pytest.importorskip("gradio")
    from cobra.demo import page

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    find = Asker.find
    monkeypatch.setattr(Asker, "find", lambda *args: ((0.25, 0.5, 0.75, 1.0), BOX, find(*args)[2]))
    config = compose(f"port={free_port()}", "temperature=2", "max_new_tokens=40")
    built = page.build(vlm, config)
    yield page.launch(built, config, wait=False)
    built.close()


def call(address: str, name: str, *data: object) -> str:
    """Send what the page would send; the events that come back."""
    url = f"{address}gradio_api/call/{name}"
    event = requests.post(url, json={"data": data}, timeout=60).json()["event_id"]
    return requests.get(f"{url}/{event}", timeout=60).text


def test_files_of_the_server_stay_there(address: str, tmp_path: Path) -> None:
    """Whatever a program sends in the place of an uploaded image."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    file = {"_type": "gradio.FileData"}
    for image in (
        {"path": str(secret)},
        {"path": str(secret), "meta": file},
        {"path": str(secret), "url": "", "orig_name": "a.gif", "meta": {}},
        {"path": f"{tempfile.gettempdir()}/gradio/../{secret.relative_to(tempfile.gettempdir())}"},
        {"path": "x", "url": f"file://{secret}", "meta": file},
        {"path": f"{address}config", "url": f"{address}config", "meta": file},
        str(secret),
    ):
        assert "event: error" in call(address, "short", image, "what?", 0, 5)
    assert "event: complete" in call(address, "short", None, "what?", 0, 5)
    for place in (f"file={secret}", "file=/etc/passwd", f"file={CONFIGS / 'demo.yaml'}"):
        assert requests.get(f"{address}gradio_api/{place}", timeout=60).status_code in (403, 404)


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A headless Chromium that reaches nothing but this machine."""
    sync_api = pytest.importorskip("playwright.sync_api")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("there is no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


def test_page_in_a_browser(address: str, browser: Any, small_data) -> None:
    elsewhere: list[str] = []

    def visit() -> Any:
        page = browser.new_context().new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: elsewhere.append(request.url) if address not in request.url else None)
        page.goto(address)
        return page

    def upload(page: Any, number: int) -> None:
        page.locator("input[type=file]").first.set_input_files(small_data.image(number))
        page.locator("[data-testid=image] img, .image-frame img").first.wait_for()

    def ask(page: Any, placeholder: str, text: str) -> None:
        page.get_by_placeholder(placeholder).fill(text)
        page.get_by_placeholder(placeholder).press("Enter")

    def say(page: Any, text: str) -> None:
        """Send until the page takes it: a last piece of the answer before may be under way."""
        box = page.get_by_placeholder("Ask about the image")
        box.fill(text)
        for _ in range(60):
            box.press("Enter")
            page.wait_for_timeout(1000)
            if not box.input_value():
                return
        pytest.fail("the question was not sent")

    page, other = visit(), visit()
    upload(page, 0)
    upload(other, 1)
    for turn, question in enumerate(("what shape is it?", "and the color?")):
        say(page, question)
        answer = page.locator("[data-testid=bot]").nth(turn)
        answer.wait_for()
        page.wait_for_function("count => document.querySelectorAll('[data-testid=user]').length == count", arg=turn + 1)
        page.get_by_text("tokens/s").first.wait_for()
        assert page.get_by_placeholder("Ask about the image").input_value() == ""
    assert other.locator("[data-testid=bot]").count() == 0
    page.get_by_role("tab", name="Find").click()
    ask(page, "What to find", "the shape")
    page.locator("#box img").wait_for()
    drawn = Image.open(io.BytesIO(page.locator("#box img").screenshot())).convert("RGB")
    reds = np.abs(np.asarray(drawn).astype(int) - RED).sum(axis=2) < 60
    rows, columns = np.nonzero(reds)
    assert abs(columns.min() / drawn.width - 0.25) < 0.03 and abs(columns.max() / drawn.width - 0.75) < 0.03
    assert abs(rows.min() / drawn.height - 0.5) < 0.03
    assert page.get_by_label("The model wrote").input_value() == BOX
    page.get_by_role("tab", name="True or false").click()
    ask(page, "A statement", "it is red")
    page.get_by_text("%").first.wait_for()
    ask(page, "A statement", " ")
    page.get_by_text("Type something first").wait_for()
    assert page.get_by_text("%").count() > 0  # an error leaves the page as it is
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length == 0")
    assert not [url for url in elsewhere if not url.startswith(("data:", "blob:"))]
