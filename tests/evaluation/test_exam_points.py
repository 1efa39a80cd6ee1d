"""An exam whose questions hold points, for a model that selects them."""

from __future__ import annotations

import numpy as np
import torch

from nanomolmo2.data.example import Branch, Example
from nanomolmo2.evaluation.exam import Asked, Benchmark, Exam, answer_all
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.things.find_model import CONFIG, find_processor


def test_answers_to_questions_with_points_are_those_of_ask() -> None:
    """They were refused: what their points select was not handed on."""
    torch.manual_seed(0)
    model, processor = NanoMolmo2(CONFIG).eval(), find_processor()
    image = np.random.default_rng(0).integers(0, 255, (192, 192, 3), dtype=np.uint8)
    content = [{"type": "text", "text": "Like"}, {"type": "point", "x": 40.0, "y": 60.0}]
    branches = [
        Branch([{"role": "user", "content": content}], "like"),  # type: ignore[list-item]
        Branch([{"role": "user", "content": "Is there a dog?"}], "like"),
    ]
    benchmark = Benchmark(
        name="points",
        title="",
        groups=(),
        rows={},
        scorers={"like": lambda *_: 1.0},
        rows_of_answer=lambda *_: {},
        rows_of_example=lambda _: {},
        make_exam=Exam,
        default_max_new_tokens=6,
    )
    exam = Exam(benchmark, "all", [Example([image], [])], ["one"], [Asked(0, b) for b in branches])
    answer_all(model, processor, exam, 4)
    vlm = Pipeline(model, processor)
    for one in exam.asked:
        said = vlm.ask([image], one.branch.messages, max_new_tokens=6, reuse=False)
        assert one.answer == said.coordinates and one.answer
