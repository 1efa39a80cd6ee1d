"""Scenes: the ground truth is what the pixels show, and test scenes never meet training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.emoji import scenes
from nanomolmo2.emoji.backgrounds import draw_clutter, draw_photo
from nanomolmo2.emoji.scenes import (
    SETTINGS,
    TEST_GROUPS,
    SceneConfig,
    render_crop,
    render_mosaic,
    render_scene,
    setting,
    train_rng,
)
from nanomolmo2.emoji.sprites import CATEGORIES, STYLE_GROUPS, Sprites

# Of the first version's scenes, as `digest` makes them.
TEST_DIGESTS = {
    "seen": "9ba1fce0a68704b7",
    "mild": "472e68a04811ccce",
    "openmoji": "1353c43907681647",
}
TRAIN_DIGEST = "d6b0dde2f0d8bc88"
FULL_DIGEST = "6f14a1f7cc62bfb3"


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
        drawn = scenes.Drawing.of(
            rng, sprites, guitar, "noto", 94, SceneConfig(max_degrees=0)
        ).alpha[..., 0]
        distances = [np.abs(drawn - a).mean() for a in (upright, upright[:, ::-1])]
        assert min(distances) < 0.02 < 0.2 < max(distances)
        mirrored += int(np.argmin(distances))
    assert 10 <= mirrored <= 30
    for _ in range(40):  # turning cuts nothing off
        turned = scenes.Drawing.of(rng, sprites, guitar, "noto", 94, SceneConfig()).alpha
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


@pytest.mark.parametrize("group", TEST_GROUPS)
def test_test_scenes_use_the_styles_of_their_group_only(sprites, group):
    found = {
        o.style for i in range(60) for o in scenes.test_scene(i, group, sprites=sprites).objects
    }
    assert found == set(STYLE_GROUPS[group])


def test_some_styles_of_a_group_can_be_asked_for(sprites):
    styles = ("noto", "fluent-3d")
    some = [scenes.test_scene(i, "seen", sprites=sprites, styles=styles) for i in range(30)]
    assert {o.style for scene in some for o in scene.objects} == set(styles)
    assert scenes.art_of("seen", styles) == styles
    assert scenes.art_of("seen") == STYLE_GROUPS["seen"]
    with pytest.raises(ValueError, match="no style 'twemoji' in the art group 'seen'; it has noto"):
        scenes.test_scene(0, "seen", sprites=sprites, styles=("noto", "twemoji"))


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


@pytest.mark.parametrize("group", ["far", "extra", "inked"])
def test_only_test_groups_have_test_scenes(group):
    with pytest.raises(ValueError, match=rf"'{group}'.*seen, mild, openmoji"):
        scenes.test_scene(0, group)


def digest(drawn: Iterable[scenes.Scene]) -> str:
    found = hashlib.sha256()
    for scene in drawn:
        found.update(scene.image.tobytes() + scene.instance_map.tobytes())
        found.update(repr([(o.category, o.style, o.box, o.center) for o in scene.objects]).encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("group", TEST_GROUPS)
def test_the_published_test_scenes_never_change(sprites, group):
    """Digests of the first version's pictures; scores are only comparable on the same ones."""
    drawn = (scenes.test_scene(i, group, sprites=sprites) for i in range(40))
    assert digest(drawn) == TEST_DIGESTS[group]


def test_training_scenes_never_change(sprites):
    rng = train_rng(0)
    assert digest(render_scene(rng, sprites) for _ in range(60)) == TRAIN_DIGEST
    full = SceneConfig(min_objects=8, max_objects=8, min_px=30, max_px=90)
    drawn = (render_scene(train_rng(1, i), sprites, full) for i in range(15))
    assert digest(drawn) == FULL_DIGEST


# ---- harder settings ----


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_draw_what_they_say(sprites, name):
    config = setting(name)
    drawn = [render_scene(train_rng(2, i), sprites, config) for i in range(12)]
    counts = [len(scene.objects) for scene in drawn]
    assert config.min_objects <= min(counts) <= max(counts) <= config.max_objects
    assert max(counts) >= config.max_objects / 2
    for scene in drawn:
        assert scene.image.shape == (config.size, config.size, 3)
        assert scene.image.dtype == np.uint8 and scene.image.flags.writeable
        assert set(np.unique(scene.instance_map)) - {-1} == set(range(len(scene.objects)))
    again = render_scene(train_rng(2, 0), sprites, config)
    assert digest([again]) == digest(drawn[:1])


def test_crowded_scenes_hold_up_to_twenty(sprites):
    rng = train_rng(6)
    drawn = [render_scene(rng, sprites, setting("crowded")) for _ in range(120)]
    assert {len(scene.objects) for scene in drawn} == set(range(7, 21))
    assert max(max(Counter(o.category for o in s.objects).values()) for s in drawn) > 9


def test_occluded_objects_stay_in_view_and_have_boxes_of_what_is_seen(sprites, monkeypatch):
    config, rng = setting("occluded"), train_rng(7)
    pixels: list[int] = []  # of the drawings of a scene, covered ones too
    paste = scenes.Drawing.paste

    def spy(self, canvas, place, instance_map, number):
        del pixels[number:]
        pixels.append(int(self.visible.sum()))
        paste(self, canvas, place, instance_map, number)

    monkeypatch.setattr(scenes.Drawing, "paste", spy)
    shares = []
    for _ in range(60):
        scene = render_scene(rng, sprites, config)
        for i, o in enumerate(scene.objects):
            mask = scene.instance_map == i
            assert o.box == scenes.box_of(mask)
            assert o.center == ((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2)
            shares.append(mask.sum() / pixels[i])
    assert min(shares) >= config.min_visible
    assert min(shares) < 0.6 and np.mean(np.array(shares) < 0.95) > 0.1  # many are covered


def test_clutter_lies_behind(sprites):
    """With and without it the same things lie in the same places."""
    config = SceneConfig(clutter=24)
    changed = []
    for seed in range(10):
        rng, plain = train_rng(8, seed), train_rng(8, seed)
        chosen = scenes.choose_objects(rng, sprites, config)
        scenes.choose_objects(plain, sprites, SceneConfig())
        rng.uniform(config.min_px, config.max_px, len(chosen))
        plain.uniform(config.min_px, config.max_px, len(chosen))
        before = scenes.draw_background(plain, config.size)
        canvas = scenes.draw_canvas(rng, config)
        changed.append((canvas != before).any(-1).mean())
        scene = render_scene(train_rng(8, seed), sprites, config)
        free = scene.instance_map < 0
        kept = (scene.image == canvas).all(-1)
        assert kept[free].mean() > 0.9  # all but soft edges and see-through parts
        assert kept[~free].mean() < 0.1
    assert 0.03 < np.mean(changed) < 0.5


def test_no_clutter_changes_nothing():
    canvas = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(draw_clutter(train_rng(0), canvas, 0), canvas)


def test_photos_are_pieces_of_the_pictures_of_a_folder(tmp_path):
    """Red grows to the right and green down, so a piece shows where it was cut."""
    x, y = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    picture = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    (tmp_path / "more").mkdir()
    Image.fromarray(picture).save(tmp_path / "more" / "ramp.png")
    (tmp_path / "notes.txt").write_text("no picture")
    rng, mirrored, widths = train_rng(9), 0, []
    for _ in range(40):
        piece = draw_photo(rng, 64, str(tmp_path)).astype(int)
        assert piece.shape == (64, 64, 3)
        rise = piece[:, -1, 0].mean() - piece[:, 0, 0].mean()
        mirrored += rise < 0
        widths.append(abs(rise) / 255 * 300)
        assert piece[-1, :, 1].mean() > piece[0, :, 1].mean()
    assert 8 <= mirrored <= 32
    assert 70 < min(widths) < 120 < 160 < max(widths) < 201


def test_made_up_photos_differ_and_have_structure_at_every_scale():
    drawn = [draw_photo(train_rng(10, i), 96).astype(float) for i in range(8)]
    assert len({picture.tobytes() for picture in drawn}) == 8
    coarse = [p.reshape(6, 16, 6, 16, 3).mean((1, 3)).std() for p in drawn]
    fine = [np.abs(np.diff(p, axis=1)).mean() for p in drawn]
    assert np.median(coarse) > 10 and np.median(fine) > 1


def test_folders_without_pictures_are_named(tmp_path):
    for folder, message in ((tmp_path, "holds no pictures"), (tmp_path / "no", "no folder")):
        with pytest.raises(ValueError, match=message):
            draw_photo(train_rng(0), 64, str(folder))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png"):
        draw_photo(train_rng(0), 64, str(tmp_path / "broken"))


def test_a_setting_takes_another_size_and_unknown_ones_are_named():
    assert setting("crowded", 384) == replace(SETTINGS["crowded"], size=384)
    with pytest.raises(ValueError, match=r"'hard'.*easy, crowded"):
        setting("hard")
    with pytest.raises(ValueError, match="do not fit"):
        setting("wide768", 192)


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


def test_mosaics_show_one_emoji_in_each_square(sprites):
    whole = 0
    for seed in range(20):
        mosaic = render_mosaic(train_rng(seed), sprites, SceneConfig(variation=3.0))
        assert mosaic.image.shape == (192, 192, 3)
        assert len({o.category for o in mosaic.objects}) == 9
        for number, thing in enumerate(mosaic.objects):
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= 192 and 0 <= y0 < y1 <= 192
            assert thing.center == ((x0 + x1) / 2, (y0 + y1) / 2)
            ys, xs = np.nonzero(mosaic.instance_map == number)
            found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            later = [o.box for o in mosaic.objects[number + 1 :]]
            if not any(shared(thing.box, box) > 0 for box in later):
                assert found == thing.box
                whole += 1
            # No further from the middle of its square than a fifth of one, but for the border.
            row, column = divmod(number, 3)
            assert abs(thing.center[0] - 64 * (column + 0.5)) <= 64 / 5 + 1 or x0 == 0 or x1 == 192
            assert abs(thing.center[1] - 64 * (row + 0.5)) <= 64 / 5 + 1 or y0 == 0 or y1 == 192
    assert whole > 40


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
        ({"size": 768, "max_objects": 128}, "at most 127"),
        ({"max_overlap": 0.0}, "max_overlap"),
        ({"min_visible": 1.5}, "min_visible"),
        ({"max_filling": 0.0}, "max_filling"),
        ({"clutter": -1}, "clutter"),
        ({"background": "sea"}, "plain or photo"),
        ({"photos": "holiday"}, "background='photo'"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SceneConfig(), **change)


def test_configs_go_to_json_and_back():
    styled = SceneConfig(max_objects=3, styles=("noto", "fxemoji"))
    for config in (*SETTINGS.values(), styled):
        assert SceneConfig.from_dict(config.to_dict()) == config


def test_varied_drawings_are_new_shapes_with_exact_boxes():
    usual, varied = SceneConfig(), SceneConfig(variation=3.0)
    assert not np.array_equal(crop_of(usual), crop_of(varied))
    assert np.array_equal(crop_of(varied), crop_of(varied))
    for seed in range(10):
        scene = render_scene(np.random.default_rng(seed), Sprites.load(), varied)
        for number, one in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.instance_map == number)
            x0, y0, x1, y1 = one.box
            assert x0 <= columns.min() and columns.max() < x1
            assert y0 <= rows.min() and rows.max() < y1
            assert max(x1 - x0, y1 - y0) <= 1.3 * varied.max_px
    with pytest.raises(ValueError, match="variation is 11, expected 0 to 10"):
        SceneConfig(variation=11)


def crop_of(config):
    return render_crop(np.random.default_rng(3), Sprites.load(), config)[0]
