"""Scores of a benchmark as a table, and as a page with images of the worst answers."""

from __future__ import annotations

import dataclasses
import html
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from nanomolmo2.evaluation.exam import Benchmark, Failure, Row, Scores, shown_in
from nanomolmo2.files import atomic_path
from nanomolmo2.processor.draw import draw_frames, draw_points
from nanomolmo2.processor.image import load_image
from nanomolmo2.processor.points import SCALE

LEGEND = "score [95 % interval, scenes resampled] ≥ goal that is met, < goal that is missed"
PAGE = "index.html"
PICTURES = "pictures"
ENLARGED = 2  # test images are small beside the discs that mark points
FRAMES_A_LINE = 4
TRUE_COLOUR = "#00ff40"


# ---- table ----


def format_score(value: float) -> str:
    """``".912"``, ``"1.000"``."""
    return f"{value:.3f}".removeprefix("0")


def format_cell(scores: Scores, name: str, row: Row) -> str:
    """``".912 [.903, .921] < .95"``: score, interval, goal; ``"-"`` for what was not asked."""
    if name not in scores.means:
        return "-"
    low, high = (format_score(end) for end in scores.intervals[name])
    cell = f"{format_score(scores.means[name])} [{low}, {high}]"
    goal = row.goal(scores.group)
    if goal is not None:
        cell += f" {'≥' if scores.means[name] >= goal else '<'} {goal:.2f}".replace(" 0.", " .")
    return cell


def score_table(scores: Sequence[Scores], rows: Mapping[str, Row]) -> str:
    """Scores of some groups side by side, as a Markdown table; see `LEGEND`."""
    titles, cells = ["", *(row.title for row in rows.values())], []
    for one in scores:
        cells.append([one.group, *(format_cell(one, name, row) for name, row in rows.items())])
    widths = [max(map(len, column)) for column in (titles, *cells)]
    lines = []
    for title, *row in zip(titles, *cells, strict=True):
        right = (f"{cell:>{width}}" for cell, width in zip(row, widths[1:], strict=True))
        lines.append("| " + " | ".join([f"{title:<{widths[0]}}", *right]) + " |")
    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths[1:])
    return "\n".join([lines[0], rule, *lines[1:]])


def goals_met(scores: Sequence[Scores], rows: Mapping[str, Row]) -> tuple[int, int]:
    """How many goals are met, of how many."""
    found = [
        one.means[name] >= goal
        for one in scores
        for name, row in rows.items()
        if name in one.means and (goal := row.goal(one.group)) is not None
    ]
    return sum(found), len(found)


def scores_to_json(scores: Sequence[Scores], rows: Mapping[str, Row]) -> dict[str, Any]:
    """Scores, answers, intervals and goals of every group, as plain JSON types."""
    return {
        one.group: {
            "scores": one.means,
            "answers": one.counts,
            "intervals": {name: list(ends) for name, ends in one.intervals.items()},
            "goals": {n: rows[n].goal(one.group) for n in one.means if rows[n].goal(one.group)},
        }
        for one in scores
    }


# ---- page ----


def check_report_folder(path: Path) -> None:
    """Find out before the work whether a report can be written.

    Raises: ValueError for a file, a folder that holds something, a place that cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a new or empty folder for the report")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: name a new or empty folder for the report")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"nothing can be written to {parent}: {error.strerror}") from None


def write_report(
    path: Path, scores: Sequence[Scores], about: Mapping[str, object], benchmark: Benchmark
) -> None:
    """Write ``index.html`` and its images into a new folder; complete or not at all.

    Args:
        path: a folder that is not there yet, or is empty.
        about: what to say at the top: model, numbers of scenes, seed.
    Raises: ValueError as `check_report_folder`.
    """
    check_report_folder(path)
    with atomic_path(path) as folder:
        (folder / PICTURES).mkdir(parents=True)
        sections = []
        for one in scores:
            sections.append(f"<h2>{html.escape(one.group)}: the worst answers</h2>")
            if not one.failures:
                sections.append("<p>None.</p>")
            numbered = enumerate(one.failures, start=1)
            for task, group in itertools.groupby(numbered, lambda item: item[1].branch.task):
                sections.append(f"<h3>{html.escape(task)}</h3><div>")
                for number, failure in group:
                    name = f"{PICTURES}/{one.group}-{number:02d}-{task}.png"
                    draw_failure(failure).save(folder / name)
                    sections.append(_figure(failure, name))
                sections.append("</div>")
        page = _PAGE.format(
            name=html.escape(benchmark.name),
            title=html.escape(benchmark.title),
            about="".join(
                f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
                for key, value in about.items()
            ),
            table=_html_table(scores, benchmark.rows),
            legend=html.escape(LEGEND),
            sections="\n".join(sections),
        )
        (folder / PAGE).write_text(page, encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>nanomolmo2 eval {name}</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 2em; }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: 0 1em; }}
dd {{ margin: 0; }}
td, th {{ padding: 2px 10px; text-align: right; white-space: nowrap; }}
td:first-child {{ text-align: left; }}
.met {{ background: #d8f0d8; }}
.missed {{ background: #f8dada; }}
div {{ display: flex; flex-wrap: wrap; gap: 16px; align-items: start; }}
figure {{ margin: 0; max-width: 800px; }}
figcaption {{ overflow-wrap: anywhere; max-width: 400px; }}
</style>
<h1>{title}</h1>
<dl>{about}</dl>
<table>
{table}
</table>
<p>{legend}. Below: boxes are where the things are, discs what the answer points at.</p>
{sections}
</html>
"""


def _html_table(scores: Sequence[Scores], rows: Mapping[str, Row]) -> str:
    lines = ["<tr><th>" + "".join(f"<th>{html.escape(one.group)}" for one in scores)]
    for name, row in rows.items():
        line = f"<tr><td>{html.escape(row.title)}"
        for one in scores:
            goal = row.goal(one.group)
            style = ""
            if goal is not None and name in one.means:
                style = ' class="met"' if one.means[name] >= goal else ' class="missed"'
            line += f"<td{style}>{html.escape(format_cell(one, name, row))}"
        lines.append(line)
    return "\n".join(lines)


def _figure(failure: Failure, image: str) -> str:
    def escaped(text: object) -> str:
        return html.escape(str(text))

    truth = failure.branch.truth
    return (
        f'<figure><img src="{escaped(image)}" alt="{escaped(failure.name)}"><figcaption>'
        f"<b>{escaped(failure.branch.messages[0]['content'])}</b><br>"
        f"said: {escaped(failure.answer)}<br>true: {escaped(truth.get('answer', '-'))}<br>"
        f"{escaped(failure.name)}, score {failure.score:.2f}</figcaption></figure>"
    )


# ---- images ----


class _Mark(NamedTuple):
    """A true box, in an image (from 1) or at a time in seconds."""

    box: Sequence[float]
    image: int = 1
    time: float | None = None


def draw_failure(failure: Failure) -> Image.Image:
    """An example's images or frames with the true boxes and the points of the answer."""
    example, shown = failure.example, shown_in(failure.example)
    points, marks = shown.points(failure.answer), _true_marks(failure)
    if example.video is None:
        canvases = [_enlarged(image) for image in example.images]
        for mark in marks:
            _draw_box(canvases[mark.image - 1], [ENLARGED * v for v in mark.box])
        points = [dataclasses.replace(p, x=ENLARGED * p.x, y=ENLARGED * p.y) for p in points]
        drawn = [draw_points(c, points, number=i) for i, c in enumerate(canvases, start=1)]
        return _tiled(drawn, len(drawn))
    times: Sequence[float] = example.video.times
    frames = [load_image(frame).copy() for frame in example.video.frames]
    for mark in marks:
        distances = [abs(time - (mark.time or 0.0)) for time in times]
        _draw_box(frames[distances.index(min(distances))], mark.box)
    drawn = draw_frames(frames, times, points)
    for time, frame in zip(times, drawn, strict=True):
        ImageDraw.Draw(frame).text(
            (3, 1), f"{time:.1f} s", fill="white", stroke_width=2, stroke_fill="black"
        )
    return _tiled(drawn, FRAMES_A_LINE)


def _true_marks(failure: Failure) -> list[_Mark]:
    """Where the things are that a question asked for, and the place that it named."""
    truth: Mapping[str, Any] = failure.branch.truth
    if "frames" in truth:
        return [
            _Mark(box, time=frame["time"])
            for frame in truth["frames"]
            for box in frame["boxes"]
            if box is not None
        ]
    boxes = [box for box in truth.get("boxes", ()) if box is not None]
    boxes += [box for group in truth.get("groups", ()) for box in group["boxes"]]
    if {"x", "y"} <= truth.keys():  # a place that the question names
        (width, height), side = shown_in(failure.example).image_sizes[0], 3
        x, y = truth["x"] * width / SCALE, truth["y"] * height / SCALE
        boxes.append((x - side, y - side, x + side, y + side))
    return [_Mark(box, time=truth.get("time")) for box in boxes]


def _enlarged(image: Any) -> Image.Image:
    loaded = load_image(image)
    return loaded.resize((ENLARGED * loaded.width, ENLARGED * loaded.height))


def _draw_box(canvas: Image.Image, box: Sequence[float]) -> None:
    """A frame that shows on dark and on light ground."""
    x0, y0, x1, y1 = (round(v) for v in box)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=4)
    draw.rectangle((x0, y0, x1, y1), outline=TRUE_COLOUR, width=2)


def _tiled(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of any sizes in lines of so many, with a gap between."""
    gap, width = 6, max(image.width for image in images)
    height = max(image.height for image in images)
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, lines * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for number, image in enumerate(images):
        line, column = divmod(number, columns)
        sheet.paste(image, (column * (width + gap), line * (height + gap)))
    return sheet
