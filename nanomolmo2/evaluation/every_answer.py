"""A page of every answer of an evaluation, picture by picture: one file, that holds its images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from nanomolmo2.checks import written
from nanomolmo2.data.example import Source
from nanomolmo2.evaluation.report import draw_failure, figure, html_page, html_rows
from nanomolmo2.evaluation.run import failure_of
from nanomolmo2.evaluation.summary import LEGEND, Prediction, Report

LARGEST_SIDE = 640  # pixels of an image on the page
QUALITY = 85  # of its JPEG


def write_every_answer(
    path: Path,
    report: Report,
    sources: Sequence[Source],
    *,
    title: str,
    about: Mapping[str, object] | None = None,
) -> None:
    """Write the page, complete or not at all.

    Args:
        report: of `evaluate`; its answers stand on the page with what is true.
        sources: the data that it was made of.
        about: what to say at the top.
    """
    by_picture: dict[str, list[Prediction]] = {}
    for one in report.predictions:
        by_picture.setdefault(one.question.picture, []).append(one)
    sections = []
    for answers in by_picture.values():
        # The worst answer about a picture may be all that one looks at.
        answers.sort(key=lambda one: one.score)
        sections += ["<div>", *(_shown(one, sources) for one in answers), "</div><hr>"]
    page = html_page(
        name="data",
        title=title,
        about={**(about or {}), "pictures": len(by_picture), "answers": len(report.predictions)},
        table=html_rows(*report.cells()),
        legend=LEGEND,
        sections=sections,
    )
    with written(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _shown(one: Prediction, sources: Sequence[Source]) -> str:
    """HTML of an answer, its image inside."""
    failure = failure_of(one, sources)
    drawn = draw_failure(failure)
    return figure(failure, "" if drawn is None else _address(drawn))


def _address(image: Image.Image) -> str:
    """An image as the address of itself."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
