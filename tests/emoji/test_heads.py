from __future__ import annotations

import numpy as np
import torch

from nanomolmo2.emoji.heads import (
    NO_LABEL,
    VisionHeads,
    label_scenes,
    scale_loss,
    strongest,
)
from nanomolmo2.emoji.scenes import render_scene, train_rng
from nanomolmo2.emoji.sprites import CATEGORIES, Sprites


def scenes(count: int = 12):
    rng = train_rng(123)
    return [render_scene(rng, Sprites.load()) for _ in range(count)]


def test_cell_labels_say_where_the_centres_are():
    made = scenes()
    labels = label_scenes(made, patch_size=16, cell_size=32)
    for b, scene in enumerate(made):
        cells = {}
        for o in scene.objects:
            cells[int(o.center[1] // 32) * 6 + int(o.center[0] // 32)] = o
        found = labels.cell_class[b]
        assert {i for i, c in enumerate(found.tolist()) if c != NO_LABEL} == set(cells)
        for i, o in cells.items():
            assert CATEGORIES[found[i]] == o.category
            x100, x10, y100, y10 = labels.cell_digits[b, i].tolist()
            assert abs(100 * x100 + 10 * x10 - o.center[0] / 192 * 1000) <= 10
            assert abs(100 * y100 + 10 * y10 - o.center[1] / 192 * 1000) <= 10


def test_a_centre_near_a_line_may_count_on_either_side():
    made = scenes()
    plain = label_scenes(made, patch_size=16, cell_size=32)
    labels = label_scenes(made, patch_size=16, cell_size=32, margin=0.25)
    several = 0
    for b, scene in enumerate(made):
        own = plain.cell_class[b] != NO_LABEL
        assert torch.equal(labels.cell_class[b][own], plain.cell_class[b][own])
        for cell in range(36):
            owner = int(labels.cell_owner[b, cell])
            row, column = divmod(cell, 6)
            middle = np.array([32 * column + 16, 32 * row + 16])
            away = [np.abs(np.array(o.center) - middle).max() for o in scene.objects]
            if owner == NO_LABEL:
                assert min(away) >= 24
                continue
            o = scene.objects[owner]
            assert CATEGORIES[labels.cell_class[b, cell]] == o.category
            assert away[owner] <= 24
            offset = (np.array(o.center) - middle) / 32
            np.testing.assert_allclose(labels.cell_box[b, cell, :2], offset, atol=1e-5)
            several += away[owner] > 16
    assert several > 10


def test_of_the_cells_of_an_object_the_strongest_claim_counts():
    owners = torch.tensor([[0, 0, NO_LABEL, 1], [NO_LABEL, 0, 0, 0]])
    logits = torch.tensor([[1.0, 2.0, 9.0, -5.0], [9.0, -3.0, -1.0, -2.0]])
    expected = [[False, True, False, True], [False, False, True, False]]
    assert strongest(logits, owners).tolist() == expected
    expected = [[True, False, False, True], [False, True, False, False]]
    assert strongest(torch.ones(2, 4), owners).tolist() == expected


def test_patch_labels_follow_the_instance_map():
    made = scenes(4)
    labels = label_scenes(made, patch_size=16, cell_size=32)
    for b, scene in enumerate(made):
        for patch, label in enumerate(labels.patch_class[b].tolist()):
            row, column = divmod(patch, 12)
            tile = scene.instance_map[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            if label:
                owners = [
                    i for i, o in enumerate(scene.objects) if o.category == CATEGORIES[label - 1]
                ]
                assert np.isin(tile, owners).mean() >= 0.3
            else:
                assert all((tile == i).mean() < 0.3 for i in range(len(scene.objects)))


def test_heads_learn_from_tokens_that_carry_the_answer():
    """Tokens that point along their noun's embedding already have a small noun loss."""
    torch.manual_seed(0)
    labels = label_scenes(scenes(), patch_size=16, cell_size=32)
    nouns = torch.randn(len(CATEGORIES), 256)
    heads = VisionHeads(192, 256)
    right = nouns[labels.cell_class.clamp(min=0)]
    _, good = heads(torch.randn(12, 144, 192), right, nouns, labels)
    _, bad = heads(torch.randn(12, 144, 192), right.roll(1, dims=1), nouns, labels)
    assert good["noun_accuracy"] == 1.0 and good["noun_loss"] < 0.01
    assert bad["noun_accuracy"] < 0.5 and bad["noun_loss"] > 1


def test_claims_are_asked_of_the_strongest_cell():
    """One that claims each object alone has no loss; a second claim for one costs, and is wrong."""
    heads = VisionHeads(192, 256)
    labels = label_scenes(scenes(), patch_size=16, cell_size=32, margin=0.25)
    direction = torch.nn.functional.normalize(torch.randn(256), dim=0)
    heads.claim.load_state_dict({"weight": 2 * direction[None], "bias": torch.zeros(1)})
    among = torch.where(labels.cell_owner == NO_LABEL, 0.0, torch.rand(labels.cell_owner.shape))
    alone = strongest(among, labels.cell_owner)
    _, good = heads.claim_loss(torch.where(alone, 1, -1)[..., None] * direction, labels.cell_owner)
    assert good["claims_right"] == 1 and good["claim_loss"] < 1e-6
    several = torch.where(labels.cell_owner == NO_LABEL, -1, 1)[..., None] * direction
    _, bad = heads.claim_loss(several, labels.cell_owner)
    assert bad["claims_right"] < 0.5 and bad["claim_loss"] > 1


def test_scale_loss_is_zero_at_its_target():
    x = torch.randn(3, 5, 64)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    assert scale_loss(0.15 * x, 0.15) < 1e-10
    assert scale_loss(x * torch.e, 1.0).item() - 1 < 1e-5
