"""The page in a real browser, before a server that says what the tests tell it to say.

What a person does is done by the functions of scripts/page_screenshots.py, which also makes the
docs' pictures. Positions and texts that are expected are worked out by hand.
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

from nanomolmo2.processor import parse_points
from scripts.page_screenshots import (
    answered,
    ask,
    centres,
    give,
    missing,
    opened,
)
from tests.serve.conftest import file_url
from tests.serve.scripted import Refused, Scripted, point, scripted_server, whole, written

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

SIZE = (200, 120)
TAGGED = '<points coords="1 1 250 250 2 750 500">dog</points>'
DOGS = [point(50, 30, SIZE, id=1), point(150, 60, SIZE, id=2)]


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        yield script


@pytest.fixture
def page(browser: Browser, server: Scripted) -> Iterator[Page]:
    with opened(browser, server.address) as found:
        yield found


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "two dogs.png"
    Image.new("RGB", SIZE, "white").save(path)
    return path


def two_dogs(server: Scripted) -> None:
    server.answer = lambda body: written(f"Here: {TAGGED}.", DOGS, count=2)


def text_of(page: Page, selector: str) -> str:
    return " ".join(page.inner_text(selector).split())


# ---- first sight ----


def test_the_page_is_painted_within_a_second(browser: Browser, server: Scripted) -> None:
    with opened(browser, server.address) as page:
        paint = page.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? "
            "new Promise((found) => new PerformanceObserver((list) => "
            "found(list.getEntriesByName('first-contentful-paint')[0].startTime))"
            ".observe({type: 'paint', buffered: true}))"
        )
        assert 0 < paint < 1000
        assert text_of(page, "#model-name") == "tiny"
        loaded = page.evaluate("performance.getEntriesByType('resource').map((r) => r.name)")
        assert len(loaded) > 10
        assert all(name.startswith(server.address) for name in loaded)  # works offline


def test_nothing_of_it_is_inline() -> None:
    """What the content security policy forbids would only show where it is tried."""
    from tests.serve.scripted import PAGE

    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert " style=" not in html and "<style" not in html
    assert html.count("<script") == html.count("<script src=") + html.count(
        '<script type="module" src='
    )
    assert not [
        line for line in html.splitlines() if " on" in line and '="' in line and " onc" in line
    ]
    for path in PAGE.glob("*.*"):
        content = path.read_text(encoding="utf-8")
        assert len(content.splitlines()) < 600, path.name
        assert "innerHTML" not in content and "eval(" not in content, path.name
        assert "https://" not in content.replace("an https", ""), path.name


# ---- asking ----


def test_a_question_takes_the_picture_as_it_is(page: Page, server: Scripted, picture: Path) -> None:
    two_dogs(server)
    give(page, picture)
    ask(page, "  Point to the dogs. ")
    (body,) = server.asked
    assert body == {
        "model": "tiny",
        "question": "Point to the dogs.",
        "images": [file_url(picture)],
        "temperature": 0,
        "stream": True,
    }
    assert text_of(page, ".said") == "Here: dog 12."
    assert text_of(page, ".meta") == "2 points · count 2 · 7 tokens · 0.3 s"
    assert text_of(page, "#legend") == "dog 2"
    assert page.input_value("#question") == ""


def test_points_are_there_before_the_answer_is(page: Page, server: Scripted, picture: Path) -> None:
    go_on = threading.Event()

    def slowly(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "text", {"text": 'Look: <points coords="1 1 250 250 2 75'}
        yield "point", DOGS[0]
        assert go_on.wait(60)
        yield "text", {"text": '0 500">dog</points>'}
        yield "point", DOGS[1]
        yield "answer", whole(f"Look: {TAGGED}", DOGS)

    server.answer = slowly
    give(page, picture)
    ask(page, "Where?", wait=False)
    page.wait_for_selector(".marker")
    assert text_of(page, ".said") == "Look: 1"
    assert page.locator(".turn.writing").count() == 1
    assert centres(page) == [(pytest.approx(0.25, abs=0.01), pytest.approx(0.25, abs=0.01))]
    go_on.set()
    answered(page)
    assert text_of(page, ".said") == "Look: dog 12"
    assert page.locator(".marker").count() == 2


@pytest.mark.parametrize(
    "window", [{}, {"device_scale_factor": 2}, {"viewport": {"width": 640, "height": 500}}]
)
def test_points_are_at_their_pixels_at_every_zoom(
    browser: Browser, server: Scripted, picture: Path, window: dict[str, Any]
) -> None:
    """The points (50, 30) and (150, 60) of 200 x 120 pixels; also at twice as many pixels of the
    screen, and at the size that a window has at 200 % of the browser's own zoom."""
    two_dogs(server)
    with opened(browser, server.address, **window) as page:
        give(page, picture)
        ask(page, "Point to the dogs.")
        for zoom, expected in (
            ("0.5", [(25, 15), (75, 30)]),
            ("1", [(50, 30), (150, 60)]),
            ("2", [(100, 60), (300, 120)]),
        ):
            page.select_option("#zoom", zoom)
            shown = page.evaluate(
                """() => { const box = document.querySelector('.shown').getBoundingClientRect();
                  const markers = [...document.querySelectorAll('.marker')];
                  return [box.width, box.height, ...markers.map((m) => {
                    const disc = m.getBoundingClientRect();
                    return [disc.x + disc.width / 2 - box.x, disc.y + disc.height / 2 - box.y];
                  })]; }"""
            )
            scale = float(zoom)
            assert shown[:2] == [200 * scale, 120 * scale]
            for (x, y), (right, down) in zip(shown[2:], expected, strict=True):
                assert abs(x - right) < 1 and abs(y - down) < 1
        page.select_option("#zoom", "fit")
        for (x, y), (right, down) in zip(centres(page), ((0.25, 0.25), (0.75, 0.5)), strict=True):
            assert abs(x - right) < 0.01 and abs(y - down) < 0.01


def test_the_servers_sentence_is_shown_as_it_is(
    page: Page, server: Scripted, picture: Path
) -> None:
    sentence = 'The picture has <b>9</b> billion pixels, at most 64 million are "taken": shrink it.'

    def refuse(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        raise Refused(413, sentence)
        yield  # a generator, as all answers

    server.answer = refuse
    give(page, picture)
    ask(page, "What?")
    assert page.inner_text(".refused") == sentence
    assert page.get_attribute(".refused", "role") == "alert"
    two_dogs(server)
    page.click("text=Ask again")
    page.wait_for_selector(".chip")
    assert page.locator(".turn").count() == 1
    assert server.asked[1]["images"] == [file_url(picture)]


def test_an_error_in_the_middle_keeps_what_was_written(page: Page, server: Scripted) -> None:
    def fail(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "text", {"text": "A dog and"}
        yield "error", {"error": {"message": "The time is up.", "type": "timeout", "code": None}}

    server.answer = fail
    ask(page, "What?")
    assert text_of(page, ".said") == "A dog and"
    assert page.inner_text(".refused") == "The time is up."
    server.answer = lambda body: [("text", {"text": "A dog"})]  # and the connection is gone
    page.click("text=Ask again")
    page.wait_for_selector("text=the connection to the server was lost")


def test_stop_ends_the_answer_at_the_server_too(page: Page, server: Scripted) -> None:
    def endless(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for _ in range(1_000):
            yield "text", {"text": "on and "}
            server.left.wait(0.05)

    server.answer = endless
    ask(page, "Go.", wait=False)
    page.wait_for_selector("text=on and on")
    page.click("#stop")
    answered(page)
    assert text_of(page, ".meta") == "Stopped."
    assert "on and" in text_of(page, ".said")
    assert server.left.wait(60)
    ask(page, "Again.", wait=False)
    page.wait_for_selector(".turn:nth-child(2) >> text=on and on")
    page.keyboard.press("Escape")
    answered(page)


def test_undo_takes_the_last_question_back(page: Page, server: Scripted, picture: Path) -> None:
    two_dogs(server)
    give(page, picture)
    ask(page, "Point to the dogs.")
    page.click("#undo")
    assert page.locator(".turn").count() == page.locator(".marker").count() == 0
    assert page.input_value("#question") == "Point to the dogs."
    assert page.evaluate("localStorage.getItem('nanomolmo2.history')") == "[]"
    page.press("#question", "Enter")
    answered(page)
    assert server.asked[0] == server.asked[1]


def test_later_questions_bring_the_earlier_ones(
    page: Page, server: Scripted, picture: Path
) -> None:
    two_dogs(server)
    give(page, picture)
    ask(page, "Point to the dogs.")
    server.answer = lambda body: written("Brown.")
    ask(page, "Which colour have they?")
    assert server.asked[1]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": file_url(picture)}},
                {"type": "text", "text": "Point to the dogs."},
            ],
        },
        {"role": "assistant", "content": f"Here: {TAGGED}."},
        {"role": "user", "content": [{"type": "text", "text": "Which colour have they?"}]},
    ]
    page.click("#open-settings")
    page.uncheck("#set-remember")
    page.keyboard.press("Escape")
    ask(page, "And now?")
    assert "messages" not in server.asked[2]
    assert server.asked[2]["images"] == [file_url(picture)]
    # A click on an earlier answer brings its points back.
    assert page.locator(".marker").count() == 0
    page.click(".turn:first-child .said")
    assert page.locator(".marker").count() == 2


def test_what_a_model_writes_stays_text(page: Page, server: Scripted, tmp_path: Path) -> None:
    bad = "<img src=x onerror=document.title='gone'><script>document.title='gone'</script>"
    label = '"><b>dog</b>'
    server.answer = lambda body: written(
        f"{bad} {TAGGED}",
        [point(50, 30, SIZE, label=label), point(150, 60, SIZE, id=2, label=label)],
    )
    path = tmp_path / "<b>x<b>.png"
    Image.new("RGB", SIZE).save(path)
    give(page, path)
    ask(page, bad)
    assert page.title() == "NanoMolmo2"
    assert page.inner_text(".question p") == bad
    assert page.inner_text(".said").startswith(bad)
    assert page.locator("#legend b").count() == 1  # its number, not the label's markup
    assert label in page.inner_text("#legend")


# ---- points and words ----


def test_points_and_chips_show_each_other(page: Page, server: Scripted, picture: Path) -> None:
    two_dogs(server)
    give(page, picture)
    ask(page, "Point to the dogs.")
    page.wait_for_selector(".marker:not(.fresh) >> nth=1")
    page.hover(".chip >> nth=1")
    assert page.get_attribute(".marker >> nth=1", "class") == "marker near"
    assert page.get_attribute(".marker >> nth=0", "class") == "marker"
    page.hover(".marker >> nth=0")
    assert page.get_attribute(".chip >> nth=0", "class") == "chip near"
    assert page.get_attribute(".chip >> nth=1", "class") == "chip"
    page.click(".chip >> nth=1")
    assert text_of(page, "#detail-text") == "Point 2, dog: x 150, y 60 pixels"
    assert page.get_attribute(".marker >> nth=1", "aria-pressed") == "true"


def test_arrow_keys_go_from_point_to_point(page: Page, server: Scripted, picture: Path) -> None:
    two_dogs(server)
    give(page, picture)
    ask(page, "Point to the dogs.")
    focused = "document.activeElement.getAttribute('aria-label')"
    page.focus(".marker[tabindex='0']")
    assert page.evaluate(focused) == "Point 1, dog"
    for key, name in (
        ("ArrowRight", "Point 2, dog"),
        ("ArrowRight", "Point 2, dog"),  # the last one
        ("ArrowUp", "Point 1, dog"),
        ("End", "Point 2, dog"),
        ("Home", "Point 1, dog"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(focused) == name
        near = page.get_attribute(".chip.near", "aria-label")
        assert near == name
    page.keyboard.press("Enter")
    assert page.is_visible("#detail")
    page.keyboard.press("Escape")
    assert page.is_hidden("#detail")


def test_enter_asks_and_shift_enter_begins_a_line(page: Page, server: Scripted) -> None:
    page.click("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert not server.asked
    page.keyboard.press("Enter")
    answered(page)
    assert server.asked[0]["question"] == "one\ntwo"
    page.keyboard.press("Enter")  # nothing to ask
    assert len(server.asked) == 1


def test_the_page_reads_texts_as_the_server_does(page: Page) -> None:
    """Every beginning of an answer gives the points that `parse_points` finds in it."""
    read = """(text) => import('/page/answer.js').then(({ segments }) => segments(text).flatMap(
      (part) => (part.marks ?? []).map(({ place, id, x, y }) => [place, id, x, y])))"""
    texts = [
        f"Here: {TAGGED} and <points coords='1 1 100 042;2 2 555 169 3 709 162'>boats</points>.",
        '<points coords="1 3 007 1000" alt="cup"/> <point x="10.5" y="20" alt="dog">dog</point>',
        '<points x1="10.5" y1="20" x2="64" y2="48" alt="cats">cats</points> none <b>here</b> < 3',
    ]
    for text in texts:
        whole_text = [(p.image, p.x, p.y) for p in parse_points(text, [(1, 1)] * 2)]
        for end in range(len(text) + 1):
            found = [(place, x, y) for place, _, x, y in page.evaluate(read, text[:end])]
            # As the answer is written its points only ever grow.
            assert found == [pytest.approx(one) for one in whole_text[: len(found)]], text[:end]
            sure = parse_points(text[:end], [(1, 1)] * 2, problems=[])
            assert len(found) >= len(sure), text[:end]
        assert len(found) == len(whole_text)
    tracks = '<tracks coords="0.0 1 259 340 2 800 120;1:05.5 1 262 338">dancers</tracks>'
    assert page.evaluate(read, tracks) == [
        [0, 1, 0.259, 0.34],
        [0, 2, 0.8, 0.12],
        [65.5, 1, 0.262, 0.338],
    ]


def test_points_that_no_words_name_are_shown_too(
    page: Page, server: Scripted, picture: Path
) -> None:
    """Models that select write numbers of their own in place of coordinates."""
    text = 'Two <points coords="<POINT_12><POINT_300><POINT_900>1">dog</points>.'
    server.answer = lambda body: written(text, DOGS)
    give(page, picture)
    ask(page, "Point to the dogs.")
    assert text_of(page, ".said") == "Two dog 12."
    assert page.locator(".marker").count() == 2


# ---- taking answers along ----


def test_answers_can_be_copied(browser: Browser, server: Scripted, picture: Path) -> None:
    label = 'a "large", dog'
    dogs = [{**DOGS[0], "label": label, "confidence": 0.5}, DOGS[1]]
    server.answer = lambda body: written(f"Here: {TAGGED}.", dogs, count=2)
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, server.address, permissions=permissions) as page:
        give(page, picture)
        ask(page, "Point to the dogs.")
        page.click(".actions >> text=JSON")
        page.wait_for_selector("#toast >> text=JSON")
        copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
        assert copied["question"] == "Point to the dogs." and copied["model"] == "tiny"
        assert copied["points"] == dogs and copied["count"] == 2
        page.click(".actions >> text=CSV")
        page.wait_for_selector("#toast >> text=CSV")
        rows = list(csv.DictReader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
        first = {"id": "1", "label": label, "image": "1", "time": "", "x": "50", "y": "30"}
        assert rows[0] == {**first, "x_share": "0.25", "y_share": "0.25", "confidence": "0.5"}
        assert len(rows) == 2


def test_the_picture_with_its_points_can_be_downloaded(
    page: Page, server: Scripted, picture: Path
) -> None:
    two_dogs(server)
    give(page, picture)
    ask(page, "Point to the dogs.")
    with page.expect_download() as found:
        page.click(".actions >> text=Picture")
    assert found.value.suggested_filename == "two dogs-points.png"
    drawn = Image.open(found.value.path()).convert("RGB")
    assert drawn.size == SIZE
    # Seven pixels of the first colour around each point, white where there is none.
    assert drawn.getpixel((45, 30)) == drawn.getpixel((155, 60)) == (0xD6, 0x00, 0x6C)
    assert drawn.getpixel((100, 100)) == drawn.getpixel((70, 30)) == (255, 255, 255)


def test_why_there_shows_where_the_model_looked(
    page: Page, server: Scripted, picture: Path
) -> None:
    two_dogs(server)
    note = "Weak evidence: where it looked is not why."
    weights = [[0.1, 0.1, 0.1], [0.1, 0.5, 0.1]]
    server.attention = lambda body: {
        "images": [{"rows": 2, "cols": 3, "weights": weights}],
        "note": note,
    }
    give(page, picture)
    ask(page, "Point to the dogs.")
    page.click(".chip >> nth=1")
    page.click("#why")
    page.wait_for_selector(".heat")
    assert server.looked == [
        {
            "model": "tiny",
            "question": "Point to the dogs.",
            "images": [file_url(picture)],
            "answer": 'Here: <points coords="1 1 250 250 2 750 5',  # the token that chose the place
        }
    ]
    assert page.inner_text("#evidence") == note
    darkness = page.evaluate(
        "[...document.querySelector('.heat').getContext('2d').getImageData(0, 0, 3, 2).data]"
        ".filter((_, i) => i % 4 === 3)"
    )
    assert darkness == [200, 200, 200, 200, 0, 200]
    page.click("#why")
    assert page.locator(".heat").count() == 0 and page.is_hidden("#evidence")
