"""benchmarks.teaching, and the row of the embedding that it measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import teaching
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.prompt import request_of
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.things.find_model import CONFIG, find_processor
from nanomolmo2.training.seen_words import seen_row, with_seen_word
from tests.small_model import small_model, small_processor


@pytest.fixture(scope="module")
def vlm() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline(NanoMolmo2(CONFIG), find_processor())


def test_a_row_points_where_the_visual_tokens_at_the_examples_do(vlm: Pipeline) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (192, 192, 3), np.uint8))
    row = seen_row(vlm.model, vlm.processor, image, [(100.5, 60.5), (8.0, 8.0)])
    encoded = vlm.processor.encode([{"role": "user", "content": "?"}], [image])
    points = request_of(vlm.model, encoded).points
    assert points is not None
    # 36 tokens of the overview, then those of the tile: (3, 6) of 12 x 12 patches is token (1, 3).
    mean = (points.tokens[36 + 9] + points.tokens[36]) / 2
    torch.testing.assert_close(row, mean / mean.norm())

    before = vlm.model.llm.embed_tokens.weight.detach().clone()
    model, processor = with_seen_word(vlm.model, vlm.processor, "walnut", row)
    id = processor.tokenizer.backend.token_to_id("walnut")
    assert tuple(processor.tokenizer.encode_text("walnut")) == (id,)
    table = model.llm.embed_tokens.weight
    length = table[id].norm()
    torch.testing.assert_close(table[id] / length, row)
    known = [i for i in range(len(before)) if i != id]
    assert torch.equal(table[known], before[known]) and 0.5 < length / before[200].norm() < 2
    with_seen_word(model, processor, "walnut", -row)
    torch.testing.assert_close(model.llm.embed_tokens.weight[id], -row * length)


def test_a_model_without_selections_is_refused() -> None:
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="does not select what it sees"):
        seen_row(small_model(), small_processor(), image, [(1, 2)])


def test_cases_are_pairs_with_the_truth() -> None:
    (case,) = teaching.cases("few", 1)
    width, height = case.shown.size
    assert 1 <= len(case.places) <= 3
    assert all(0 <= x <= width and 0 <= y <= height for x, y in case.places)
    assert case.things and case.asked.size == case.shown.size


@pytest.mark.slow
def test_all_ways_are_measured(vlm: Pipeline) -> None:
    text, numbers = teaching.table(vlm, 1, ("few",))
    assert list(numbers) == ["few find", "few prompt", "few embedding", "few unknown"]
    for row in numbers.values():
        assert 0 <= row["F1"][0] <= 1 and row["exact"][0] in (0, 1) and row["error"][0] >= 0
    assert text.count("\n") == 5
