"""Scenes of things: the truth is what the pixels show, and held-out things never meet training."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.things import scenes
from nanomolmo2.things.drawings import HELD_OUT_SETS, Drawings
from nanomolmo2.things.grounds import GROUNDS, HELD_OUT_GROUNDS, compose, draw_ground, noise
from nanomolmo2.things.kinds import OTHER_SIZE, SAME_SIZE
from nanomolmo2.things.looks import (
    are_clearly_other,
    colour_difference,
    drawn_look,
    made_look,
    reshaped,
    tint,
)
from nanomolmo2.things.procedural import FAMILIES, HELD_OUT_FAMILIES, make_recipe
from nanomolmo2.things.scenes import (
    TEST_SETS,
    ThingScene,
    draw_scene,
    train_rng,
)
from nanomolmo2.things.surface import NOISE_PX, Grid, Light, Surface, dome, noise_table, shade
from nanomolmo2.things.table import LEAST_VISIBLE, middle_of

SMALL = ThingScene(width=256, height=192, max_px=64, max_like=12, max_others=10)


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    return [draw_scene(train_rng(0, i), SMALL) for i in range(60)]


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


# ---- the truth ----


def test_boxes_counts_and_shares_are_those_of_the_instance_map(many):
    for scene in many:
        assert scene.image.shape == (192, 256, 3)
        assert scene.image.dtype == np.uint8
        seen = np.unique(scene.instance_map)
        assert seen.tolist() in (list(range(len(scene.things))), [-1, *range(len(scene.things))])
        for i, thing in enumerate(scene.things):
            rows, columns = np.nonzero(scene.instance_map == i)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.box == box
            assert 0.4 <= thing.visible <= 1


def test_centres_and_clicks_lie_on_their_things(many):
    rng = np.random.default_rng(0)
    for scene in many:
        for i, thing in enumerate(scene.things):
            for x, y in (thing.center, *(scene.point_on(rng, i) for _ in range(3))):
                assert scene.instance_map[int(y), int(x)] == i


def test_the_middle_of_a_full_mask_and_of_a_ring():
    mask = np.zeros((9, 9), bool)
    mask[2:5, 3:9] = True
    assert middle_of(mask) == (6.0, 3.5)
    y, x = np.mgrid[:31, :31] - 15.0
    away = np.hypot(x, y)
    ring = (away < 14) & (away > 8)
    found = middle_of(ring)
    assert ring[int(found[1]), int(found[0])]
    assert found[1] < 15.5  # above the hole
    assert 8 < math.hypot(found[0] - 15.5, found[1] - 15.5) < 11  # no pixel of its border


def test_covered_and_cut_things_keep_their_share():
    """Recomputed: things are drawn once more alone, by what the map held before and after."""
    heaped = replace(SMALL, heaped=1.0, cut=1.0, min_like=10, max_like=12, min_others=8)
    shares = [
        thing.visible for i in range(25) for thing in draw_scene(train_rng(1, i), heaped).things
    ]
    assert min(shares) >= 0.4
    assert sum(share < 0.9 for share in shares) > 30  # they do cover each other
    alone = replace(SMALL, heaped=0.0, cut=0.0)
    things = [t for i in range(15) for t in draw_scene(train_rng(2, i), alone).things]
    assert np.mean([t.visible == 1 for t in things]) > 0.8
    assert all(t.box[0] >= 0 and t.box[2] <= 256 for t in things)


def test_sizes_within_a_kind_are_within_a_factor_of_two_and_never_between_two_and_three(many):
    ways = Counter()
    for scene in many:
        for number, kind in enumerate(scene.kinds):
            sizes = [scene.things[i].px for i in scene.of_kind(number)]
            assert all(kind.px[0] - 1e-6 <= px <= kind.px[1] + 1e-6 for px in sizes)
            assert kind.px[1] / kind.px[0] <= 2
            ways[kind.alike] += 1
            if kind.alike == "size":
                first = scene.kinds[kind.of]
                assert kind.look is first.look and kind.id != first.id
                low, high = sorted([kind.px, first.px])
                assert low[1] * 3 <= high[0] + 1e-6
    assert min(ways[way] for way in ("colour", "shape", "size")) >= 4


def test_a_thing_is_as_large_as_it_says():
    """A ball fills its size; its box is measured here."""
    rng = np.random.default_rng(0)
    recipe = make_recipe(rng, "ball")
    for px in (10, 23, 40, 90):
        alpha = recipe.draw(rng, px, 0.3)[..., 3]
        columns = np.flatnonzero((alpha >= 96).any(0))
        assert abs(columns[-1] + 1 - columns[0] - px) <= 1.5


def test_all_kinds_of_a_scene_are_clearly_other(many):
    for scene in many:
        for i, kind in enumerate(scene.kinds):
            for other in scene.kinds[:i]:
                if "size" in (kind.alike, other.alike):
                    continue
                assert are_clearly_other(kind.look, other.look)


def test_counts_are_in_their_ranges():
    config = ThingScene(width=320, height=320, min_like=20, max_like=30, max_others=5, max_px=40)
    for i in range(8):
        scene = draw_scene(train_rng(3, i), config)
        assert 20 <= len(scene.of_kind(0)) <= 30
    wide = draw_scene(train_rng(3, 0), replace(config, width=640, height=224))
    assert wide.image.shape == (*wide.instance_map.shape, 3) == (224, 640, 3)


# ---- streams, and what is held out ----


def test_scenes_come_from_their_seeds_alone():
    first = [digest(draw_scene(train_rng(5, i), SMALL).image) for i in range(6)]
    again = [digest(draw_scene(train_rng(5, i), SMALL).image) for i in reversed(range(6))]
    assert first == again[::-1]
    tests = [digest(scenes.test_scene(i, "made", seed=5, config=SMALL).image) for i in range(6)]
    other = [digest(draw_scene(train_rng(6, i), SMALL).image) for i in range(6)]
    assert len({*first, *tests, *other}) == 18


def test_training_refuses_what_is_held_out():
    for change in (
        {"art": ("twemoji",)},
        {"families": ("coin", HELD_OUT_FAMILIES[0])},
        {"grounds": HELD_OUT_GROUNDS},
    ):
        config = replace(SMALL, **change)
        with pytest.raises(ValueError, match="held out, for tests only"):
            config.for_training()
    assert SMALL.for_training() is SMALL
    assert not SMALL.held_out


def test_training_never_draws_what_is_held_out(many):
    for scene in many:
        assert not set(scene.ground.split("+")) & set(HELD_OUT_GROUNDS)
        origins = {kind.look.origin for kind in scene.kinds}
        assert not origins & {*HELD_OUT_SETS, *HELD_OUT_FAMILIES}
        assert not any("openmoji" in name or "twemoji" in name for name in origins)
    assert {scene.ground for scene in many} > {"wood", "cloth", "velvet"}


@pytest.mark.parametrize("name", list(TEST_SETS))
def test_sets_draw_what_is_held_out(name):
    scene = scenes.test_scene(0, name)
    origins = {kind.look.origin for kind in scene.kinds}
    assert origins <= ({*HELD_OUT_FAMILIES} if name == "made" else {*HELD_OUT_SETS})
    if name == "crowded":
        assert 20 <= len(scene.of_kind(0)) <= 60


def test_another_picture_has_the_same_kinds():
    first = draw_scene(train_rng(7, 0), SMALL)
    counts = []
    for i in range(12):
        second = draw_scene(train_rng(8, i), SMALL, first.kinds)
        assert second.kinds[: len(first.kinds)] == first.kinds
        counts.append(len(second.of_kind(0)))
    assert 0 in counts
    assert max(counts) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_like": 5, "max_like": 4}, "min_like"),
        ({"width": 32}, "width is 32"),
        ({"min_px": 4}, "min_px"),
        ({"max_px": 100}, "half of the picture's shorter side"),
        ({"min_like": 150, "max_like": 150, "min_px": 20}, "do not fit"),
        ({"camera": 1.5}, "camera is 1.5"),
        ({"grounds": ("moon",)}, "choose from plain"),
        ({"drawings": "/nowhere"}, "holds no drawings"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(train_rng(0, 0), replace(SMALL, made=0.0, **change))


# ---- drawings ----


def test_the_held_out_drawings_are_small_and_named():
    for name in HELD_OUT_SETS:
        held_out = Drawings.held_out(name)
        assert 100 <= len(held_out) <= 400
        assert set(held_out.sets) == {name}
        assert held_out.cells.shape[1:] == (72, 72, 4)
        assert len(set(held_out.names)) == len(held_out)
        alpha = held_out.cells[..., 3]
        assert (np.sort([(a >= 128).mean() for a in alpha])[0]) > 0.05  # none is empty


def test_no_held_out_drawing_has_a_twin_among_those_that_training_has_by_default():
    """Thumbnails of 9 x 9 pixels, as they are and mirrored, differ by 6 % or more."""

    def thumbs(cells):
        made = [Image.fromarray(cell).convert("RGBa").resize((9, 9), 4) for cell in cells]
        return np.array([np.asarray(image, np.float64) / 255 for image in made])

    training = thumbs(Drawings.for_training().cells)
    assert len(training) > 500
    for name in HELD_OUT_SETS:
        for thumb in thumbs(Drawings.held_out(name).cells):
            for way in (thumb, thumb[:, ::-1]):
                apart = np.sqrt(((training - way) ** 2).mean((1, 2, 3)))
                assert apart.min() >= 0.06


def test_a_folder_with_held_out_drawings_is_refused_for_training():
    from nanomolmo2.things.drawings import ASSETS

    with pytest.raises(ValueError, match="openmoji, twemoji, which are for tests only"):
        Drawings.for_training(str(ASSETS))


# ---- look-alikes ----


def test_look_alikes_are_unlike_in_what_they_say():
    rng = np.random.default_rng(3)
    drawings, found = Drawings.for_training(), Counter()
    for _ in range(12):
        for look in (drawn_look(rng, drawings), made_look(rng, ("coin", "bean", "button"))):
            other = look.recoloured(rng)
            if other is not None:
                found["colour"] += 1
                assert colour_difference(look.thumb, other.thumb) >= 0.17
                np.testing.assert_allclose(other.thumb[..., 3], look.thumb[..., 3], atol=0.02)
            other = reshaped(rng, look, drawings, ("coin", "bean", "leaf"))
            if other is not None:
                found["shape"] += 1
                mine, its = look.thumb[..., 3], other.thumb[..., 3]
                assert np.abs(mine - its).sum() >= 0.2 * np.maximum(mine, its).sum()
    assert min(found.values()) >= 15


def test_a_tint_turns_hues_as_computed_by_hand():
    red = np.array([[1.0, 0, 0, 1]], np.float32)
    np.testing.assert_allclose(red @ tint(2 * math.pi / 3), [[0, 1, 0]], atol=1e-6)  # to green
    np.testing.assert_allclose(red @ tint(0, 0), [[1 / 3] * 3], atol=1e-6)  # to grey
    np.testing.assert_allclose(red @ tint(0, 1, 0.5, 0.1), [[0.85, 0.35, 0.35]], atol=1e-6)


# ---- procedural things and grounds ----


@pytest.mark.parametrize("family", list(FAMILIES))
def test_instances_of_a_recipe_differ_a_little_and_other_recipes_more(family):
    rng = np.random.default_rng(1)
    recipe = make_recipe(rng, family)
    first, second = (recipe.draw(rng, 48) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == second.shape
    assert 0 <= first.min() <= first.max() <= 255
    assert (first[..., :3] <= first[..., 3:] + 1e-3).all()  # multiplied by alpha
    assert (first[..., 3] >= 128).mean() > 0.02
    assert np.array_equal(recipe.picture(), recipe.picture())
    others = [make_recipe(rng, family) for _ in range(4)]
    apart = [np.abs(recipe.picture().astype(int) - o.picture()).mean() for o in others]
    assert max(apart) > 6


def test_natural_variation_within_a_recipe():
    rng = np.random.default_rng(2)
    same = 0
    for family in FAMILIES:
        recipe = make_recipe(rng, family)
        pair = [recipe.draw(rng, 48) for _ in range(2)]
        same += np.array_equal(*pair)
    assert same <= 6  # what has no texture of its own, such as a plain ring


def test_light_from_the_left_brightens_the_left_of_a_dome():
    grid = Grid(41, 1.05, 0.0)
    rng = np.random.default_rng(0)
    palette = make_recipe(rng, "ball").palette
    surface = Surface(1 - grid.r, dome(1 - grid.r, 1.0), np.full(3, 0.5, np.float32))
    made = shade(surface, grid, Light(-0.8, 0.0, 0.6, ambient=0.2), palette)
    assert made[20, 8, :3].mean() > 1.5 * made[20, 32, :3].mean()
    assert made[0, 0, 3] == 0
    assert made[20, 20, 3] == 255


def test_the_height_of_a_dome_by_hand():
    # At the edge 0; where its bevel ends, height * bevel; half-way up the bevel sqrt(3)/2 of it.
    found = dome(np.array([0.0, 0.25, 0.5, 0.9]), 0.5, 2.0)
    np.testing.assert_allclose(found, [0, math.sqrt(0.75), 1, 1], atol=1e-6)


@pytest.mark.parametrize("name", list(GROUNDS))
def test_grounds_have_their_size_and_differ(name):
    rng = np.random.default_rng(0)
    first, second = (draw_ground(rng, (96, 160), name) for _ in range(2))
    assert first.shape == (96, 160, 3)
    assert first.dtype == np.float32
    assert 0 <= first.min() <= first.max() <= 255
    assert np.abs(first - second).mean() > 1


@pytest.mark.parametrize("size", [(300, 512), (40, 700)])  # within the table, and beyond it
def test_a_piece_of_noise_is_one_of_the_table_that_goes_on_around_its_edges(size):
    rng, again = (np.random.default_rng(1) for _ in range(2))
    for _ in range(8):
        piece = noise(rng, size, 1)
        y, x = again.integers(0, NOISE_PX, 2)
        down, right = again.choice([-1, 1]), again.choice([-1, 1])
        rows = (np.arange(size[0]) * down + y) % NOISE_PX
        columns = (np.arange(size[1]) * right + x) % NOISE_PX
        assert np.array_equal(piece, noise_table(1)[np.ix_(rows, columns)])


def test_a_composed_ground_shows_both():
    first = np.zeros((80, 120, 3), np.float32)
    second = np.full((80, 120, 3), 200, np.float32)
    rng = np.random.default_rng(0)
    for _ in range(6):
        made = compose(rng, first, second)
        assert made.shape == (80, 120, 3)
        assert 0.02 < (made == 200).mean() < 0.98
        assert (made == 0).any()


def test_cousins_are_of_one_family_and_still_clearly_other():
    config = replace(
        SMALL, made=1.0, cousins=1.0, alike=0.0, min_others=6, families=("screw", "tablet")
    )
    kinds = [draw_scene(train_rng(9, i), config).kinds for i in range(12)]
    assert all(len({kind.look.origin for kind in scene}) == 1 for scene in kinds)
    assert sum(len(scene) > 2 for scene in kinds) >= 5
    assert {scene[0].look.origin for scene in kinds} == {"screw", "tablet"}


def test_a_ground_is_set_off_from_what_lies_on_it():
    rng = np.random.default_rng(0)
    dark = made_look(rng, ("ball",))
    grey = np.zeros((8, 8, 4), np.float32)
    grey[2:6, 2:6] = (0.2, 0.2, 0.2, 1)
    dark.thumb = grey  # of the same grey as the ground
    kinds = [scenes.Kind(dark, (40, 50))]
    canvas = np.full((64, 64, 3), 51, np.float32)
    scenes.set_off(canvas, kinds)
    assert abs(canvas.mean() - 51) >= 34
    far = np.full((64, 64, 3), 200, np.float32)
    scenes.set_off(far, kinds)
    assert (far == 200).all()
    loud = np.where(rng.random((64, 64, 1)) < 0.5, 100, 250) * np.ones(3)
    scenes.set_off(loud, [scenes.Kind(dark, (12, 14))])
    assert loud[::5, ::5].std((0, 1)) == pytest.approx(42 * 12 / 36, rel=1e-3)


def test_the_page_tells_the_numbers_that_the_code_has():
    page = (Path(__file__).parents[2] / "docs" / "things-data.md").read_text(encoding="utf-8")
    assert f"{len(FAMILIES)} families" in page
    assert f"**Grounds**: {', '.join(GROUNDS)}." in page
    assert f"({len(Drawings.held_out('openmoji'))} of each are in the package" in page
    for name, config in TEST_SETS.items():
        assert f"| `{name}` | {config.min_like} to {config.max_like} |" in page
    assert f"at least {100 * LEAST_VISIBLE:.0f} % in view" in page
    assert f"at least {OTHER_SIZE:.0f} times as large" in page
    assert f"within a factor of {SAME_SIZE:.0f}" in page
    for names in (HELD_OUT_FAMILIES, HELD_OUT_GROUNDS):
        assert f"`{names[0]}`" in page
