"""Pictures, videos, settings and the history of the page, in a real browser.

As tests/serve/test_page.py, before a server that says what the tests tell it to say.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from scripts.page_screenshots import (
    answered,
    ask,
    centres,
    give,
    missing,
    opened,
    start_example,
)
from tests.serve.conftest import file_url
from tests.serve.scripted import Scripted, point, scripted_server, written

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

SIZE = (200, 120)
# Puts a file into what a drop or a paste hands over.
TRANSFER = """
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    if (data) transfer.items.add(new File([bytes], 'given.png', { type: 'image/png' }));
"""


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        yield script


@pytest.fixture
def page(browser: Browser, server: Scripted) -> Iterator[Page]:
    with opened(browser, server.address) as found:
        yield found


def picture(folder: Path, name: str = "one.png", size: tuple[int, int] = SIZE) -> Path:
    Image.new("RGB", size, "white").save(folder / name)
    return folder / name


# ---- how pictures come ----


def test_pictures_can_be_dropped_and_pasted(page: Page, server: Scripted, tmp_path: Path) -> None:
    content = base64.b64encode(picture(tmp_path).read_bytes()).decode()
    page.evaluate(
        f"(data) => {{ {TRANSFER} dispatchEvent(new DragEvent('dragenter'));"
        "dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, cancelable: true })); }",
        content,
    )
    page.wait_for_selector(".frame")
    assert page.locator("body.dropping").count() == 0
    page.evaluate(
        f"(data) => {{ {TRANSFER} dispatchEvent(new ClipboardEvent('paste', "
        "{ clipboardData: transfer, cancelable: true })); }",
        content,
    )
    page.wait_for_selector(".frame >> nth=1")
    ask(page, "Which?")
    assert server.asked[0]["images"] == [f"data:image/png;base64,{content}"] * 2
    page.evaluate(
        f"(data) => {{ {TRANSFER} dispatchEvent(new DragEvent('drop', "
        "{ dataTransfer: transfer, cancelable: true })); }",
        "",
    )
    page.wait_for_selector("#toast >> text=Only files can be dropped")


def test_the_camera_gives_a_picture(page: Page, server: Scripted) -> None:
    page.click("#open-camera")
    page.click("#shoot")
    page.wait_for_selector(".frame")
    assert page.locator("dialog[open]").count() == 0
    ask(page, "Who is it?")
    start = "data:image/png;base64,"
    (url,) = server.asked[0]["images"]
    assert url.startswith(start) and len(url) > 1000


def test_what_is_no_picture_is_named(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    page.set_input_files("#files", str(tmp_path / "notes.txt"))
    page.wait_for_selector("#toast >> text=notes.txt is neither a picture nor a video.")
    (tmp_path / "none.png").write_bytes(b"")
    page.set_input_files("#files", str(tmp_path / "none.png"))
    page.wait_for_selector("#toast >> text=none.png is empty.")
    assert page.is_visible("#welcome")


def test_a_picture_that_the_browser_cannot_show_goes_to_the_server(
    page: Page, server: Scripted, tmp_path: Path
) -> None:
    """TIFF, for one: the server reads it, and its points are on an empty sheet of its size."""
    Image.new("RGB", (60, 40), "white").save(tmp_path / "scan.tiff")
    images = [{"width": 60, "height": 40}]
    tag = '<points coords="1 1 500 500">dot</points>'
    server.answer = lambda body: written(tag, [point(30, 20, (60, 40), label="dot")], images=images)
    give(page, tmp_path / "scan.tiff")
    assert "This browser cannot show scan.tiff" in page.inner_text(".unseen")
    ask(page, "Where is the dot?")
    assert server.asked[0]["images"] == [file_url(tmp_path / "scan.tiff", "image/tiff")]
    assert centres(page) == [(pytest.approx(0.5, abs=0.01), pytest.approx(0.5, abs=0.01))]


def test_several_pictures(page: Page, server: Scripted, tmp_path: Path) -> None:
    first, second = picture(tmp_path), picture(tmp_path, "two.png", (100, 300))
    tag = '<points coords="1 1 100 500;2 2 250 500">dog</points>'
    dogs = [point(20, 60, SIZE, image=1), point(25, 150, (100, 300), id=2, image=2)]
    server.answer = lambda body: written(tag, dogs)
    give(page, first, second)
    ask(page, "Point to the dogs.")
    assert server.asked[0]["images"] == [file_url(first), file_url(second)]
    assert page.locator(".frame:visible").count() == 2
    assert page.locator(".frame >> nth=1 >> .marker").inner_text() == "2"
    assert centres(page)[1] == (pytest.approx(0.25, abs=0.01), pytest.approx(0.5, abs=0.01))
    # One alone; a point in another picture brings that picture.
    page.click("[aria-label='Picture 1: one.png']")
    assert page.locator(".frame:visible").count() == 1 and page.is_visible("img[alt*='one.png']")
    page.click(".chip[aria-label='Point 2, dog, in picture 2']")
    assert page.is_visible(".frame img[alt*='two.png']") and page.is_hidden(
        ".frame img[alt*='one.png']"
    )
    assert "picture\xa02 · x\xa025, y\xa0150" in page.inner_text("#detail-text")
    # Another one in the middle of a chat has the next number, and can be taken back.
    give(page, picture(tmp_path, "three.png"))
    page.wait_for_selector("#toast >> text=Added to this chat.")
    assert page.locator(".pic-remove").count() == 1
    page.click("[aria-label='Remove three.png']")
    assert page.locator(".pic-item").count() == 2


# ---- videos ----


def tracked(server: Scripted, times: list[float], size: tuple[int, int]) -> None:
    """The scripted answer: a ball that goes from left to right, ten pixels a moment."""
    points = [
        point(10.0 * i + 10, 20, size, label="ball", time=time) for i, time in enumerate(times)
    ]
    triples = ";".join(
        f"{p['time']:.1f} 1 {round(1000 * p['x_share']):03d} {round(1000 * p['y_share']):03d}"
        for p in points
    )
    video = {"width": size[0], "height": size[1], "frame_times": times}
    text = f'<tracks coords="{triples}">ball</tracks>'
    server.answer = lambda body: written(text, points, count=1, video=video)


def check_scrubbing(page: Page, shares: list[tuple[float, float]]) -> None:
    """Each moment shows its own point; ``shares``: (seconds, x as a share)."""
    for time, x in shares:
        page.evaluate(
            "(time) => { const s = document.getElementById('scrubber'); s.value = time;"
            "s.dispatchEvent(new Event('input')); }",
            time,
        )
        page.locator("#clock", has_text=f"{time:.1f} s").wait_for()
        ((right, down),) = centres(page)
        assert (right, down) == (pytest.approx(x, abs=0.02), pytest.approx(0.5, abs=0.02))


def test_an_animated_picture_is_a_video(page: Page, server: Scripted, tmp_path: Path) -> None:
    colours = [Image.new("RGB", (80, 40), name) for name in ("red", "lime", "blue")]
    path = tmp_path / "moving.gif"
    colours[0].save(path, save_all=True, append_images=colours[1:], duration=500, loop=0)
    tracked(server, [0.0, 0.5, 1.0, 1.5], (80, 40))
    give(page, path)
    ask(page, "Track the ball.")
    assert (
        server.asked[0]["video"] == file_url(path, "image/gif") and "images" not in server.asked[0]
    )
    assert page.locator(".trails polyline").count() == 2  # the line and its rim
    assert [chip.inner_text() for chip in page.locator(".chip").all()] == [
        "0.0 s",
        "0.5 s",
        "1.0 s",
        "1.5 s",
    ]
    check_scrubbing(page, [(0.0, 1 / 8), (0.7, 2 / 8), (1.2, 3 / 8), (1.5, 4 / 8)])
    pixel = (
        "[...document.querySelector('canvas.shown').getContext('2d').getImageData(5, 5, 1, 1).data]"
    )
    page.click(".chip >> nth=1")
    assert page.evaluate(pixel) == [0, 255, 0, 255]
    assert (
        page.inner_text("#detail-text") == "Point 1, ball: at 0.5\xa0s · x\xa020, y\xa020\xa0pixels"
    )
    page.click(".chip >> nth=0")
    page.click("#play")
    page.locator("#clock", has_text="1.5 s").wait_for()
    assert page.evaluate(pixel) == [0, 0, 255, 255]


def test_a_video_file(page: Page, server: Scripted, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.webm"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 40, "yuv420p"
        for i in range(20):
            shade = np.full((40, 80, 3), 12 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        file.mux(stream.encode())
    tracked(server, [0.0, 0.5, 1.0, 1.5], (80, 40))
    give(page, path)
    ask(page, "Track the ball.")
    assert server.asked[0]["video"] == file_url(path, "video/webm")
    check_scrubbing(page, [(0.0, 1 / 8), (0.6, 2 / 8), (1.1, 3 / 8), (1.7, 4 / 8)])
    # Pictures do not go with it.
    give(page, picture(tmp_path))
    page.wait_for_selector("#toast >> text=A chat is about pictures, or about one video.")
    page.click("#toast-action")
    page.wait_for_selector("img.shown")
    assert page.locator(".turn").count() == 0 and page.is_hidden("#player")
    # A new chat takes away what was offered for the one before.
    give(page, path)
    page.wait_for_selector("#toast >> text=A chat is about pictures, or about one video.")
    page.click("#new-chat")
    assert page.is_hidden("#toast")


# ---- settings ----


def test_settings_go_with_the_question(page: Page, server: Scripted) -> None:
    page.click("#open-settings")
    assert page.is_disabled("#set-max_crops")  # tiny has none
    page.select_option("#set-model", "large")
    page.fill("#set-temperature", "0.7")
    page.fill("#set-max_tokens", "40")
    page.fill("#set-max_crops", "3")
    page.select_option("#set-theme", "dark")
    page.keyboard.press("Escape")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 20, 19)"
    ask(page, "What?")
    settings = {"model": "large", "temperature": 0.7, "max_tokens": 40, "max_crops": 3}
    assert settings.items() <= server.asked[0].items()
    page.reload()
    page.locator("#model-name", has_text="large").wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ask(page, "What?")
    assert settings.items() <= server.asked[1].items()


def test_the_key_is_asked_for_and_forgotten(browser: Browser, server: Scripted) -> None:
    server.key = "secret-key"
    with opened(browser, server.address) as page:
        page.wait_for_selector("#toast >> text=The server asks for a key.")
        page.click("#toast-action")
        page.fill("#set-key", "secret-key")
        page.keyboard.press("Escape")
        page.locator("#model-name", has_text="tiny").wait_for()
        page.wait_for_selector(".example")
        ask(page, "What?")
        assert server.headers["authorization"] == "Bearer secret-key"
        assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")
        assert page.evaluate("sessionStorage.getItem('nanomolmo2.key')") == "secret-key"


# ---- history ----


def test_past_chats_stay_in_the_browser(page: Page, server: Scripted, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, (600, 1000, 3), np.uint8)
    Image.fromarray(noise).save(path)
    tag = '<points coords="1 1 250 500">dog</points>'
    server.answer = lambda body: written(tag, [point(250, 300, (1000, 600))])
    give(page, path)
    ask(page, "Point to the dog.")
    kept = page.evaluate("localStorage.getItem('nanomolmo2.history')")
    thumb = json.loads(kept)[0]["turns"][0]["media"][0]["thumb"]
    assert thumb.startswith("data:image/jpeg;base64,") and len(kept) < 60_000 < path.stat().st_size
    page.reload()
    page.click("#open-history")
    page.click(".past-chat:has-text('Point to the dog.')")
    assert centres(page) == [(pytest.approx(0.25, abs=0.01), pytest.approx(0.5, abs=0.01))]
    assert page.inner_text(".said").split() == ["dog", "1"]
    assert page.is_hidden("#composer") and page.is_visible("#readonly")
    page.click("#new-chat")
    assert page.is_visible("#welcome") and page.is_visible("#composer")
    page.click("#open-history")
    page.click("#clear-history")
    assert page.locator(".past-chat").count() == 0
    assert page.evaluate("localStorage.getItem('nanomolmo2.history')") is None
    assert len(server.asked) == 1


def test_a_full_storage_loses_the_oldest_chats(page: Page, server: Scripted) -> None:
    """Browsers give about five million characters."""
    old = [
        {"id": str(i), "when": 0, "title": f"old {i}", "turns": [], "pad": "x" * 600_000}
        for i in range(8)
    ]
    page.evaluate("(old) => localStorage.setItem('nanomolmo2.history', JSON.stringify(old))", old)
    page.evaluate("localStorage.setItem('other', 'y'.repeat(200_000))")
    server.answer = lambda body: written("z" * 300_000)
    ask(page, "New?")
    kept = page.evaluate(
        "JSON.parse(localStorage.getItem('nanomolmo2.history')).map((c) => c.title)"
    )
    assert kept[0] == "New?" and kept[1] == "old 0" and "old 7" not in kept


# ---- examples ----


def test_examples_open_with_their_questions(page: Page, server: Scripted) -> None:
    start_example(page, "Two pictures")
    page.wait_for_selector(".frame >> nth=1")
    offered = [one.inner_text() for one in page.locator(".suggestion").all()]
    assert offered == ["What is only in the second picture?", "Which picture has more cars?"]
    page.click(".suggestion >> nth=0")
    answered(page)
    assert server.asked[0]["question"] == offered[0] and len(server.asked[0]["images"]) == 2
    assert [one.inner_text() for one in page.locator(".suggestion").all()] == offered[1:]


def test_a_server_that_is_gone_is_said_so(page: Page, server: Scripted) -> None:
    page.context.set_offline(True)
    ask(page, "What?")
    assert page.inner_text(".refused") == "The server does not answer: is it still running?"


def test_a_model_without_videos_gets_the_first_frame(
    browser: Browser, server: Scripted, tmp_path: Path
) -> None:
    still: dict[str, Any] = {
        **server.models[0],
        "abilities": {**server.models[0]["abilities"], "video": False},
    }
    server.models = [still]
    frames = [Image.new("RGB", (80, 40), name) for name in ("red", "blue")]
    frames[0].save(tmp_path / "m.gif", save_all=True, append_images=frames[1:], duration=500)
    with opened(browser, server.address) as page:
        give(page, tmp_path / "m.gif")
        ask(page, "What?")
        assert server.asked[0]["images"] == [file_url(tmp_path / "m.gif", "image/gif")]
