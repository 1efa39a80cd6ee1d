"""The stage that learns to match: labels by hand, losses against plain loops, runs that resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanomolmo2.emoji.heads import NO_LABEL
from nanomolmo2.emoji.model import labelled
from nanomolmo2.emoji.vision_stages import render_scenes
from nanomolmo2.things.drawings import HELD_OUT_SETS, Drawings
from nanomolmo2.things.grounds import HELD_OUT_GROUNDS
from nanomolmo2.things.kinds import Kind
from nanomolmo2.things.looks import drawn_look
from nanomolmo2.things.match_heads import (
    Compared,
    MatchConfig,
    MatchHead,
    compared,
    like_loss,
    pair_loss,
    some_cells,
)
from nanomolmo2.things.match_labels import (
    GROUND,
    CellLabels,
    match_batch,
    middle_owners,
)
from nanomolmo2.things.match_model import CROPS, MatchModel
from nanomolmo2.things.match_scores import best_threshold, match_scores, said_of, scored_scene
from nanomolmo2.things.match_stage import MatchPlan, MatchStage, as_patches
from nanomolmo2.things.procedural import HELD_OUT_FAMILIES
from nanomolmo2.things.scenes import Scene, Thing
from nanomolmo2.things.settings import ThingScene
from nanomolmo2.things.source import ThingsConfig
from nanomolmo2.things.train import MATCH_FILE, train_match
from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import LoopConfig

QUIET = LoopConfig(log_every=1, save_every=1, workers=0, quiet=True)


def scene_of(size: int, *boxes: tuple[int, int, int, int, int], factor: int = 1) -> Scene:
    """A square picture with filled boxes (kind, x0, y0, x1, y1); things of 3 kinds at most."""
    drawings = Drawings.for_training()
    looks = [drawn_look(np.random.default_rng(i), drawings, i) for i in range(3)]
    image = np.zeros((size, size, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((size, size)) % 251
    instances = np.full((size, size), -1, np.int16)
    things = []
    for number, (kind, *corners) in enumerate(boxes):
        x0, y0, x1, y1 = (factor * corner for corner in corners)
        instances[y0:y1, x0:x1] = number
        box = tuple(map(float, (x0, y0, x1, y1)))
        things.append(Thing(kind, box, ((x0 + x1) / 2, (y0 + y1) / 2), 1.0, float(x1 - x0)))
    kinds = tuple(Kind(look, (8, 16)) for look in looks)
    return Scene(image, tuple(things), kinds, instances, "plain")


# A picture of 352 pixels is its own canvas: 2 x 2 tiles, 22 x 22 patches, 11 x 11 tokens.
BOXES = (
    (0, 40, 40, 72, 72),  # middle 56, 56: patch (3, 3), token (1, 1)
    (1, 168, 168, 180, 180),  # middle 174, 174: patch (10, 10), token (5, 5), two pixels off (5, 5)
    (2, 210, 36, 218, 44),  # middle 214, 40: patch (2, 13), token (1, 6)
    (1, 200, 40, 208, 48),  # middle 204, 44: patch (2, 12), token (1, 6) too, another kind
)


@pytest.mark.parametrize("factor", [1, 2])  # of the second, the canvas is half as large
def test_labels_of_a_drawn_scene_are_those_found_by_hand(factor: int) -> None:
    batch = match_batch([scene_of(352 * factor, *BOXES, factor=factor)], CROPS, margin=0.25)
    assert batch.pixel_values.shape == (4, 144, 768)
    assert len(batch.tokens.kind) == 121 and len(batch.patches.kind) == 484

    def token(row: int, col: int) -> int:
        return 11 * row + col

    owner, kind = batch.tokens.owner, batch.tokens.kind
    assert owner[token(1, 1)] == 0 and kind[token(1, 1)] == 0
    # 8 of its 32 columns are the first thing, as are 8 of its rows: a sixteenth is not a third,
    # and more than nothing. Its middle is 8 px away: it may count there.
    assert kind[token(2, 2)] == NO_LABEL and owner[token(2, 2)] == NO_LABEL
    assert owner[token(1, 2)] == NO_LABEL  # 56 is a quarter of a cell off 64, and no nearer
    assert kind[token(1, 2)] == NO_LABEL  # 8 of 32 columns, in 24 of 32 rows: under a third
    assert kind[token(1, 6)] == NO_LABEL  # two kinds have their middle there
    assert owner[token(1, 6)] == 3  # the nearer one to 208, 48
    assert kind[token(8, 8)] == GROUND and owner[token(8, 8)] == NO_LABEL
    assert owner[token(5, 5)] == 1 and kind[token(5, 5)] == 1
    assert set(owner.tolist()) == {0, 1, 3, NO_LABEL}

    patches = batch.patches
    assert patches.owner[22 * 3 + 3] == 0 and patches.owner[22 * 2 + 13] == 2
    assert patches.owner[22 * 2 + 12] == 3 and patches.kind[22 * 2 + 12] == 1
    assert patches.owner[22 * 10 + 10] == 1
    assert patches.owner[22 * 10 + 11] == 1  # 174 is 2 px off its column: it may count there
    # From the patch (2, 2), whose middle is (40, 40), the first thing's is one patch away; it is
    # two patches large.
    assert patches.way[22 * 2 + 2].tolist() == pytest.approx([1.0, 1.0, math.log(2)])
    assert patches.way[22 * 20 + 20].tolist() == [0, 0, 0]


def test_cells_are_windows_of_the_tiles_that_overlap() -> None:
    scene = scene_of(352, *BOXES)
    batch = match_batch([scene, scene], CROPS, margin=0.0)
    assert batch.tokens.index[12].tolist() == [26, 27, 38, 39]  # rows and columns 2, 3 of a tile
    # Patch 10 is the last of the first tile and 11 the second of the next: the tiles share two.
    assert batch.tokens.index[60].tolist() == [130, 144 + 121, 288 + 22, 432 + 13]
    assert batch.patches.index[22 * 11 + 11].tolist() == [432 + 13]
    pixels = batch.pixel_values.flatten(0, 1)[batch.patches.index[22 * 11 + 11, 0]]
    expected = scene.image[176:192, 176:192].astype(np.float32) / 127.5 - 1
    assert np.allclose(pixels.reshape(16, 16, 3), expected, atol=1e-6)
    # The second picture comes behind the first: its tiles, things, kinds.
    assert batch.tokens.index[121 + 12].tolist() == [576 + 26, 576 + 27, 576 + 38, 576 + 39]
    assert batch.tokens.owner[121 + 12] == 4 and batch.tokens.kind[121 + 12] == 3
    assert batch.tokens.picture.tolist() == [0] * 121 + [1] * 121
    assert batch.looks.tolist() == [0, 1, 2, 0, 1, 2]


def test_of_two_middles_in_a_cell_the_nearer_one_may_count() -> None:
    owners = middle_owners(np.array([[0.9, 0.5], [0.4, 0.5], [1.2, 0.5]]), 1, 3, margin=0.25)
    assert owners.tolist() == [1, 2, NO_LABEL]
    assert middle_owners(np.empty((0, 2)), 1, 2, 0.25).tolist() == [NO_LABEL, NO_LABEL]


def some_labels() -> tuple[CellLabels, torch.Tensor]:
    """Two pictures; kinds 0 and 1 in the first, 2 and 3 in the second. 2 looks as 0 does."""
    kind = torch.tensor([0, 0, 1, GROUND, 0, 2, 3, 3, NO_LABEL, GROUND])
    picture = torch.tensor([0] * 5 + [1] * 5)
    n = len(kind)
    labels = CellLabels(
        torch.arange(n)[:, None], picture, torch.full((n,), NO_LABEL), kind, torch.zeros(n, 3)
    )
    return labels, torch.tensor([7, 8, 7, 9])


def test_what_is_compared() -> None:
    labels, looks = some_labels()
    pairs = compared(labels, looks)

    def listed(which: torch.Tensor, row: int) -> list[int]:
        return torch.nonzero(which[row])[:, 0].tolist()

    assert listed(pairs.alike, 0) == [1, 4] and listed(pairs.alike, 6) == [7]
    assert listed(pairs.alike, 5) == [] and listed(pairs.alike, 3) == []
    assert listed(pairs.rivals, 0) == [2] and listed(pairs.rivals, 5) == [6, 7]
    assert listed(pairs.ground, 0) == [3] and listed(pairs.ground, 3) == []
    assert listed(pairs.others, 0) == [6, 7]  # not 5, of an equal look
    assert listed(pairs.others, 2) == [5, 6, 7]


def test_the_losses_are_those_of_plain_loops() -> None:
    labels, looks = some_labels()
    scores = 4 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).double()
    kind, picture, s = labels.kind.tolist(), labels.picture.tolist(), scores.tolist()
    contrastive, alike_terms, rival_terms, ground_terms = [], [], [], []
    for i in range(10):
        if kind[i] < 0:
            continue
        against, losses, parts = 0.0, [], ([], [], [])
        for j in range(10):
            here = picture[i] == picture[j]
            if kind[j] >= 0 and kind[j] != kind[i] and here:
                against += 3 * math.exp(s[i][j])
                parts[1].append(math.log(1 + math.exp(s[i][j])))
            elif kind[j] == GROUND and here:
                against += 0.5 * math.exp(s[i][j])
                parts[2].append(math.log(1 + math.exp(s[i][j])))
            elif kind[j] >= 0 and not here and looks[kind[j]] != looks[kind[i]]:
                against += math.exp(s[i][j])
        for j in range(10):
            if j != i and kind[j] == kind[i]:
                own = math.exp(s[i][j])
                losses.append(-math.log(own / (own + against)))
                parts[0].append(math.log(1 + math.exp(-s[i][j])))
        if losses:
            contrastive.append(sum(losses) / len(losses))
        for part, terms in zip(parts, (alike_terms, rival_terms, ground_terms), strict=True):
            if part:
                terms.append(sum(part) / len(part))
    pairs = compared(labels, looks)
    expected = sum(contrastive) / len(contrastive)
    assert like_loss(scores, pairs, 3, 0.5).item() == pytest.approx(expected, rel=1e-9)
    means = [sum(terms) / len(terms) for terms in (alike_terms, rival_terms, ground_terms)]
    expected = means[0] + means[1] + 0.5 * means[2]
    assert pair_loss(scores, pairs).item() == pytest.approx(expected, rel=1e-9)


def test_nothing_to_compare_is_no_loss() -> None:
    none = torch.zeros(2, 2, dtype=torch.bool)
    scores = torch.ones(2, 2, requires_grad=True)
    pairs = Compared(none, none, none, none)
    loss = like_loss(scores, pairs, 4, 1) + pair_loss(scores, pairs)
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and scores.grad.abs().max() == 0


def test_too_many_cells_are_thinned_out_but_no_middles() -> None:
    labels, _ = some_labels()
    centred = torch.zeros(10, dtype=torch.bool)
    centred[[5, 6, 7]] = True
    some = some_cells(labels, centred, 6).tolist()
    assert len(some) <= 6 and {5, 6, 7} <= set(some) and 8 not in some


def test_the_best_threshold() -> None:
    """Of 4 wanted: two said, both right -> F1 .67; four said, three right -> .75; and so on."""
    best = best_threshold(
        np.array([0.9, 0.8, 0.7, 0.6, 0.1]), np.array([True, True, False, True, False]), 4
    )
    assert best == pytest.approx(
        {"found": 0.75, "recall": 0.75, "precision": 0.75, "f1": 0.75, "threshold": 0.6}
    )
    assert best_threshold(np.empty(0), np.empty(0, bool), 4)["f1"] == 0


def test_what_is_said_of_a_scene() -> None:
    """Of a picture of 352 px: things 0, 2, 3 of a kind, 1 of another; the example is 0."""
    boxes = [(0, 40, 40, 56, 56), (1, 104, 40, 120, 56), (0, 168, 40, 184, 56)]
    boxes.append((0, 232, 40, 248, 56))  # middles in row 1, columns 1, 3, 5, 7
    scene = scene_of(352, *boxes)
    labels = match_batch([scene], CROPS, margin=0.0).tokens
    head = MatchHead(4, MatchConfig())
    torch.nn.init.zeros_(head.embed.weight)
    torch.nn.init.zeros_(head.embed.bias)
    with torch.no_grad():
        head.embed.weight[0, 0] = head.embed.weight[1, 1] = 1  # the first two numbers of a cell
        head.middle.weight.copy_(torch.tensor([[0.0, 0, 1, 0]]))
        head.middle.bias.zero_()
    cells = torch.zeros(121, 4)
    cells[:, 0], cells[:, 2] = 1, -1
    for column, (likeness, claim) in {1: (1, 1), 3: (0.6, 1), 5: (0.8, 1), 7: (1, -1)}.items():
        cells[11 + column] = torch.tensor([likeness, (1 - likeness**2) ** 0.5, claim, 0])
    cells[60] = torch.tensor([0.0, 1, 1, 0])  # the bare ground claims a thing
    (said,) = said_of([(scene, 0, (45.0, 50.0))], head, cells, labels)
    assert said.wanted == 2  # of which the last is not claimed
    assert said.likeness == pytest.approx([0.6, 0.8, 0.0], abs=1e-6)
    assert said.right.tolist() == [False, True, False]


def test_emoji_are_cut_as_the_processor_cuts_a_single_tile() -> None:
    (scene,) = render_scenes(0, 20, 0, 1)
    images, _ = labelled([scene])
    cut = CROPS(scene.image)["pixel_values"]
    assert cut.shape == (2, 144, 768)
    assert np.allclose(as_patches(images, 16)[0], cut[1], atol=1e-6)


def test_training_never_sees_what_is_held_out() -> None:
    stage = MatchStage(MatchModel(0), 0, MatchPlan(steps=2, things=4, emoji=1))
    held_out = {*HELD_OUT_SETS, *HELD_OUT_FAMILIES}
    for i in range(24):
        (scene,), _ = stage.source.scenes(i)
        assert not {kind.look.origin for kind in scene.kinds} & held_out
        assert not set(scene.ground.split("+")) & set(HELD_OUT_GROUNDS)
    with pytest.raises(ValueError, match="held out"):
        ThingsConfig(scene=ThingScene(art=("openmoji",)))
    # What it is measured on is nothing else.
    for name in ("few", "alike"):
        scene, number, place = scored_scene(name, 0)
        assert {kind.look.origin for kind in scene.kinds} <= set(HELD_OUT_SETS)
        assert scene.instance_map[int(place[1]), int(place[0])] == number
        assert scene.things[number].kind == 0


def test_it_starts_as_the_bundled_model_and_learns() -> None:
    model = MatchModel(0)
    model.start_from_tiny()
    plan = MatchPlan(steps=100, things=2, emoji=2, warmup_steps=1)
    stage = MatchStage(model, 0, plan)
    batch, optimizers, losses = stage.batch(0), stage.optimizers(), []
    # Nouns of emoji are known from the start.
    assert stage.loss(batch)[1]["emoji_noun_accuracy"] > 0.6
    for step in range(8):
        optimizers.set_rates(step, 100)
        losses.append(float(stage.gradients(batch)["loss"]))
        optimizers.clip(1.0)
        optimizers.step()
    assert losses[-1] < 0.8 * losses[0]
    scores = match_scores(model, 2)
    assert set(scores) == {
        f"{name}_{key}"
        for name in ("few", "alike", "few_patch", "alike_patch")
        for key in ("found", "recall", "precision", "f1", "threshold")
    }
    assert all(0 <= score <= 1 for name, score in scores.items() if "threshold" not in name)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path) -> None:
    plan = MatchPlan(steps=3, things=1, emoji=1, scored=1)
    assert train_match(tmp_path / "whole", 0, plan, QUIET, False, World()) == (True, 3)
    first = replace(QUIET, stop_after=1)
    assert train_match(tmp_path / "parts", 0, plan, first, False, World()) == (False, 1)
    assert not (tmp_path / "parts" / MATCH_FILE).exists()
    assert train_match(tmp_path / "parts", 0, plan, QUIET, "required", World()) == (True, 2)
    whole, parts = (load_file(tmp_path / name / MATCH_FILE) for name in ("whole", "parts"))
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [json.loads(x) for x in (tmp_path / "parts/match/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["evaluation"] for line in lines if "evaluation" in line]
    with pytest.raises(ValueError, match="already holds a run"):
        train_match(tmp_path / "whole", 0, plan, QUIET, False, World())
