"""A model that finds what it is told to find, in place of `VLM.find`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanomolmo2.generation.answer import Answer
from nanomolmo2.processor import Point


@dataclass
class Finder:
    """Its things are ``(x, y, confidence)`` in reading order; what is shown as unlike it believes.

    Attributes:
        calls: the arguments of all calls so far, by name.
        error: raised in place of an answer.
    """

    things: list[tuple[float, float, float]]
    problems: tuple[str, ...] = ()
    error: Exception | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def find(
        self,
        image: Any,
        like: Any,
        unlike: Any = (),
        *,
        reference: Any = None,
        max_crops: int | None = None,
        min_confidence: float = 0.5,
    ) -> Answer:
        shown = {"image": image, "reference": reference}
        given = {"like": like, "unlike": unlike, "max_crops": max_crops}
        self.calls.append({**shown, **given, "min_confidence": min_confidence})
        if self.error is not None:
            raise self.error
        sizes = [one.size for one in (reference, image) if one is not None]
        wrong = {place[:2] for place in unlike}
        told = [one for one in self.things if one[2] >= min_confidence and one[:2] not in wrong]
        return Answer(
            text=f"Counting the things shows a total of {len(told)}.",
            points=tuple(
                Point(x, y, len(sizes), number, "thing", confidence=confidence, size=20.5)
                for number, (x, y, confidence) in enumerate(told, start=1)
            ),
            count=len(told),
            problems=self.problems,
            image_sizes=tuple(sizes),
            video_size=None,
            frame_times=(),
            input_tokens=40,
            output_tokens=0,
            timings={"prepare": 0.01, "generate": 0.25},
        )
