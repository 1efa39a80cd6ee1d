from __future__ import annotations

import numpy as np
import torch

from nanomolmo2.data.emoji.scenes import render_scene, train_rng
from nanomolmo2.data.emoji.sprites import CATEGORIES, Sprites
from nanomolmo2.training.vision_heads import NO_LABEL, VisionHeads, label_scenes, scale_loss


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


def test_scale_loss_is_zero_at_its_target():
    x = torch.randn(3, 5, 64)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    assert scale_loss(0.15 * x, 0.15) < 1e-10
    assert scale_loss(x * torch.e, 1.0).item() - 1 < 1e-5
