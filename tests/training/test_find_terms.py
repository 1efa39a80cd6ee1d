"""What finds all at once in a fine-tuning: its targets, read off packed batches, and its loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.batch import Batch
from nanomolmo2.data.packing import join
from nanomolmo2.generation.finding import grid_of, grid_places
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.finder import APART
from nanomolmo2.processor import Encoded, Point, collate, format_points
from nanomolmo2.things.find_model import CONFIG, find_processor
from nanomolmo2.training.find_terms import (
    Finding,
    FindStep,
    FindTargets,
    find_loss,
    find_targets,
)

PROCESSOR = find_processor()
NONE = tuple(PROCESSOR.tokenizer.encode_text("There are none."))
SIZE = (192, 192)  # one tile of 12 x 12 patches of 16 pixels
IMAGE = np.zeros((192, 192, 3), np.uint8)


def exchange(question: Any, answer: str) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def listed(*points: tuple[float, float], mode: Any = "point", label: str = "nut") -> str:
    return format_points([Point(*p) for p in points], label, [SIZE], mode=mode)


def encoded(*branches: list[Any]) -> Encoded:
    return PROCESSOR.encode_tree([IMAGE], branches)


def batch_of(*rows: list[Encoded]) -> Batch:
    return collate([join(row) for row in rows], PROCESSOR.pad_token_id)


def targets_of(*rows: list[Encoded]) -> FindTargets:
    found = find_targets(batch_of(*rows), CONFIG, NONE)
    assert found is not None
    return found


def patches(found: FindTargets, mask: torch.Tensor) -> list[list[tuple[int, int]]]:
    """(row, column) in their crop of the patches that a mask (Q, n) marks."""
    return [sorted(divmod(patch % 144, 12) for patch in found.patch[row].tolist()) for row in mask]


def test_a_list_says_of_every_patch_whether_a_middle_lies_there() -> None:
    """(100.5, 60.5) lies in patch row 3, column 6, in its ninth row 2, column 0: .28 from its left
    edge and .78 from its upper one."""
    one = encoded(exchange("Point to the nuts.", listed((100.5, 60.5), (8.0, 8.0))))
    found = targets_of([one])
    assert len(found) == 2  # at the end of the question, and where the list begins
    assert len(found.patch) == 144  # the overview's are not asked
    assert patches(found, found.hits) == [[(0, 0), (3, 6)]] * 2
    # The first may as well count below or to the left of its patch; the second is a middle.
    assert patches(found, found.unsure) == [[(3, 5), (4, 5), (4, 6)]] * 2
    ways = found.way[found.place[:, 0] == 0].tolist()
    assert ways == [pytest.approx([0.0, 0.0]), pytest.approx([-1 / 3, 1 / 3])]
    ids = one.input_ids.tolist()
    assert CONFIG.point_config is not None
    first = ids.index(CONFIG.point_config.patch_token_id)
    answer = int(np.flatnonzero(one.labels != -100)[0])  # type: ignore[arg-type]
    assert found.state_at.tolist() == [answer - 1, first - 1]
    assert not len(found.like)


def test_patches_know_their_place_in_their_picture() -> None:
    """Of two pictures of one example and one of another, in the tiles of each: where a patch lies
    is the column and row of `grid_places`."""
    wide, small = np.zeros((300, 420, 3), np.uint8), IMAGE
    answer = listed((8.0, 8.0))
    asks = exchange("Point to the nuts.", answer)
    two = PROCESSOR.encode_tree([small, wide], [exchange("Point to the nuts in image 1.", answer)])
    one = PROCESSOR.encode_tree([wide], [asks])
    for rows in ([two, one], [two]), ([one], [two]):
        found = targets_of(*rows)
        encodings = [part for row in rows for part in row]
        for number, encoded in enumerate(encodings):
            space = encoded.point_space
            assert space is not None
            mine = found.example == found.example.unique()[number]
            place = found.grid[mine].round().long()
            views = list(space.views)
            assert len(place) == sum(view.rows * view.cols for view in views)
            order = (place[:, 0] // int(APART)).unique(return_inverse=True)[1]
            seen = [
                sorted((int(x) % int(APART), int(y)) for x, y in place[order == i])
                for i in range(len(views))
            ]
            assert seen == [
                sorted((int(x), int(y)) for x, y in grid_places(view.rows, view.cols))
                for view in views
            ]


def test_the_grid_of_a_batch_is_that_of_a_picture_that_is_looked_through() -> None:
    wide = np.zeros((300, 420, 3), np.uint8)
    one = PROCESSOR.encode_tree([wide], [exchange("Point to the nuts.", listed((8.0, 8.0)))])
    found = targets_of([one])
    assert one.point_space is not None
    row, patch = grid_of(one.point_space, 0)
    place = {int(p): tuple(xy.tolist()) for p, xy in zip(found.patch, found.grid, strict=True)}
    expected = grid_places(*row.shape)
    assert [place[int(p)] for p in patch.ravel()] == [tuple(xy.tolist()) for xy in expected]


def test_nothing_there_is_as_much_of_an_answer() -> None:
    found = targets_of([encoded(exchange("Point to the nuts.", "There are none."))])
    assert len(found) == 1 and not found.hits.any() and not len(found.place)
    for said in ("No.", "3", "There are none. But there is a dog.", "A nut."):
        assert find_targets(batch_of([encoded(exchange("Well?", said))]), CONFIG, NONE) is None
    text = PROCESSOR.encode_tree([], [exchange("Well?", "There are none.")])
    assert find_targets(batch_of([text]), CONFIG, NONE) is None


def test_packed_examples_and_their_branches_stay_apart() -> None:
    first = encoded(
        exchange("How many nuts?", listed((8, 8), mode="point_count")),
        exchange("Is there a dog?", "No."),
        exchange("Point to the dogs.", "There are none."),
    )
    second = encoded(exchange("Point to the nuts.", listed((184, 184))))
    for rows in ([[first, second]], [[first], [second]]):
        found = targets_of(*rows)
        assert found.patch.tolist() != sorted(set(found.patch.tolist()))[:144]
        assert patches(found, found.hits) == [[(0, 0)], [(0, 0)], [], [(11, 11)], [(11, 11)]]
        assert len(set(found.of[:3].tolist())) == 1 and found.of[3] != found.of[0]
        owners = [set(found.example[hit].tolist()) for hit in found.hits if hit.any()]
        assert owners == [{int(found.of[q])} for q in (0, 1, 3, 4)]


def test_a_list_of_two_nouns_is_asked_where_each_begins() -> None:
    answer = f"{listed((8, 8))} {listed((184, 8), label='dog')}"
    found = targets_of([encoded(exchange("Point to the nut and the dog.", answer))])
    assert patches(found, found.hits) == [[(0, 0)], [(0, 11)]]


def test_points_of_a_question_are_its_examples() -> None:
    content = [{"type": "text", "text": "All like"}, {"type": "point", "x": 8, "y": 184}]
    one = encoded(exchange(content, listed((8, 184), (184, 8))))
    found = targets_of([one])
    assert found.question.tolist() == [0, 1]
    assert [divmod(p % 144, 12) for p in found.patch[found.like].tolist()] == [(11, 0)] * 2
    assert CONFIG.point_config is not None
    location = CONFIG.point_config.location_token_id
    assert one.input_ids[found.like_at].tolist() == [location] * 2


# ---- the loss ----


@pytest.fixture(scope="module")
def model() -> NanoMolmo2:
    torch.manual_seed(0)
    return NanoMolmo2(CONFIG)


def loss_of(model: NanoMolmo2, batch: Batch) -> Any:
    targets = find_targets(batch, CONFIG, NONE)
    assert targets is not None
    batch = model.encoded(batch.prepared())
    return find_loss(model, batch, model.states(batch), targets)


def test_a_question_costs_the_mean_of_its_patches_by_hand(model: NanoMolmo2) -> None:
    """Scores of 0 everywhere: log 2 for each of 144 patches, hits twice, the unsure ones none."""
    batch = batch_of([encoded(exchange("Point to the nuts.", listed((100.5, 60.5), (8.0, 8.0))))])

    class Zero(torch.nn.Module):
        def __init__(self, finder: Any) -> None:
            super().__init__()
            self.patches, self.wanted = finder.patches, finder.wanted

        def forward(self, wanted: Any, patches: Any, mine: Any) -> Any:
            zero = torch.zeros(mine.shape)
            return dataclasses.make_dataclass("Scores", ["first", "final"])(zero, zero)

    finder, model.finder = model.finder, Zero(model.finder)  # type: ignore[assignment]
    try:
        with torch.no_grad():
            found = loss_of(model, batch)
            targets = find_targets(batch, CONFIG, NONE)
            assert targets is not None
            seen = model.see(model.encoded(batch))
            ways = finder.patch.way(  # type: ignore[union-attr]
                torch.nn.functional.rms_norm(seen.features[targets.patch], (192,))
            )[targets.place[:, 1], :2]
    finally:
        model.finder = finder
    off = ((ways - targets.way).abs() - 1 / 6).clamp(min=0).sum()
    # Two questions; of each 144 - 3 patches and 2 more for the hits, over 1 + 2 things; 1 + .5 for
    # the two kinds of scores.
    expected = 2 * 1.5 * (141 + 2) * math.log(2) / 3 + 0.5 * off / 3
    assert found.loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert (int(found.hits), int(found.said), int(found.right)) == (4, 0, 0)


def test_packing_changes_no_loss(model: NanoMolmo2) -> None:
    examples = [
        encoded(exchange("Point to the nuts.", listed((40, 60), (8, 8)))),
        encoded(exchange("Point to the nuts.", "There are none.")),
    ]
    with torch.no_grad():
        together = loss_of(model, batch_of(examples)).loss
        alone = sum(loss_of(model, batch_of([one])).loss for one in examples)
    assert together.item() == pytest.approx(float(alone), rel=1e-4)


@pytest.mark.slow
def test_a_few_steps_find_what_they_were_shown() -> None:
    image = Image.new("RGB", SIZE, (90, 60, 40))
    for x, y in ((40, 40), (120, 150)):
        image.paste((220, 220, 60), (x - 8, y - 8, x + 8, y + 8))
    answer = listed((40, 40), (120, 150))
    one = PROCESSOR.encode_tree([image], [exchange("Point to the nuts.", answer)])
    batch = batch_of([one])
    torch.manual_seed(0)
    copy = NanoMolmo2(CONFIG)
    parameters = [*copy.finder.parameters(), *copy.vision_encoder.parameters()]  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(25):
        found = loss_of(copy, batch)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(found.loss.item())
    assert losses[-1] < 0.25 * losses[0], losses
    assert int(found.right) >= 2


def test_a_step_of_several_micro_batches_is_the_mean_of_its_questions(model: NanoMolmo2) -> None:
    micros = [
        batch_of([encoded(exchange("Point to the nuts.", listed((40, 60))))]),
        batch_of([encoded(exchange("What?", "A nut."))]),
        batch_of([encoded(exchange("Point to the nuts.", "There are none."))]),
    ]
    step = FindStep(Finding(2.0, CONFIG, NONE), micros)
    parts = [step.of(number) for number in range(3)]
    assert [None if part is None else len(part.targets) for part in parts] == [2, None, 1]
    total, found = torch.tensor(1.0), []
    for number, part in enumerate(parts):
        if part is not None:
            with torch.no_grad():
                part.sums = loss_of(model, micros[number])
            found.append(part.sums.loss)
        total = step.add(number, total)
    expected = 1 + 2 * (found[0] + found[1]) / 3
    assert total.item() == pytest.approx(expected.item())
    metrics = step.metrics()
    assert metrics["finder_loss"].item() == pytest.approx((expected.item() - 1) / 2)  # type: ignore[union-attr]
    assert FindStep(None, micros).metrics() == {}
