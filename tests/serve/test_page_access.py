"""The page for everyone: what axe-core finds, phones, what screen readers are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from scripts.page_screenshots import ask, give, missing, opened, start_example
from tests.serve.axe import axe_source, serious_findings
from tests.serve.scripted import Refused, Scripted, point, scripted_server, written

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

SIZE = (200, 120)
LABELS = ("dog", "cat", "cow", "bee", "key", "hat", "bus", "cup")  # one for each colour
POINTS = [point(20 * i + 20, 60, SIZE, id=i + 1, label=one) for i, one in enumerate(LABELS)]
TEXT = " ".join(
    f'<points coords="1 {p["id"]} {round(1000 * p["x_share"]):03d} 500">{p["label"]}</points>'
    for p in POINTS
)
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}}


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        yield script


def refuse(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    raise Refused(400, "The picture is broken: send another one.")
    yield  # a generator, as all answers


@pytest.mark.parametrize(
    ("window", "colours"),
    [
        pytest.param(DESKTOP, "light", id="desktop-light"),
        pytest.param(PHONE, "dark", id="phone-dark"),
        pytest.param(DESKTOP, "dark", id="desktop-dark", marks=pytest.mark.slow),
        pytest.param(PHONE, "light", id="phone-light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_serious(
    browser: Browser, server: Scripted, window: dict[str, Any], colours: str
) -> None:
    """At first, with answers and errors, a chosen point and its heat map, and in each dialog."""
    source = axe_source()
    found = {}
    weights = [[0.25, 0.25], [0.25, 0.25]]
    server.attention = lambda body: {
        "images": [{"rows": 2, "cols": 2, "weights": weights}],
        "note": "Weak evidence.",
    }
    still = {"reduced_motion": "reduce", "color_scheme": colours}  # no colours on their way
    with opened(browser, server.address, **window, **still) as page:
        page.wait_for_selector(".example")
        found["welcome"] = serious_findings(page, source)
        start_example(page, "Two pictures")
        server.answer = refuse
        ask(page, "What?")
        server.answer = lambda body: written(TEXT, POINTS, count=8)
        ask(page, "Point to everything.")
        page.click(".chip >> nth=2")
        found["answered"] = serious_findings(page, source)
        page.click("#why")
        page.wait_for_selector(".heat")
        found["why"] = serious_findings(page, source)
        page.click(".actions >> text=CSV")
        page.wait_for_selector("#toast:visible")
        found["toast"] = serious_findings(page, source)
        for opener in ("#open-settings", "#open-history"):
            page.click(opener)
            found[opener] = serious_findings(page, source)
            page.keyboard.press("Escape")
        page.click("#new-chat")
        start_example(page, "A short video")
        found["video"] = serious_findings(page, source)
    assert not [one for one in found.values() if one], {k: v for k, v in found.items() if v}


def test_axe_would_find_something(browser: Browser, server: Scripted) -> None:
    source = axe_source()
    with opened(browser, server.address) as page:
        page.evaluate("document.getElementById('send').removeAttribute('aria-label')")
        page.evaluate("document.querySelector('.drop p').style.color = '#ccc'")
        rules = {one["rule"] for one in serious_findings(page, source)}
        assert {"button-name", "color-contrast"} <= rules


def test_nothing_is_wider_than_a_phone(browser: Browser, server: Scripted, tmp_path: Path) -> None:
    server.answer = lambda body: written(f"{TEXT} {'long' * 40}", POINTS, count=8)
    Image.new("RGB", (1600, 900), "white").save(tmp_path / f"{'name' * 20}.png")
    with opened(browser, server.address, **PHONE, has_touch=True) as page:

        def widest() -> float:
            return page.evaluate(
                "Math.max(document.documentElement.scrollWidth, ...['.top', '.stage', '.chat', "
                "'.composer', '#send'].map((s) => document.querySelector(s).getBoundingClientRect()"
                ".right))"
            )

        assert widest() <= 360
        give(page, tmp_path / f"{'name' * 20}.png")
        ask(page, "Point to everything, please, in as many words as fit into one line of a phone?")
        assert widest() <= 360
        box = page.locator("#send").bounding_box()
        assert box is not None and box["y"] + box["height"] <= 740
        page.tap(".marker >> nth=7")
        assert page.is_visible("#detail") and widest() <= 360


@pytest.mark.parametrize("size", [(640, 400), (320, 256)], ids=["200 %", "400 %"])
def test_the_page_can_be_used_at_a_large_zoom(
    browser: Browser, server: Scripted, size: tuple[int, int]
) -> None:
    """The room that is left of 1280 x 800: nothing is cut off, nothing goes sideways."""
    server.answer = lambda body: written(TEXT, POINTS, count=8)
    with opened(browser, server.address, viewport={"width": size[0], "height": size[1]}) as page:
        start_example(page, "A few things")
        ask(page, "Point to everything.")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        for selector in ("#send", ".marker >> nth=7", ".chip >> nth=7", ".actions >> text=CSV"):
            one = page.locator(selector)
            one.scroll_into_view_if_needed()
            box = one.bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= size[0]
            one.click(trial=True)  # nothing lies over it


def test_screen_readers_are_told(browser: Browser, server: Scripted, tmp_path: Path) -> None:
    Image.new("RGB", SIZE, "white").save(tmp_path / "one.png")
    server.answer = lambda body: written(f"Here: {TEXT}", POINTS, count=8)
    with opened(browser, server.address) as page:

        def told() -> str:
            return page.inner_text("#announcer")

        give(page, tmp_path / "one.png")
        assert told() == "1 picture added."
        ask(page, "Point to everything.")
        assert told() == "Here: dog cat cow bee key hat bus cup 8 points on the picture."
        assert page.get_attribute("#announcer", "aria-live") == "polite"
        page.get_by_role("button", name="Point 3, cow").first.click()
        page.click("#undo")
        assert told() == "The last question was taken back."
        page.get_by_role("textbox", name="Question about the picture").fill("Again?")
        page.get_by_role("button", name="Ask", exact=True).click()


def test_everything_can_be_reached_with_the_keyboard(browser: Browser, server: Scripted) -> None:
    server.answer = lambda body: written(TEXT, POINTS, count=8)
    with opened(browser, server.address) as page:
        start_example(page, "A few things")
        ask(page, "Point to everything.")
        page.evaluate("document.activeElement.blur()")
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate(
                    "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
                    " + document.activeElement.textContent.trim()"
                )
            )
        joined = "|".join(seen)
        for name in (
            "New chat",
            "Settings",
            "zoom",
            "Point 1, dog",
            "Point 8, cup",
            "JSON",
            "question",
            "Ask",
        ):
            assert name in joined, name
