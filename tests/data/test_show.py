"""Terminal text and the page: complete, escaped, and with nothing to load."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from nanomolmo2.data.audit import Finding, Report, audit
from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.data.inspect import Fault, View, look
from nanomolmo2.data.show import data_uri, make_page, print_report, print_views, visible
from tests.data.sources import Listed, encoder, picture, talk
from tests.small_model import small_processor

EVIL = "<script>alert('x')</script>\x1b[31m\u202e\"&"
TAG = '<points coords="1 1 250 500 2 1500 500"><b>dog</b></points>'


@pytest.fixture(scope="module")
def source() -> Listed:
    return Listed(
        Example([picture(1)], [talk(EVIL, TAG, task=EVIL), talk("Cats?", "No.")]),
        BadExample("bad record", EVIL),
        name=EVIL,
    )


@pytest.fixture(scope="module")
def views(source: Listed) -> list[View | Fault]:
    processor = small_processor()
    encode = encoder(processor, loss_weighting="sqrt")
    return [look(source, record, encode, processor) for record in range(2)]


@pytest.fixture(scope="module")
def page(source: Listed, views: list[View | Fault]) -> str:
    processor = small_processor()
    report = audit(source, encoder(processor), processor, max_tokens=400)
    return make_page(views, EVIL, EVIL, report)


class Reader(HTMLParser):
    """Checks that elements nest and that all attributes are quoted; collects what there is."""

    EMPTY = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_well_formed_and_escapes_the_data(page: str, read: Reader) -> None:
    known = "html head meta title style body h1 h2 h3 p span section article div table tr th td"
    assert set(read.tags) == {*known.split(), "details", "summary", "figure", "img", "figcaption"}
    assert "<script>alert('x')</script>\\x1b[31m\\u202e\"&" in read.text
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]


def test_the_page_loads_nothing(page: str, read: Reader) -> None:
    sources = [value for _, name, value in read.attributes if name in ("src", "href")]
    assert sources
    for value in sources:
        assert value is not None
        kind, _, data = value.partition(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg")
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert not re.search(r"https?://|url\(|@import", page)
    (policy,) = [v for t, n, v in read.attributes if (t, n) == ("meta", "content") and "src" in v]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_has_light_and_dark(page: str) -> None:
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_shows_every_token_with_what_it_is(
    views: list[View | Fault], page: str, read: Reader
) -> None:
    view = views[0]
    assert isinstance(view, View)
    titles = [value for tag, name, value in read.attributes if (tag, name) == ("span", "title")]
    assert len(titles) == len(view.tokens)
    weight = 1 / view.branches[1].num_learned ** 0.5
    last = view.branches[1].tokens[-1]
    assert titles[-1] == (
        f"{last.index}: id {last.id}, position {last.position}, learned, weight {weight:.4g}"
    )
    assert 'class="t special learned"' in page
    assert "&lt;im_patch&gt; ×4" in page
    # The original, what the encoder gets, and the points.
    assert read.tags.count("img") == 3
    assert "points outside the picture" in page
    assert "left out '2 1500 500'" in read.text
    assert "record 1" in read.text


def test_small_pictures_are_kept_exactly_and_large_ones_small() -> None:
    exact = picture(1, 256, 256)
    kind, _, data = data_uri(exact).partition(";base64,")
    assert kind == "data:image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), exact)
    assert data_uri(picture(1, 257, 30)).startswith("data:image/jpeg;")


def test_the_terminal_text(views: list[View | Fault]) -> None:
    out = io.StringIO()
    print_views(views, Console(file=out, width=200))
    text = out.getvalue()
    assert re.search(r"user +<\|im_start\|>user↵│.+│\?│<\|im_end\|>↵<\|im_start\|>assistant↵", text)
    assert re.search(r"assistant +.+│\.│<\|im_end\|>", text)
    assert re.search(r"prefix +<\|im_end\|>│<low_res_im_start>│<im_patch> ×4│<im_end>", text)
    assert re.search(r"branch 1: subsegment 1, positions 7 to \d+, \d of \d+ tokens learned", text)
    assert re.search(r"problem +points tag 1: left out '2 1500 500'", text)
    assert "record 1: bad record: <script>" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_terminal_shows_the_picture_where_it_has_colours(views: list[View | Fault]) -> None:
    out = io.StringIO()
    print_views(
        views[:1], Console(file=out, width=100, force_terminal=True, color_system="truecolor")
    )
    assert out.getvalue().count("▀") == 36 * round(36 * 30 / 40 / 2)


def test_the_report(source: Listed) -> None:
    processor = small_processor()
    out = io.StringIO()
    report = audit(source, encoder(processor), processor, max_tokens=400)
    print_report(report, Console(file=out, width=200))
    text = out.getvalue()
    assert re.search(r"fatal +│ points outside the picture +│ 1 +│ 0 ", text)
    assert re.search(r"fatal +│ bad record +│ 1 +│ 1 +│ <script>", text)
    assert "looked at 2 of 2 records, of which 1 can be read" in text
    assert "\u202e" not in text


def test_what_is_visible() -> None:
    assert visible("a\nb\t\x00 é犬🐕\u200b") == "a↵b\\t\\x00 é犬🐕\\u200b"


def test_markup_and_codes_of_data_are_shown_as_they_are() -> None:
    """A cause was once read as the colours of rich."""
    detail = "[link=http://a]b[/link] \x9b31m"
    finding = Finding("[red]x[/red] \x1b[2J", True, detail, count=1, records=[3])
    report = Report(source="[bold]s \x1b", size=1, records=1, max_tokens=9, findings=[finding])
    out = io.StringIO()
    console = Console(file=out, width=300)
    print_report(report, console)
    print_views([Fault(5, "[red]y[/red]\x1b", "[/]z")], console)
    text = out.getvalue()
    assert not set(text) & set("\x1b\x9b")
    for shown in (
        r"[red]x[/red] \x1b[2J",
        r"[link=http://a]b[/link] \x9b31m",
        r"[bold]s \x1b",
        r"[red]y[/red]\x1b: [/]z",
    ):
        assert shown in text
