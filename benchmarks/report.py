"""The rows of all benchmarks as a Markdown table and a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.harness import Row, read_rows
from nanomolmo2.files import atomic_path

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
ORDER = (
    "floor",
    "vision",
    "prefill",
    "decode",
    "batch",
    "prefix",
    "lookup",
    "llama",
    "load",
    "ask",
    "train",
    "trees",
    "packing",
)


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: one table for each number of threads, and where it was measured."""
    parts = []
    if any(report["short"] for report in reports):
        parts.append("Small models: these numbers only show that the benchmarks work.")
    for threads in sorted({report["threads"] for report in reports}):
        chosen = sort([report for report in reports if report["threads"] == threads])
        floor = {
            row.name: row.ours for r in chosen if r["group"] == "floor" for row in read_rows(r)
        }
        lines = [
            f"{threads} thread{'s' if threads > 1 else ''}:",
            "",
            "| row | ours | peer | ours / peer (least to greatest) | target | met | of the floor |",
            "|---|---|---|---|---|---|---|",
        ]
        for report in chosen:
            lines += [line(row, floor) for row in read_rows(report)]
        parts.append("\n".join(lines))
    missing = {report.get("missing") for report in reports} - {None}
    parts += sorted(str(reason) for reason in missing)
    parts.append(where(reports))
    return "\n\n".join(parts)


def line(row: Row, floor: dict[str, float]) -> str:
    """A row of the table; a dash for what there is none of."""
    peer = "-" if row.peer is None else f"{number(row.peer)} ({row.peer_name})"
    ratio = "-"
    if row.low is not None and row.high is not None:
        middle = "" if row.ratio is None else f"**{row.ratio:.2f}** "
        ratio = f"{middle}({row.low:.2f} to {row.high:.2f})"
    target = "-"
    if row.target is not None:
        target = f"{'>=' if row.at_least else '<='} {row.target:g}"
    met = {None: "-", True: "yes", False: "**no**"}[row.met]
    share = floor_share(row, floor)
    of_floor = "-" if share is None else f"{share:.0%}"
    return (
        f"| {row.name} | {number(row.ours)} {row.unit} | {peer} | {ratio} | {target} | {met} | "
        f"{of_floor} |"
    )


def floor_share(row: Row, floor: dict[str, float]) -> float | None:
    """The least time that the work takes at the measured floor, over the time it took."""
    gflops, bandwidth = floor.get("GEMM, float32"), floor.get("reading memory")
    seconds = row.ours / (1000 if row.unit.startswith("ms") else 1)
    if row.gflop is not None and gflops:
        return row.gflop / gflops / seconds
    if row.gbyte is not None and bandwidth:
        return row.gbyte / bandwidth / seconds
    return None


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def where(reports: Sequence[dict[str, Any]]) -> str:
    """Machine and versions; more than one where the reports come from several."""
    lines = []
    for machine in {str(r["machine"]): r["machine"] for r in reports}.values():
        versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items() if v)
        extensions = ", ".join(machine["extensions"]) or "none of note"
        lines.append(
            f"Machine: {machine['cpu']}, {machine['cores']} cores ({extensions}); Python "
            f"{machine['python']}, {versions}."
        )
    return "\n".join(lines)


def sort(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(reports, key=lambda r: (ORDER.index(r["group"]), r["threads"]))


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page.

    Raises: ValueError if the page does not have them.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} needs the marks {BEGIN} and {END}: the table goes between them")
    with atomic_path(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


INK, OURS, MISSED, LINE = "#222222", "#3b7ddd", "#dd8a3b", "#b0b0b0"


def chart(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG: a bar for every ratio, orange where a target is missed, a tick at the target."""
    bars = [
        (report["threads"], row)
        for report in sort(reports)
        for row in read_rows(report)
        if row.ratio is not None
    ]
    step, left, width = 26, 470, 1100
    greatest = max([1.0, *(row.ratio or 0 for _, row in bars)]) * 1.12
    scale = (width - left - 60) / greatest
    image = Image.new("RGB", (width, 70 + step * len(bars)), "white")
    draw = ImageDraw.Draw(image)
    font: Any = ImageFont.load_default(size=14)
    title = "ours / peer, median of the rounds; | = target, orange = missed, gray line = equal"
    draw.text((12, 12), title, fill=INK, font=font)
    one = left + scale
    draw.line((one, 40, one, 50 + step * len(bars)), fill=LINE)
    for i, (threads, row) in enumerate(bars):
        y = 46 + step * i
        assert row.ratio is not None
        draw.text((12, y), f"{row.name}, {threads} thr.", fill=INK, font=font)
        colour = MISSED if row.met is False else OURS
        draw.rectangle((left, y + 1, left + row.ratio * scale, y + step - 9), fill=colour)
        draw.text((left + row.ratio * scale + 6, y), f"{row.ratio:.2f}", fill=INK, font=font)
        if row.target is not None:
            x = left + row.target * scale
            draw.line((x, y - 2, x, y + step - 6), fill=INK, width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
