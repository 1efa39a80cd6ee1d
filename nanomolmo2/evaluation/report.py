"""Scores of a benchmark as a table, and as a page with images of the worst answers."""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from nanomolmo2.evaluation.exam import Benchmark, Failure, Row, Scores, shown_in
from nanomolmo2.evaluation.measures import track_things
from nanomolmo2.evaluation.regions import Box, Outline
from nanomolmo2.files import atomic_path
from nanomolmo2.processor.draw import draw_frames, draw_points
from nanomolmo2.processor.image import load_image
from nanomolmo2.processor.points import SCALE, Size
from nanomolmo2.processor.video import load_video

LEGEND = "score [95 % interval, scenes resampled] ≥ goal that is met, < goal that is missed"
PAGE = "index.html"
PICTURES = "pictures"
ENLARGED = 2  # test images are small beside the discs that mark points
LARGEST_SIDE = 800  # pixels; larger images are shown smaller
FRAMES_A_LINE = 4
MOST_FRAMES = 8  # of a video file
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
    head, *lines = [list(line) for line in zip(titles, *cells, strict=True)]
    return markdown_table(head, lines)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose columns line up; ``left``: how many of them begin at the left."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(head))]

    def joined(line: Sequence[str]) -> str:
        cells = zip(line, sides, widths, strict=True)
        return "| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in cells) + " |"

    rules = ("-" * (w + 1) + (":" if s == ">" else "-") for s, w in zip(sides, widths, strict=True))
    return "\n".join([joined(head), f"|{'|'.join(rules)}|", *map(joined, lines)])


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
        page = html_page(
            name=benchmark.name,
            title=benchmark.title,
            about=about,
            table=_html_table(scores, benchmark.rows),
            legend=LEGEND,
            sections=[
                section
                for one in scores
                for section in worst_answers(folder / PICTURES, one.group, one.failures)
            ],
        )
        (folder / PAGE).write_text(page, encoding="utf-8")


def worst_answers(folder: Path, group: str, failures: Sequence[Failure]) -> list[str]:
    """HTML of some answers, by task; their pictures are drawn into the folder `PICTURES`."""
    sections = [f"<h2>{html.escape(group)}: the worst answers</h2>"]
    if not failures:
        sections.append("<p>None.</p>")
    numbered = enumerate(failures, start=1)
    for task, found in itertools.groupby(numbered, lambda item: item[1].branch.task):
        sections.append(f"<h3>{html.escape(task)}</h3><div>")
        for number, failure in found:
            name = f"{_file_name(group)}-{number:02d}-{_file_name(task)}.png"
            drawn = draw_failure(failure)
            if drawn is not None:
                drawn.save(folder / name)
            sections.append(figure(failure, f"{PICTURES}/{name}" if drawn is not None else ""))
        sections.append("</div>")
    return sections


def _file_name(text: str) -> str:
    """What of a text may stand in the name of a file."""
    return re.sub(r"[^\w-]+", "_", text)[:40]


def html_page(
    *,
    name: str,
    title: str,
    about: Mapping[str, object],
    table: str,
    legend: str,
    sections: Sequence[str],
) -> str:
    """The page of a report; ``table`` and ``sections`` are HTML, all else is text."""
    return _PAGE.format(
        name=html.escape(name),
        title=html.escape(title),
        about="".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
            for key, value in about.items()
        ),
        table=table,
        legend=html.escape(legend),
        sections="\n".join(sections),
    )


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


def html_rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The inside of a table of texts."""
    rows = ["<tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)]
    rows += ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in line) for line in lines]
    return "\n".join(rows)


def figure(failure: Failure, image: str) -> str:
    """HTML of an answer; ``image``: address of what is drawn of it, or empty."""

    def escaped(text: object) -> str:
        return html.escape(str(text))

    truth = failure.branch.truth
    shown = f'<img src="{escaped(image)}" alt="{escaped(failure.name)}">' if image else ""
    return (
        f"<figure>{shown}<figcaption>"
        f"<b>{escaped(failure.branch.messages[0]['content'])}</b><br>"
        f"said: {escaped(failure.answer)}<br>true: {escaped(truth.get('answer', '-'))}<br>"
        f"{escaped(failure.name)}, score {failure.score:.2f}</figcaption></figure>"
    )


# ---- images ----


class _Mark(NamedTuple):
    """Lines around where something is, in an image (from 1) or at a time in seconds."""

    outline: Outline
    image: int = 1
    time: float | None = None

    def scaled(self, by: float) -> Outline:
        return [[(by * x, by * y) for x, y in ring] for ring in self.outline]


def draw_failure(failure: Failure) -> Image.Image | None:
    """An example's images or frames with where the things are and the points of the answer; None
    where it shows nothing."""
    example, shown = failure.example, shown_in(failure.example)
    points, marks = shown.points(failure.answer), _true_marks(failure)
    if example.video is None:
        if not example.images:
            return None
        scales = [_scale_of(size) for size in shown.image_sizes]
        canvases = [_scaled(image, by) for image, by in zip(example.images, scales, strict=True)]
        for mark in marks:
            if 1 <= mark.image <= len(canvases):
                _draw_outline(canvases[mark.image - 1], mark.scaled(scales[mark.image - 1]))
        points = [
            dataclasses.replace(p, x=scales[p.image - 1] * p.x, y=scales[p.image - 1] * p.y)
            for p in points
        ]
        drawn = [draw_points(c, points, number=i) for i, c in enumerate(canvases, start=1)]
        return _tiled(drawn, len(drawn))
    video = example.video
    if isinstance(video, (str, Path)):
        video = load_video(video, max_frames=MOST_FRAMES)
    times: Sequence[float] = video.times
    frames = [load_image(frame).copy() for frame in video.frames]
    for mark in marks:
        distances = [abs(time - (mark.time or 0.0)) for time in times]
        _draw_outline(frames[distances.index(min(distances))], mark.outline)
    drawn = draw_frames(frames, times, points)
    for time, frame in zip(times, drawn, strict=True):
        ImageDraw.Draw(frame).text(
            (3, 1), f"{time:.1f} s", fill="white", stroke_width=2, stroke_fill="black"
        )
    return _tiled(drawn, FRAMES_A_LINE)


def _true_marks(failure: Failure) -> list[_Mark]:
    """Where the things are that a question asked for, and the place that it named."""
    truth: Mapping[str, Any] = failure.branch.truth
    shown = shown_in(failure.example)
    try:
        things = track_things(truth, shown)
    except (ValueError, KeyError):  # the truth of a question about something else
        things = []
    marks = [_Mark(thing.region.outline, thing.image, thing.time) for thing in things]
    if {"x", "y"} <= truth.keys():  # a place that the question names
        (width, height), side = shown.image_sizes[0], 3
        x, y = truth["x"] * width / SCALE, truth["y"] * height / SCALE
        marks.append(_Mark(Box(x - side, y - side, x + side, y + side).outline))
    return marks


def _scale_of(size: Size) -> float:
    """Small images are enlarged, large ones shrunk."""
    return min(ENLARGED, LARGEST_SIDE / max(size))


def _scaled(image: Any, by: float) -> Image.Image:
    loaded = load_image(image)
    return loaded.resize((max(1, round(by * loaded.width)), max(1, round(by * loaded.height))))


def _draw_outline(canvas: Image.Image, outline: Outline) -> None:
    """Lines that show on dark and on light ground."""
    draw = ImageDraw.Draw(canvas)
    for ring in outline:
        corners = [(round(x), round(y)) for x, y in ring]
        (x0, y0), (x1, y1) = corners[0], corners[len(corners) // 2]
        if corners == [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]:
            draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=4)
            draw.rectangle((x0, y0, x1, y1), outline=TRUE_COLOUR, width=2)
        else:
            draw.line([*corners, corners[0]], fill="black", width=4, joint="curve")
            draw.line([*corners, corners[0]], fill=TRUE_COLOUR, width=2)


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
