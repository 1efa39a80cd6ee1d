"""Scenes: the ground truth is what the pixels show, and test scenes never meet training."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from nanomolmo2.data.emoji import scenes
from nanomolmo2.data.emoji.scenes import SceneConfig, render_crop, render_scene, train_rng
from nanomolmo2.data.emoji.sprites import CATEGORIES, STYLE_GROUPS, Sprites


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return Sprites.load()


@pytest.fixture(scope="module")
def many(sprites) -> list[scenes.Scene]:
    rng = train_rng(0)
    return [render_scene(rng, sprites) for _ in range(400)]


def shared(a, b) -> float:
    """Common area of two boxes, of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def test_boxes_are_those_of_the_instance_map(many):
    exact = 0
    for scene in many:
        boxes = [o.box for o in scene.objects]
        for i, box in enumerate(boxes):
            ys, xs = np.nonzero(scene.instance_map == i)
            found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            covered = any(shared(box, later) > 0 for later in boxes[i + 1 :])
            if not covered:
                assert found == box
                exact += 1
            else:  # a later object may hide part of it, but shows nothing outside of the box
                assert box[0] <= found[0] and box[1] <= found[1]
                assert found[2] <= box[2] and found[3] <= box[3]
        assert set(np.unique(scene.instance_map)) <= set(range(-1, len(boxes)))
    assert exact > 1000


def test_the_pixels_of_an_object_are_where_its_mask_is(sprites):
    """A scene differs from its empty background inside the boxes and only there."""
    config = SceneConfig()
    for seed in range(40):
        scene = render_scene(train_rng(1, seed), sprites, config)
        rng = train_rng(1, seed)
        chosen = scenes.choose_objects(rng, sprites, config)
        rng.uniform(config.min_px, config.max_px, len(chosen))  # the sizes
        background = scenes.draw_background(rng, config.size).astype(int)
        assert len(scene.objects) == len(chosen)
        changed = np.abs(scene.image - background).sum(-1) > 30
        near = np.zeros_like(changed)
        for o in scene.objects:
            x0, y0, x1, y1 = map(int, o.box)
            near[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = True
        assert not (changed & ~near).any()
        assert changed[scene.instance_map >= 0].mean() > 0.6


def test_objects_lie_inside_and_barely_overlap(many):
    for scene in many:
        height, width = scene.instance_map.shape
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        for i, o in enumerate(scene.objects):
            x0, y0, x1, y1 = o.box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert o.center == ((x0 + x1) / 2, (y0 + y1) / 2)
            assert all(shared(o.box, other.box) < 0.1 for other in scene.objects[:i])


def test_sizes_span_the_configured_range(many):
    longer = [
        max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for scene in many for o in scene.objects
    ]
    assert min(longer) > 24 and max(longer) < 72 * 1.3  # turning changes extents a little
    assert np.percentile(longer, 90) - np.percentile(longer, 10) > 20


def test_counts_cover_one_to_six_and_categories_repeat(many):
    totals = Counter(len(scene.objects) for scene in many)
    assert set(totals) == {1, 2, 3, 4, 5, 6}
    assert all(0.05 < n / len(many) < 0.35 for n in totals.values())
    repeated = [max(Counter(o.category for o in scene.objects).values()) for scene in many]
    assert 0.3 < np.mean([n > 1 for n in repeated]) < 0.5
    assert max(repeated) >= 5


def test_every_category_and_every_seen_style_turn_up(many):
    assert {o.category for scene in many for o in scene.objects} == set(CATEGORIES)
    assert {o.style for scene in many for o in scene.objects} == set(STYLE_GROUPS["seen"])


def test_styles_are_mixed_in_half_of_the_scenes(many):
    large = [scene for scene in many if len(scene.objects) >= 4]
    mixed = np.mean([len({o.style for o in scene.objects}) > 1 for scene in large])
    assert 0.35 < mixed < 0.65


def test_drawings_are_mirrored_half_of_the_time_and_turned_whole(sprites):
    guitar, rng = CATEGORIES.index("guitar"), train_rng(5)
    upright = np.asarray(sprites.images[guitar, "noto"][0])[..., 3] / 255
    mirrored = 0
    for _ in range(40):
        drawn = scenes._Drawing.of(rng, sprites, guitar, "noto", 94, 0).alpha[..., 0]
        distances = [np.abs(drawn - a).mean() for a in (upright, upright[:, ::-1])]
        assert min(distances) < 0.02 < 0.2 < max(distances)
        mirrored += int(np.argmin(distances))
    assert 10 <= mirrored <= 30
    for _ in range(40):  # turning cuts nothing off
        turned = scenes._Drawing.of(rng, sprites, guitar, "noto", 94, 15).alpha
        assert turned.sum() == pytest.approx(upright.sum(), rel=0.02)


def test_the_same_seed_gives_the_same_scene(sprites):
    first = [render_scene(train_rng(7, 1), sprites) for _ in range(2)]
    other = render_scene(train_rng(7, 2), sprites)
    np.testing.assert_array_equal(first[0].image, first[1].image)
    np.testing.assert_array_equal(first[0].instance_map, first[1].instance_map)
    assert first[0].objects == first[1].objects != other.objects


def test_a_full_picture_still_holds_all_its_objects(sprites):
    """Large objects rarely fit at their first sizes: they shrink, or the scene is begun anew."""
    config = SceneConfig(min_objects=8, max_objects=8, min_px=30, max_px=90)
    rng = train_rng(3)
    assert all(len(render_scene(rng, sprites, config).objects) == 8 for _ in range(30))


@pytest.mark.parametrize("group", STYLE_GROUPS)
def test_test_scenes_use_the_styles_of_their_group_only(sprites, group):
    found = {
        o.style for i in range(60) for o in scenes.test_scene(i, group, sprites=sprites).objects
    }
    assert found == set(STYLE_GROUPS[group])


def test_training_never_shows_held_out_styles(sprites):
    held_out = {*STYLE_GROUPS["mild"], *STYLE_GROUPS["openmoji"]}
    assert not held_out & set(SceneConfig().styles)
    rng = train_rng(0)
    for config in (SceneConfig(), SceneConfig(mixed_styles=0), SceneConfig(mixed_styles=1)):
        styles = {o.style for _ in range(50) for o in render_scene(rng, sprites, config).objects}
        assert not styles & held_out


def test_test_scenes_are_fixed_and_differ_from_training_and_each_other(sprites):
    scene = scenes.test_scene(5, "seen", seed=1)
    np.testing.assert_array_equal(scene.image, scenes.test_scene(5, "seen", seed=1).image)
    others = [
        scenes.test_scene(6, "seen", seed=1),
        scenes.test_scene(5, "seen", seed=2),
        render_scene(train_rng(1, 0, 5), sprites),  # the same numbers in the training stream
        render_scene(train_rng(1), sprites),
    ]
    assert all(scene.objects != other.objects for other in others)


def test_test_scenes_take_sizes_and_counts_from_a_config(sprites):
    config = SceneConfig(size=128, min_objects=2, max_objects=2, max_px=50)
    scene = scenes.test_scene(0, "mild", sprites=sprites, config=config)
    assert scene.image.shape == (128, 128, 3) and len(scene.objects) == 2
    assert {o.style for o in scene.objects} == {"twemoji"}


def test_an_unknown_group_is_named():
    with pytest.raises(ValueError, match=r"'far'.*seen, mild, openmoji"):
        scenes.test_scene(0, "far")


def test_crops_show_one_category_at_the_offset_they_say(sprites):
    """Against flat ground the middle of the changed pixels is the offset."""
    rng, checked = train_rng(4), 0
    for _ in range(200):
        image, category, (dx, dy) = render_crop(rng, sprites)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert 0 <= category < len(CATEGORIES)
        assert abs(dx) < 14 and abs(dy) < 14
        corner = image[0, 0].astype(int)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(int)
        if np.abs(border - corner).max() > 0:
            continue  # not flat, or the emoji reaches over the border
        ys, xs = np.nonzero(np.abs(image - corner).sum(-1) > 60)
        if len(xs) < 200:
            continue  # nearly the colour of the ground
        middle = ((xs.min() + xs.max() + 1) / 2 - 32, (ys.min() + ys.max() + 1) / 2 - 32)
        np.testing.assert_allclose((dx, dy), middle, atol=6)
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_objects": 0}, "min_objects"),
        ({"min_objects": 4, "max_objects": 3}, "max_objects"),
        ({"min_px": 4}, "min_px"),
        ({"max_px": 150}, "half of the picture"),
        ({"max_objects": 40}, "do not fit"),
        ({"styles": ("comic",)}, "comic.*noto"),
        ({"styles": ()}, "choose from"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SceneConfig(), **change)


def test_configs_go_to_json_and_back():
    config = SceneConfig(max_objects=3, styles=("noto", "fxemoji"))
    assert SceneConfig.from_dict(config.to_dict()) == config
