"""Finding by example for everyone: the keyboard, screen readers, phones, large zooms, axe-core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from scripts.page_screenshots import found, give, missing, opened, show_one
from tests.serve.axe import axe_source, serious_findings
from tests.serve.scripted import Refused, Scripted, scripted_server
from tests.serve.test_page_access import DESKTOP, PHONE
from tests.serve.test_page_find import SIZE, THINGS, finding, marks, white

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

FOCUSED = "document.activeElement.getAttribute('aria-label')"


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        finding(script)
        yield script


def begin(page: Page, picture: Path) -> None:
    page.click("#mode-find")
    give(page, picture)
    show_one(page, 50, 30)
    page.wait_for_selector(".marker.thing")
    found(page)


def test_the_keyboard_alone_is_enough(browser: Browser, server: Scripted, tmp_path: Path) -> None:
    """A cross shows the example, a mark is clicked away with Enter and taken back with Enter."""
    with opened(browser, server.address) as page:

        def told() -> str:
            return page.inner_text("#announcer")

        give(page, white(tmp_path / "pills.png"))
        page.select_option("#zoom", "1")
        page.focus("#mode-find")
        page.keyboard.press("Enter")
        page.focus(".pad")
        assert page.evaluate(FOCUSED) == "Picture pills.png: show an example"
        # From the middle, (100, 60), 6 * 8 pixels to the left and 30 up.
        for _ in range(6):
            page.keyboard.press("ArrowLeft")
        for _ in range(30):
            page.keyboard.press("Shift+ArrowUp")
        assert told() == "x 52, y 30"
        assert page.is_visible(".cross")
        page.keyboard.press("Enter")
        page.wait_for_selector(".marker.thing")
        found(page)
        assert server.sought[0]["like"] == [[52, 30]]
        assert told() == "3 things found."
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED).startswith("Thing 1, your example, confidence 97 %")
        for key, name in (
            ("ArrowRight", "Thing 2, confidence 75 %"),
            ("End", "Thing 3, confidence 52 %"),
            ("ArrowDown", "Thing 3, "),
            ("Home", "Thing 1, "),
            ("ArrowRight", "Thing 2, "),
        ):
            page.keyboard.press(key)
            assert page.evaluate(FOCUSED).startswith(name)
        page.keyboard.press("Enter")
        page.wait_for_selector(".marker.wrong")
        found(page)
        assert server.sought[1]["unlike"] == [[150, 60]]
        assert told() == "2 things found."
        assert page.evaluate(FOCUSED) == "Not meant. Click takes this back"
        page.keyboard.press("Enter")
        page.wait_for_selector(".marker.wrong", state="detached")
        found(page)
        assert page.evaluate(FOCUSED).startswith("Thing 2, ")
        # From the list of what was found to the picture.
        page.focus(".found-chip[tabindex='0']")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.evaluate(FOCUSED).startswith("Thing 3, ")


def test_escape_ends_the_search(browser: Browser, server: Scripted, tmp_path: Path) -> None:
    with opened(browser, server.address) as page:
        begin(page, white(tmp_path / "pills.png"))
        page.route("**/v1/find", lambda route: None)  # no answer ever comes
        page.click(".marker.thing >> nth=0")
        page.wait_for_selector("#find-result[aria-busy='true']")
        page.keyboard.press("Escape")
        found(page)
        assert marks(page) == ["meant 1", "thing 2", "wrong ×"]


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
    browser: Browser, server: Scripted, tmp_path: Path, window: dict[str, Any], colours: str
) -> None:
    """At first, with things, examples and counter-examples, problems, a reference, an error."""
    source = axe_source()
    seen = {}
    still = {"reduced_motion": "reduce", "color_scheme": colours}
    finding(server, problems=("nothing like the example was found",))
    with opened(browser, server.address, **window, **still) as page:
        page.click("#mode-find")
        seen["welcome"] = serious_findings(page, source)
        begin(page, white(tmp_path / "pills.png"))
        page.click(".marker.thing >> nth=0")
        page.wait_for_selector(".marker.wrong")
        found(page)
        seen["found"] = serious_findings(page, source)
        page.set_input_files("#reference-file", str(white(tmp_path / "one.png")))
        page.wait_for_selector(".frame >> nth=1")
        seen["reference"] = serious_findings(page, source)

        def refuse(body: dict[str, Any]) -> dict[str, Any]:
            raise Refused(400, "The picture is broken: send another one.")

        server.find = refuse
        show_one(page, 50, 30, picture=0)
        page.wait_for_selector("#find-error:visible")
        seen["error"] = serious_findings(page, source)
    assert not [one for one in seen.values() if one], {k: v for k, v in seen.items() if v}


def test_nothing_is_wider_than_a_phone(browser: Browser, server: Scripted, tmp_path: Path) -> None:
    size = (1600, 900)
    finding(server, [(100 + 15 * i, 450, 0.9) for i in range(60)], size=size)
    path = white(tmp_path / f"{'name' * 20}.png", size)
    with opened(browser, server.address, **PHONE, has_touch=True) as page:

        def widest() -> float:
            return page.evaluate(
                "Math.max(document.documentElement.scrollWidth, ...['.top', '.stage', '.chat', "
                "'#finder', '#find-result', '#found', '.find-pictures'].map((s) => "
                "document.querySelector(s).getBoundingClientRect().right))"
            )

        page.tap("#mode-find")
        assert widest() <= 360
        give(page, path)
        box = page.locator(".pad").bounding_box()
        assert box is not None
        page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector(".marker >> nth=59")
        assert widest() <= 360
        page.set_input_files("#reference-file", str(path))
        page.wait_for_selector("#reference-row:visible")
        assert widest() <= 360


@pytest.mark.parametrize("size", [(640, 400), (320, 256)], ids=["200 %", "400 %"])
def test_finding_can_be_used_at_a_large_zoom(
    browser: Browser, server: Scripted, tmp_path: Path, size: tuple[int, int]
) -> None:
    """The room that is left of 1280 x 800: nothing is cut off, nothing goes sideways."""
    window = {"viewport": {"width": size[0], "height": size[1]}}
    with opened(browser, server.address, **window) as page:
        begin(page, white(tmp_path / "pills.png"))
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        for selector in (
            ".marker.thing >> nth=1",
            "#find-least",
            ".found-chip >> nth=2",
            "#save-csv",
            "#find-again",
            "#pick-reference",
        ):
            one = page.locator(selector)
            one.scroll_into_view_if_needed()
            box = one.bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= size[0]
            one.click(trial=True)  # nothing lies over it


def test_numbers_can_be_read_on_the_picture(
    browser: Browser, server: Scripted, tmp_path: Path
) -> None:
    """A picture that fills the screen: discs of full size, with their confidence below."""
    path = tmp_path / "large.png"
    Image.new("RGB", (4 * SIZE[0], 4 * SIZE[1]), "white").save(path)
    finding(server, [(4 * x, 4 * y, sure) for x, y, sure in THINGS], size=(800, 480))
    with opened(browser, server.address) as page:
        page.click("#mode-find")
        give(page, path)
        show_one(page, 200, 120)
        page.wait_for_selector(".marker.thing")
        found(page)
        box = page.locator(".marker.thing >> nth=0").bounding_box()
        assert box is not None and box["width"] == 26
        assert page.is_visible(".marker.thing >> nth=0 >> .sure")
