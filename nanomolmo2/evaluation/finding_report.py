"""The tables of how well a model finds by example, their JSON, and a page of the worst answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanomolmo2.evaluation import breakdown
from nanomolmo2.evaluation.finding import Cases, FindRow, failure
from nanomolmo2.evaluation.report import (
    PAGE,
    PICTURES,
    check_report_folder,
    html_page,
    html_rows,
    markdown_table,
    worst_answers,
)
from nanomolmo2.files import atomic_path
from nanomolmo2.terminal import visible

LEGEND = (
    f"{breakdown.LEGEND}; points count inside of the thing's box, each thing once; goal that is "
    f"met ≥ or ≤, missed < or >; s: median seconds from a click to all points"
)
ERRORS = ("mae", "relative")  # less is better; of all other figures more


def is_met(row: FindRow, name: str) -> bool:
    """Whether a figure reaches its goal."""
    value, goal = row.figures[name], row.goals[name]
    return bool(value <= goal if name in ERRORS else value >= goal)


def goals_met(rows: Sequence[FindRow]) -> tuple[int, int]:
    """How many goals are met, of how many."""
    found = [is_met(row, name) for row in rows for name in row.goals if name in row.figures]
    return sum(found), len(found)


def cell(row: FindRow, name: str) -> str:
    """``".912 [.903, .921] < .950"``: figure, interval, goal."""
    text = breakdown.cell(row.figures, name)
    if name in row.goals and name in row.figures:
        met = is_met(row, name)
        sign = ("≤" if met else ">") if name in ERRORS else ("≥" if met else "<")
        text += f" {sign} {breakdown.number(name, row.goals[name])}"
    return text


def cells(rows: Sequence[FindRow]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of the table."""
    head = ["set", "", "clicks", *breakdown.HEAD, "s"]
    lines = [
        [
            row.name,
            row.title,
            str(row.figures["questions"]),
            *(cell(row, name) for name in breakdown.NAMES),
            f"{row.figures['seconds']:.2f}",
        ]
        for row in rows
    ]
    return head, lines


def parts(rows: Sequence[FindRow]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of a table by how many things there are, and by how large they are."""
    head = ["set", "things", "clicks", *breakdown.HEAD]
    lines = [
        line for row in rows for line in breakdown.part_lines(row.name, row.by_count, row.by_size)
    ]
    return head, lines


def tables(rows: Sequence[FindRow]) -> str:
    """Both in Markdown; the second only where the things differ."""
    texts = []
    for head, lines in (cells(rows), parts(rows)):
        clean = [[" ".join(visible(c).replace("|", "/").split()) for c in line] for line in lines]
        if clean:
            texts.append(markdown_table(head, clean, left=2))
    return "\n\n".join(texts)


def to_json(rows: Sequence[FindRow], about: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON types: what was measured and how, and ``rows`` by name."""
    return {**about, "rows": {row.name: row.to_dict() for row in rows}}


def from_json(content: Mapping[str, Any]) -> list[FindRow]:
    """The rows of what `to_json` made."""
    return [FindRow.from_dict(name, row) for name, row in content["rows"].items()]


def write_page(
    path: Path, rows: Sequence[FindRow], cases: Mapping[str, Cases], about: Mapping[str, Any]
) -> None:
    """Write ``index.html`` and its pictures into a new folder; complete or not at all.

    Args: cases: of each row, by its name.
    Raises: ValueError as `check_report_folder`.
    """
    check_report_folder(path)
    with atomic_path(path) as folder:
        (folder / PICTURES).mkdir(parents=True)
        sections = []
        for row in rows:
            failures = [failure(one, cases[row.name][one.number]) for one in row.worst]
            sections += worst_answers(folder / PICTURES, row.name, failures)
        page = html_page(
            name="find",
            title="Finding by example",
            about=about,
            table=html_rows(*cells(rows)) + "\n</table><table>\n" + html_rows(*parts(rows)),
            legend=LEGEND,
            sections=sections,
        )
        (folder / PAGE).write_text(page, encoding="utf-8", errors="replace")
