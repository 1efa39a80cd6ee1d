"""Finding by example on the page, in a real browser: click one, and all others light up.

As tests/serve/test_page.py, before a server that says what the tests tell it to say. What it finds
stands at places that are worked out by hand.
"""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from scripts.page_screenshots import centres, found, give, missing, opened, show_one
from tests.serve.conftest import file_url
from tests.serve.scripted import FINDS, TINY, Refused, Scripted, point, scripted_server, whole

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

SIZE = (200, 120)
# (x, y, confidence) of what there is, in the order of its numbers.
THINGS = [(50, 30, 0.97), (100, 30, 0.3), (150, 60, 0.75), (50, 90, 0.52)]


def finding(
    server: Scripted,
    things: list[tuple[int, int, float]] = THINGS,
    *,
    size: tuple[int, int] = SIZE,
    problems: tuple[str, ...] = (),
) -> None:
    """Let the server find these; as the real one it lists nothing under a counter-example."""

    def find(body: dict[str, Any]) -> dict[str, Any]:
        assert body["min_confidence"] == 0.05
        image = 2 if "reference" in body else 1
        wrong = [(x, y) for x, y, *_ in body.get("unlike", ())]
        told = [
            {
                **point(x, y, size, id=number, label="thing", image=image),
                "confidence": confidence,
                "size": 20.0,
            }
            for number, (x, y, confidence) in enumerate(things, start=1)
            if (x, y) not in wrong
        ]
        return whole("", told, count=len(told), problems=list(problems), model="finds")

    server.models, server.find = [FINDS, TINY], find


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        finding(script)
        yield script


@pytest.fixture
def page(browser: Browser, server: Scripted) -> Iterator[Page]:
    with opened(browser, server.address) as shown:
        shown.click("#mode-find")
        yield shown


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return white(tmp_path / "pills.png")


def white(path: Path, size: tuple[int, int] = SIZE) -> Path:
    Image.new("RGB", size, "white").save(path)
    return path


def text_of(page: Page, selector: str) -> str:
    return " ".join(page.inner_text(selector).split())


def marks(page: Page) -> list[str]:
    """The kind and the text of each mark, sorted."""
    found = page.evaluate(
        "[...document.querySelectorAll('.marker')].map((m) => "
        "`${m.classList[2]} ${m.firstChild.textContent}`)"
    )
    return sorted(found)


# ---- clicking ----


@pytest.mark.parametrize(
    "window", [{}, {"device_scale_factor": 2}, {"viewport": {"width": 640, "height": 500}}]
)
def test_a_click_finds_the_rest_at_their_pixels(
    browser: Browser, server: Scripted, picture: Path, window: dict[str, Any]
) -> None:
    """At three zooms; also at twice as many pixels of the screen, and at the size that a window
    has at 200 % of the browser's own zoom."""
    with opened(browser, server.address, **window) as page:
        page.click("#mode-find")
        give(page, picture)
        for zoom in ("0.5", "1", "2"):
            scale = float(zoom)
            page.select_option("#zoom", zoom)
            show_one(page, 52, 34)
            page.wait_for_selector(".marker.thing")
            found(page)
            (like,) = server.sought[-1]["like"]
            assert abs(like[0] - 52) <= 0.5 / scale and abs(like[1] - 34) <= 0.5 / scale
            shown = page.evaluate(
                """() => { const box = document.querySelector('.shown').getBoundingClientRect();
                  return [...document.querySelectorAll('.marker')].map((m) => {
                    const disc = m.getBoundingClientRect();
                    return [disc.x + disc.width / 2 - box.x, disc.y + disc.height / 2 - box.y];
                  }); }"""
            )
            expected = [(50, 30), (150, 60), (50, 90)]
            for (x, y), (right, down) in zip(shown, expected, strict=True):
                assert abs(x - scale * right) < 1 and abs(y - scale * down) < 1
            page.click("#find-again")
            assert page.locator(".marker").count() == 0


def test_things_have_their_number_and_confidence(
    page: Page, server: Scripted, picture: Path
) -> None:
    """What the example stands on is one of them; what is less sure than half is not shown."""
    assert text_of(page, "#find-result") == "Show it a picture first"
    give(page, picture)
    assert text_of(page, "#find-result") == "Click one of the things"
    show_one(page, 52, 34)
    page.wait_for_selector(".marker.thing")
    found(page)
    assert server.sought == [
        {
            "model": "finds",
            "image": file_url(picture),
            "like": [[pytest.approx(52, abs=0.5), pytest.approx(34, abs=0.5)]],
            "min_confidence": 0.05,
        }
    ]
    assert marks(page) == ["meant 1", "thing 2", "thing 3"]
    assert [page.inner_text(f".sure >> nth={i}") for i in range(3)] == ["97 %", "75 %", "52 %"]
    assert text_of(page, "#found") == "1 97 % 2 75 % 3 52 %"
    assert text_of(page, "#find-result h2") == "3 things found"
    assert text_of(page, "#find-state") == "1 example · 1 not shown · 0.3 s"
    name = "Thing 2, confidence 75 %. Not meant? Click it away"
    page.get_by_role("button", name=name).hover()
    assert page.get_attribute(".found-chip >> nth=1", "class") == "found-chip near"
    page.hover(".found-chip >> nth=2")
    assert "near" in (page.get_attribute(".marker >> nth=2", "class") or "")


def test_a_wrong_one_is_clicked_away_and_taken_back(
    page: Page, server: Scripted, picture: Path
) -> None:
    give(page, picture)
    show_one(page, 50, 30)
    page.wait_for_selector(".marker.thing")
    found(page)
    answer, go_on = server.find, threading.Event()

    def slow(body: dict[str, Any]) -> dict[str, Any]:
        assert go_on.wait(60)
        return answer(body)

    server.find = slow
    page.click(".marker.thing >> nth=0")
    # At once, before the server has answered.
    assert marks(page) == ["meant 1", "thing 2", "wrong ×"]
    assert text_of(page, "#find-result h2") == "2 things found"
    assert text_of(page, "#find-state") == "Looking …"
    go_on.set()
    found(page)
    assert server.sought[1]["unlike"] == [[150, 60]]
    assert server.sought[1]["like"] == server.sought[0]["like"]
    assert marks(page) == ["meant 1", "thing 2", "wrong ×"]
    assert text_of(page, "#find-state") == "1 example · 1 counter-example · 1 not shown · 0.3 s"
    page.click(".marker.wrong")
    page.wait_for_selector(".marker.wrong", state="detached")
    found(page)
    assert "unlike" not in server.sought[2]
    assert marks(page) == ["meant 1", "thing 2", "thing 3"]


def test_a_click_on_what_was_missed_is_one_more_example(
    page: Page, server: Scripted, picture: Path
) -> None:
    give(page, picture)
    show_one(page, 50, 30)
    page.wait_for_selector(".marker.thing")
    show_one(page, 100, 30)
    page.wait_for_selector(".marker >> nth=3")
    found(page)
    assert [[round(x), round(y)] for x, y in server.sought[1]["like"]] == [[50, 30], [100, 30]]
    # It is found with .3, which is not shown: the example has a mark of its own.
    assert marks(page) == ["meant +", "meant 1", "thing 2", "thing 3"]
    page.click(".marker.meant >> nth=1")
    page.wait_for_selector(".marker >> nth=3", state="detached")
    found(page)
    assert len(server.sought[2]["like"]) == 1
    # Without any example there is nothing to look for.
    page.click(".marker.meant")
    page.wait_for_selector(".marker", state="detached")
    assert text_of(page, "#find-result") == "Click one of the things"
    assert len(server.sought) == 3
    page.click("#find-undo")
    page.wait_for_selector(".marker >> nth=2")
    assert marks(page) == ["meant 1", "thing 2", "thing 3"]


def test_the_slider_asks_nothing(page: Page, server: Scripted, picture: Path) -> None:
    give(page, picture)
    show_one(page, 50, 30)
    page.wait_for_selector(".marker.thing")
    for least, expected in (("30", 4), ("31", 3), ("76", 1), ("5", 4)):
        page.fill("#find-least", least)
        assert text_of(page, "#least-value") == f"{least} %"
        assert page.locator(".marker").count() == page.locator(".found-chip").count() == expected
        noun = "thing" if expected == 1 else "things"
        assert text_of(page, "#find-result h2") == f"{expected} {noun} found"
    page.focus("#find-least")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#find-least", "aria-valuetext") == "6 %"
    assert len(server.sought) == 1


def test_a_counter_example_takes_one_thing_and_not_its_neighbour(page: Page) -> None:
    """Things that touch: of 10 pixels, 9 apart; then the answer without the one in the middle."""
    arranged = page.evaluate(
        """() => import('/page/find.js').then(({ arrange }) => {
          const image = { width: 100, height: 100 };
          const at = (x) => ({ x_share: x, y_share: 0.5, confidence: 0.9, size: 10 });
          const counter = { medium: image, x: 0.5, y: 0.5 };
          const shown = (candidates) => arrange({ image, candidates, like: [], unlike: [counter],
            least: 0.5 }).things.map(({ x_share, id }) => [x_share, id]);
          return [shown([at(0.41), at(0.5), at(0.59)]), shown([at(0.41), at(0.59)])];
        })"""
    )
    assert arranged == [[[0.41, 1], [0.59, 2]]] * 2


def test_what_may_be_wrong_is_told(page: Page, server: Scripted, picture: Path) -> None:
    sentence = "nothing seems to be there: <b>confidence</b> 0.03 at (10, 10)"
    finding(server, [], problems=(sentence,))
    give(page, picture)
    show_one(page, 10, 10)
    page.wait_for_selector("#find-problems li")
    assert page.inner_text("#find-problems") == sentence
    assert text_of(page, "#find-result h2") == "0 things found"
    assert marks(page) == ["meant +"]


def test_the_servers_sentence_is_shown_as_it_is(
    page: Page, server: Scripted, picture: Path
) -> None:
    def refuse(body: dict[str, Any]) -> dict[str, Any]:
        raise Refused(400, "this <b>model</b> cannot find by example: use tiny")

    answer, server.find = server.find, refuse
    give(page, picture)
    show_one(page, 50, 30)
    page.wait_for_selector("#find-error:visible")
    assert (
        page.inner_text("#find-error-text") == "this <b>model</b> cannot find by example: use tiny"
    )
    assert page.get_attribute("#find-error", "role") == "alert"
    server.find = answer
    page.click("#find-retry")
    page.wait_for_selector(".marker.thing")
    assert page.is_hidden("#find-error")


# ---- other pictures ----


def test_examples_may_come_from_another_picture(
    page: Page, server: Scripted, picture: Path, tmp_path: Path
) -> None:
    reference = white(tmp_path / "one pill.png", (80, 80))
    give(page, picture)
    page.set_input_files("#reference-file", str(reference))
    page.wait_for_selector(".frame >> nth=1")
    assert text_of(page, "#reference-row") == "Examples come from one pill.png"
    show_one(page, 20, 60, picture=0)
    page.wait_for_selector(".marker.thing")
    found(page)
    body = server.sought[0]
    assert (body["reference"], body["image"]) == (file_url(reference), file_url(picture))
    ((x, y, number),) = body["like"]
    assert (round(x), round(y), number) == (20, 60, 1)
    # The example is marked where it is, and the things in the picture that was asked about.
    assert page.locator(".frame >> nth=0 >> .marker.meant").count() == 1
    assert page.locator(".frame >> nth=1 >> .marker.thing").count() == 3
    assert centres(page)[1:] == [
        (pytest.approx(0.25, abs=0.01), pytest.approx(0.25, abs=0.01)),
        (pytest.approx(0.75, abs=0.01), pytest.approx(0.5, abs=0.01)),
        (pytest.approx(0.25, abs=0.01), pytest.approx(0.75, abs=0.01)),
    ]
    page.click(".marker.thing >> nth=1")
    page.wait_for_selector(".marker.wrong")
    found(page)
    assert server.sought[1]["unlike"] == [[150, 60, 2]]
    page.click("#leave-reference")
    page.wait_for_selector(".frame >> nth=1", state="detached")
    assert page.locator(".marker").count() == 0


def test_the_same_examples_in_another_picture(
    page: Page, server: Scripted, picture: Path, tmp_path: Path
) -> None:
    other = white(tmp_path / "more pills.png")
    give(page, picture)
    show_one(page, 50, 30)
    page.wait_for_selector(".marker.thing")
    with page.expect_file_chooser() as chooser:
        page.click("#find-next")
    chooser.value.set_files(str(other))
    page.wait_for_selector(".frame >> nth=1 >> .marker.thing")
    body = server.sought[1]
    assert (body["reference"], body["image"]) == (file_url(picture), file_url(other))
    assert [number for *_, number in body["like"]] == [1]
    # Back to the first one: the example lies in it again.
    page.select_option("#find-image", label="1: pills.png")
    page.wait_for_selector(".frame >> nth=1", state="detached")
    found(page)
    assert "reference" not in server.sought[2] and server.sought[2]["image"] == file_url(picture)
    assert server.sought[2]["like"] == server.sought[0]["like"]


def test_finding_and_asking_share_the_pictures(
    browser: Browser, server: Scripted, picture: Path
) -> None:
    with opened(browser, server.address) as page:
        give(page, picture)
        page.click("#mode-find")
        assert page.is_hidden("#composer")
        show_one(page, 50, 30)
        page.wait_for_selector(".marker.thing")
        page.click("#mode-ask")
        assert page.locator(".marker").count() == page.locator(".pad").count() == 0
        assert page.is_visible("#question") and page.locator(".frame").count() == 1
        page.click("#mode-find")
        assert marks(page) == ["meant 1", "thing 2", "thing 3"] and len(server.sought) == 1
        page.click("#new-chat")
        assert page.is_visible("#welcome") and page.is_visible("#finder")
        # A model that does not find.
        page.click("#open-settings")
        page.select_option("#set-model", "tiny")
        page.keyboard.press("Escape")
        assert page.is_hidden("#modes") and page.is_visible("#question")


# ---- taking along ----


def test_what_was_found_can_be_downloaded(page: Page, server: Scripted, picture: Path) -> None:
    give(page, picture)
    show_one(page, 50, 30)
    page.wait_for_selector(".marker.thing")
    page.click(".marker.thing >> nth=1")
    page.wait_for_selector(".marker.wrong")
    found(page)
    saved = {}
    for kind in ("csv", "json", "png"):
        with page.expect_download() as download:
            page.click(f"#save-{kind}")
        assert download.value.suggested_filename == f"pills-found.{kind}"
        saved[kind] = Path(download.value.path()).read_bytes()
    rows = list(csv.DictReader(io.StringIO(saved["csv"].decode("utf-8"))))
    assert [(row["id"], row["x"], row["y"], row["confidence"]) for row in rows] == [
        ("1", "50", "30", "0.97"),
        ("2", "150", "60", "0.75"),
    ]
    assert rows[0]["picture"] == "pills.png" and rows[0]["x_share"] == "0.25"
    told = json.loads(saved["json"])
    assert (told["picture"], told["width"], told["height"]) == ("pills.png", *SIZE)
    assert (told["count"], told["min_confidence"], told["model"]) == (2, 0.5, "finds")
    assert told["unlike"] == [{"picture": "pills.png", "x": 50, "y": 90}]
    assert [(one["id"], one["x"], one["confidence"]) for one in told["points"]] == [
        (1, 50, 0.97),
        (2, 150, 0.75),
    ]
    drawn = Image.open(io.BytesIO(saved["png"])).convert("RGB")
    assert drawn.size == SIZE
    # The two things that are left, and white where one was clicked away.
    assert drawn.getpixel((45, 30)) == drawn.getpixel((155, 60)) == (0xD6, 0x00, 0x6C)
    assert drawn.getpixel((45, 90)) == drawn.getpixel((100, 30)) == (255, 255, 255)


def test_marks_of_a_crowd_do_not_lie_over_each_other(
    page: Page, server: Scripted, tmp_path: Path
) -> None:
    """60 things, 20 pixels of the screen apart: discs are smaller than that."""
    crowd = [(20 + 20 * (i % 10), 20 + 20 * (i // 10), 0.9) for i in range(60)]
    finding(server, crowd, size=(240, 140))
    give(page, white(tmp_path / "crowd.png", (240, 140)))
    page.select_option("#zoom", "1")
    show_one(page, 20, 20)
    page.wait_for_selector(".marker >> nth=59")
    found(page)
    assert text_of(page, "#find-result h2") == "60 things found"
    sides = page.evaluate(
        "[...document.querySelectorAll('.marker')].map((m) => m.getBoundingClientRect().width)"
    )
    assert all(side == pytest.approx(18, abs=0.1) for side in sides)
    with page.expect_download() as download:
        page.click("#save-png")
    drawn = Image.open(download.value.path()).convert("RGB")
    # Between two discs the picture is seen: their outer edges end at 1.3 of 20 / 2.4 pixels.
    assert drawn.getpixel((30, 30)) == (255, 255, 255)
