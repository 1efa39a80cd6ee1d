"""Draw the docs' pictures of the page: a real browser, the real server, the bundled model.

    python scripts/page_screenshots.py

Writes page.png, page-dark.png, page-phone.png, page-find.png and page-video.png into docs/images.
The functions that drive the page are those of tests/serve/test_page.py. Needs chromium (Debian's or
CHROMIUM=...) and Playwright for Python, which here downloads no browser of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without install

if TYPE_CHECKING:
    from fastapi import FastAPI
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images"
COINS = ROOT / "nanomolmo2" / "assets" / "photos" / "coins.png"
EXAMPLES = ROOT / "nanomolmo2" / "serve" / "page" / "examples"
ARGUMENTS = [
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--use-fake-device-for-media-stream",  # a camera for the tests
    "--use-fake-ui-for-media-stream",
]
PATIENCE = 60_000  # milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description="Take the docs' pictures of the page.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder to write to")
    options = parser.parse_args(arguments)
    if (reason := missing()) is not None:
        parser.error(reason)
    with real_server() as address, chromium() as browser:
        for name, shots in SHOTS.items():
            with opened(browser, address, **shots["window"]) as page:
                for step in shots["steps"]:
                    step(page)
                page.wait_for_timeout(600)  # until nothing moves any more
                page.screenshot(path=options.out / f"{name}.png")
            print(f"wrote {options.out / name}.png")
    return 0


# ---- the browser ----


def missing() -> str | None:
    """Why no browser can be driven here; None where one can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright is not installed: pip install playwright (it needs no download here)"
    if find_chromium() is None:
        return "there is no chromium: apt-get install chromium, or set CHROMIUM to a browser"
    return None


def find_chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Browser, address: str, **window: Any) -> Iterator[Page]:
    """The page in a browser that was never used before; ``window`` as Playwright's new_context.

    Raises: AssertionError if the page breaks a rule of its own: an error in its code, or something
        that the content security policy forbids.
    """
    window = {"viewport": {"width": 1280, "height": 800}, **window}
    context = browser.new_context(**window)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda told: wrong.append(told.text) if "Content Security Policy" in told.text else None,
    )
    page.goto(address)
    page.locator("#model-name", has_not_text="connecting").wait_for()
    try:
        yield page
    finally:
        context.close()
    assert not wrong, wrong


# ---- what a person does ----


def give(page: Page, *files: Path) -> None:
    """Choose files, as in the dialog of the browser."""
    page.set_input_files("#files", [str(file) for file in files])
    page.wait_for_selector("#canvas .frame:visible")


def start_example(page: Page, title: str) -> None:
    page.click(f".example:has-text('{title}')")
    page.wait_for_selector("#canvas .frame:visible")


def ask(page: Page, question: str, *, wait: bool = True) -> None:
    """Type a question and send it with Enter; then wait for the whole answer."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        answered(page)


def answered(page: Page) -> None:
    """Wait until no answer is being written."""
    page.wait_for_selector("#send:visible")
    page.wait_for_selector(".turn:last-child:not(.writing)")


def show_one(page: Page, x: float, y: float, *, picture: int = -1) -> None:
    """Click a place as an example, in pixels of the picture; `picture` counts those shown."""
    pad = page.locator(f".frame:visible >> nth={picture} >> .pad")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    width, height = page.evaluate(
        "(pad) => { const { naturalWidth, naturalHeight } = pad.parentNode.querySelector('.shown');"
        "return [naturalWidth, naturalHeight]; }",
        pad.element_handle(),
    )
    assert box is not None
    page.mouse.click(box["x"] + x / width * box["width"], box["y"] + y / height * box["height"])


def found(page: Page) -> None:
    """Wait until nothing is looked for."""
    page.wait_for_selector("#find-result[aria-busy='false']")


def centres(page: Page) -> list[tuple[float, float]]:
    """Where the visible points are, in pixels of the picture's upper left corner on the screen, and
    as shares of its sides: (x_share, y_share) of each marker's middle."""
    found = page.evaluate(
        """() => [...document.querySelectorAll('.marker')].filter((m) => !m.hidden).map((m) => {
          const disc = m.getBoundingClientRect();
          const shown = m.closest('.frame').querySelector('.shown').getBoundingClientRect();
          return [(disc.x + disc.width / 2 - shown.x) / shown.width,
                  (disc.y + disc.height / 2 - shown.y) / shown.height];
        })"""
    )
    return [(x, y) for x, y in found]


# ---- the server ----


@contextlib.contextmanager
def real_server() -> Iterator[str]:
    """A server of `tiny`, see `serving`."""
    from nanomolmo2 import VLM
    from nanomolmo2.serve.app import make_app
    from nanomolmo2.serve.settings import ServeSettings
    from nanomolmo2.serve.store import ModelStore

    app = make_app(ModelStore({"tiny": lambda: VLM("tiny")}), ServeSettings())
    with serving(app) as address:
        yield f"{address}/"


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """An app in a thread, at a free port of this computer; gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)


# ---- the docs' pictures ----

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2}
SHOTS: dict[str, dict[str, Any]] = {
    "page": {
        "window": DESKTOP,
        "steps": [
            lambda page: start_example(page, "Many of a kind"),
            lambda page: ask(page, "How many lollipops are there?"),
            lambda page: page.hover(".chip >> nth=2"),
        ],
    },
    "page-dark": {
        "window": {**DESKTOP, "color_scheme": "dark"},
        "steps": [
            lambda page: start_example(page, "A few things"),
            lambda page: ask(page, "Describe this picture."),
            lambda page: ask(page, "Point to everything."),
            lambda page: page.click(".marker >> nth=2"),
        ],
    },
    "page-phone": {
        "window": PHONE,
        "steps": [
            lambda page: start_example(page, "A few things"),
            lambda page: ask(page, "Point to the cookie."),
        ],
    },
    "page-find": {
        "window": DESKTOP,
        "steps": [
            lambda page: page.click("#mode-find"),
            lambda page: give(page, COINS),
            lambda page: show_one(page, 157, 52),
            lambda page: page.wait_for_selector(".marker.thing"),
            found,
        ],
    },
    "page-video": {
        "window": DESKTOP,
        "steps": [
            lambda page: start_example(page, "A short video"),
            lambda page: ask(page, "Track the helicopter."),
            lambda page: page.click(".chip >> nth=4"),
        ],
    },
}


if __name__ == "__main__":
    sys.exit(main())
