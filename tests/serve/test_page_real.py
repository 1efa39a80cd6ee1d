"""The page before the real server with the bundled model: nothing is scripted here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

import nanomolmo2
from nanomolmo2.things.photos import coins
from scripts.page_screenshots import (
    COINS,
    SHOTS,
    answered,
    ask,
    centres,
    found,
    give,
    missing,
    opened,
    real_server,
    show_one,
    start_example,
)
from tests.serve.conftest import running
from tests.serve.finder import Finder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from nanomolmo2.generation.vlm import VLM

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

DEMO = Path(nanomolmo2.__file__).parent / "assets" / "demo"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with real_server() as found:
        yield found


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as found:
        yield found


def test_points_lie_on_the_things(page: Page) -> None:
    """The demo's picture and the boxes around its things, in its 192 x 192 pixels."""
    questions = json.loads((DEMO / "scene.json").read_text(encoding="utf-8"))["questions"]
    give(page, DEMO / "scene.png")
    for asked in (one for one in questions if "boxes" in one):
        ask(page, asked["question"])
        found = [(192 * x, 192 * y) for x, y in centres(page)]
        boxes = asked["boxes"]
        assert len(found) == len(boxes)
        for x0, y0, x1, y1 in boxes:
            assert any(x0 <= x < x1 and y0 <= y < y1 for x, y in found), asked["question"]
    ask(page, "How many sunflowers are there?")
    assert "count 3" in page.inner_text(".turn:last-child .meta")


def test_a_refused_picture_brings_the_servers_sentence(page: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((DEMO / "scene.png").read_bytes()[:200])
    give(page, tmp_path / "broken.png")
    with page.expect_response("**/v1/query") as found:
        ask(page, "Describe this picture.")
    assert 400 <= found.value.status < 500
    sentence = found.value.json()["error"]["message"]
    assert page.inner_text(".refused") == sentence and len(sentence) > 20
    assert "Traceback" not in sentence and str(tmp_path) not in sentence


def test_examples_and_their_questions_are_answered(page: Page) -> None:
    start_example(page, "A few things")
    for _ in range(page.locator(".suggestion").count()):
        page.click(".suggestion >> nth=0")
        answered(page)
    assert page.locator(".refused:visible").count() == 0
    assert page.locator(".turn").count() == 3


def test_a_video_is_tracked(page: Page) -> None:
    start_example(page, "A short video")
    page.click(".suggestion >> nth=0")
    answered(page)
    assert page.locator(".refused:visible").count() == 0
    assert page.locator(".chip").count() >= 3
    page.click(".chip >> nth=2")
    assert page.locator(".marker:visible").count() == 1
    page.click("#why")
    page.wait_for_selector(".heat")


def test_why_there_is_weak_evidence(page: Page) -> None:
    give(page, DEMO / "scene.png")
    ask(page, "Point to the snail.")
    page.click(".marker")
    page.click("#why")
    page.wait_for_selector(".heat")
    assert page.inner_text("#evidence").startswith("Weak evidence")
    size = page.evaluate(
        "(({ width, height }) => [width, height])(document.querySelector('.heat'))"
    )
    assert size == [6, 6]  # visual tokens of tiny


def test_a_stopped_answer_is_followed_by_another(page: Page) -> None:
    """Of a network that answers late, so that it is still being written when it is stopped."""
    give(page, DEMO / "scene.png")
    network = page.context.new_cdp_session(page)
    late = {"offline": False, "latency": 30_000, "downloadThroughput": -1, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", late)
    ask(page, "Point to everything.", wait=False)
    page.click("#stop")
    answered(page)
    assert "Stopped." in page.inner_text(".turn:last-child")
    network.send("Network.emulateNetworkConditions", {**late, "latency": 0})
    ask(page, "Is there a dog?")
    assert page.inner_text(".turn:last-child .said") == "No."


def test_a_click_finds_the_rest(
    browser: Browser, vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the pixel that is clicked to the model, and back to the pixels of the things."""
    finder = Finder([(48.0, 24.0, 0.97), (96.0, 24.0, 0.4), (144.0, 96.0, 0.75)])
    monkeypatch.setattr(vlm, "find", finder.find)
    monkeypatch.setattr("nanomolmo2.serve.openai.finds", lambda vlm: True)
    with running(vlm) as server, opened(browser, f"{server.url}/") as page:
        page.click("#mode-find")
        give(page, DEMO / "scene.png")
        show_one(page, 50, 20)
        page.wait_for_selector(".marker.thing")
        found(page)
        (call,) = finder.calls
        assert call["image"].size == (192, 192) and call["min_confidence"] == 0.05
        assert call["like"] == [(pytest.approx(50, abs=0.5), pytest.approx(20, abs=0.5))]
        places = [(192 * x, 192 * y) for x, y in centres(page)]
        assert places == [pytest.approx((48, 24), abs=0.5), pytest.approx((144, 96), abs=0.5)]
        page.click(".marker.thing")
        page.wait_for_selector(".marker.wrong")
        found(page)
        assert finder.calls[1]["unlike"] == [(144.0, 96.0)]
        assert page.inner_text("#find-result h2") == "1 thing found"
        # What the server refuses is said as it says it.
        finder.error = ValueError("the example lies outside of the picture")
        show_one(page, 150, 150)
        page.wait_for_selector("#find-error:visible")
        assert page.inner_text("#find-error-text") == "the example lies outside of the picture"


def test_a_click_on_a_coin_finds_the_others(page: Page) -> None:
    """The bundled model on the photograph of 24 coins; each has a box of its own."""
    page.click("#mode-find")
    give(page, COINS)
    show_one(page, 157, 52)
    page.wait_for_selector(".marker.thing")
    found(page)
    photograph, boxes = coins()
    width, height = photograph.size
    places = [(width * x, height * y) for x, y in centres(page)]
    hit = [
        [i for i, (x0, y0, x1, y1) in enumerate(boxes) if x0 <= x < x1 and y0 <= y < y1]
        for x, y in places
    ]
    assert len(boxes) == 24 and 22 <= len(places) <= 26
    assert len({i for one in hit for i in one}) >= 22


def test_a_turned_photograph_has_its_places_where_they_are_seen(
    browser: Browser, vlm: VLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A camera held upright stores 200 x 120 pixels and says to turn them: 120 x 200 are seen."""
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation
    Image.new("RGB", (200, 120), "white").save(tmp_path / "upright.jpg", exif=turned)
    finder = Finder([(30.0, 150.0, 0.9)])
    monkeypatch.setattr(vlm, "find", finder.find)
    monkeypatch.setattr("nanomolmo2.serve.openai.finds", lambda vlm: True)
    with running(vlm) as server, opened(browser, f"{server.url}/") as page:
        page.click("#mode-find")
        give(page, tmp_path / "upright.jpg")
        show_one(page, 30, 150)
        page.wait_for_selector(".marker.meant")
        found(page)
        (call,) = finder.calls
        assert call["image"].size == (120, 200)
        assert call["like"] == [(pytest.approx(30, abs=0.5), pytest.approx(150, abs=0.5))]
        assert centres(page) == [(pytest.approx(0.25, abs=0.01), pytest.approx(0.75, abs=0.01))]


@pytest.mark.parametrize("name", SHOTS)
def test_the_docs_pictures_can_be_taken(browser: Browser, address: str, name: str) -> None:
    with opened(browser, address, **SHOTS[name]["window"]) as page:
        for step in SHOTS[name]["steps"]:
            step(page)
        assert page.locator(".refused:visible").count() == 0
        assert page.locator(".marker:visible").count() >= 1
        assert page.screenshot()[:4] == b"\x89PNG"
