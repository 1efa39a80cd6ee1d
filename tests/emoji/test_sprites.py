"""The bundled artwork: complete, apart by licence, and what its index says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.emoji.sprites import (
    ASSETS,
    CATEGORIES,
    INKED,
    PLURALS,
    STYLE_GROUPS,
    Sprites,
    article,
    inked,
)

ALL_STYLES = [style for styles in STYLE_GROUPS.values() for style in styles]
DRAWN_STYLES = [style for style in ALL_STYLES if not style.endswith(INKED)]  # in an atlas
VENDORS = [s for group in ("seen", "mild", "openmoji") for s in STYLE_GROUPS[group]]


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return Sprites.load()


def test_style_groups_are_disjoint_and_complete(sprites):
    assert len(set(ALL_STYLES)) == len(ALL_STYLES)
    assert {style for _, style in sprites.images} == set(ALL_STYLES)
    assert STYLE_GROUPS["mild"] == ("twemoji",) and STYLE_GROUPS["openmoji"] == ("openmoji",)
    assert len(STYLE_GROUPS["seen"]) == 6
    assert STYLE_GROUPS["inked"] == tuple(f"{style}-inked" for style in STYLE_GROUPS["seen"])


def test_new_groups_come_after_those_whose_place_is_in_the_seeds_of_test_scenes():
    assert tuple(STYLE_GROUPS) == ("seen", "mild", "openmoji", "extra", "inked")


def test_held_out_styles_have_every_category_and_seen_ones_nearly(sprites):
    assert len(CATEGORIES) == 64
    for i in range(len(CATEGORIES)):
        styles = set(sprites.styles_of(i))
        assert {"twemoji", "openmoji"} <= styles
        assert len(styles & set(VENDORS)) >= len(VENDORS) - 1


def test_extra_styles_have_a_fair_share_of_the_categories_and_none_is_left_out(sprites):
    extra = STYLE_GROUPS["extra"]
    for style in extra:
        assert sum(sprites.has(i, style) for i in range(len(CATEGORIES))) >= 15, style
    for i in range(len(CATEGORIES)):
        assert len(set(sprites.styles_of(i)) & set(extra)) >= 2, CATEGORIES[i]


def test_the_sprites_are_a_mapping_that_reads_only_what_it_is_asked_for():
    """Those who never train must not wait for the training styles."""
    from nanomolmo2.emoji import sprites as module

    module._load.cache_clear()
    fresh = Sprites.load()
    assert not fresh.images.done
    assert fresh.has(0, "lucide") and fresh.has(0, "noto-inked") and not fresh.has(0, "lego")
    assert len(fresh.images) == len(list(fresh.images)) and not fresh.images.done
    fresh.rgba(0, "openmoji")
    assert {style for _, style in fresh.images.done} == {"openmoji"}
    with pytest.raises(KeyError, match="lego"):
        fresh.images[0, "lego"]
    assert fresh is Sprites.load()


def test_every_drawing_fills_its_cell(sprites):
    """Sizes in scenes mean the drawing's extent only if all are cropped alike."""
    for key in sprites.images:
        alpha = sprites.rgba(*key)[..., 3]
        rows, columns = np.flatnonzero(alpha.max(1) >= 16), np.flatnonzero(alpha.max(0) >= 16)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert sprites.size - 5 <= extent <= sprites.size, key
        assert (alpha >= 128).mean() > 0.08, f"{key} is nearly empty"


def test_every_drawing_comes_in_the_same_sizes_and_multiplied_by_alpha(sprites):
    for style in ALL_STYLES:
        (key,) = [key for key in sprites.images if key[1] == style][:1]
        assert [image.size for image in sprites.images[key]] == [(96, 96), (64, 64), (44, 44)]
        for image in sprites.images[key]:
            assert image.mode == "RGBa"


def test_no_two_categories_share_a_drawing(sprites):
    """Matching by name can pick one drawing for two nouns."""
    for style in ALL_STYLES:
        drawn = [sprites.images[i, style][-1] for i in range(64) if sprites.has(i, style)]
        pixels = np.stack([np.asarray(d, np.float32).ravel() for d in drawn])
        distance = np.abs(pixels[:, None] - pixels[None]).mean(-1)
        np.fill_diagonal(distance, np.inf)
        assert distance.min() > 8, style


def test_drawings_of_a_category_differ_between_held_out_and_seen_styles(sprites):
    for i in range(len(CATEGORIES)):
        for held_out in ("twemoji", "openmoji"):
            mine = sprites.rgba(i, held_out).astype(np.float32)
            for style in STYLE_GROUPS["seen"]:
                if sprites.has(i, style):
                    assert np.abs(mine - sprites.rgba(i, style)).mean() > 4, (i, style)


def test_inked_drawings_are_dark_around_and_hold_few_colours(sprites):
    for style in STYLE_GROUPS["seen"]:
        for i in range(0, len(CATEGORIES), 4):
            if not sprites.has(i, style):
                continue
            plain, drawn = sprites.rgba(i, style), sprites.rgba(i, style + INKED)
            before, after = plain[..., 3] >= 128, drawn[..., 3] >= 128
            assert drawn.shape == plain.shape
            padded = np.pad(before, 1)
            around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).any((2, 3))
            np.testing.assert_array_equal(after, around)  # it grows by a pixel on every side
            inner = padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
            assert drawn[before & ~inner][:, :3].mean() < 45, (i, style)
            _, counts = np.unique(drawn[before][:, :3], axis=0, return_counts=True)
            assert np.sort(counts)[-8:].sum() > 0.4 * before.sum(), (i, style)


def test_inked_draws_lines_between_colours_and_not_within_one():
    """A disc, its left half red, its right half yellow with a faint gradient."""
    y, x = np.mgrid[:96, :96]
    disc = ((x - 47.5) ** 2 + (y - 47.5) ** 2 < 45**2).astype(np.uint8)
    pixels = np.zeros((96, 96, 4), np.uint8)
    pixels[..., 3] = 255 * disc
    pixels[:, :48, :3] = (200, 20, 20)
    pixels[:, 48:, 0], pixels[:, 48:, 1] = 220, 180 + y[:, 48:] // 6
    image = Image.fromarray(pixels).convert("RGBa")
    drawn = np.asarray(inked(image).convert("RGBA")).astype(int)
    assert inked(image).mode == "RGBa" and inked(image).size == (96, 96)
    np.testing.assert_array_equal(drawn, np.asarray(inked(image).convert("RGBA")))
    dark = (drawn[..., :3].max(-1) < 60) & (drawn[..., 3] > 128)
    row = np.flatnonzero(dark[48])
    assert {47, 48} <= set(row) and row.min() <= 3 and row.max() >= 92
    assert 5 <= len(row) <= 14  # both outlines and the line between
    assert dark[20:76, 60:80].sum() == 0  # no line in the gradient


@pytest.mark.parametrize(
    ("noun", "plural"),
    [
        ("fish", "fish"),
        ("leaf", "leaves"),
        ("trophy", "trophies"),
        ("snowman", "snowmen"),
        ("fox", "foxes"),
        ("bus", "buses"),
        ("dog", "dogs"),
    ],
)
def test_plurals(noun, plural):
    assert dict(zip(CATEGORIES, PLURALS, strict=True))[noun] == plural


def test_articles():
    vowels = {noun for noun in CATEGORIES if article(noun) == "an"}
    assert vowels == {
        *("elephant", "owl", "octopus", "apple", "avocado", "airplane", "umbrella", "anchor")
    }


def test_attribution_names_every_style_and_its_licence_text():
    attribution = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for style in DRAWN_STYLES:
        (row,) = [line for line in attribution.splitlines() if line.startswith(f"| `{style}`")]
        licence = row.split("](")[1].split(")")[0]
        assert len((ASSETS / licence).read_text(encoding="utf-8")) > 1000


def test_share_alike_artwork_is_in_a_file_of_its_own_and_all_is_small():
    sizes = {path.name: path.stat().st_size for path in ASSETS.glob("*.webp")}
    assert set(sizes) == {"sprites.webp", "openmoji.webp", "extra.webp"}
    assert sum(sizes.values()) < 3e6


def test_nothing_in_training_is_share_alike_or_made_from_what_is_tested():
    """Neither by licence nor by where it was taken from."""
    index = json.loads((ASSETS / "index.json").read_text(encoding="utf-8"))
    attribution = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for style in STYLE_GROUPS["seen"] + STYLE_GROUPS["extra"]:
        (row,) = [line for line in attribution.splitlines() if line.startswith(f"| `{style}`")]
        assert not any(word in row.lower() for word in ("-sa-", "openmoji", "twemoji")), style
    files = {info["file"]: set() for info in index["styles"].values()}
    for info in index["styles"].values():
        files[info["file"]].add(info["group"])
    assert files["openmoji.webp"] == {"openmoji"} and files["extra.webp"] == {"extra"}


def test_an_atlas_of_another_size_is_refused(tmp_path, sprites):
    (tmp_path / "index.json").write_text((ASSETS / "index.json").read_text(encoding="utf-8"))
    for name in ("sprites.webp", "openmoji.webp", "extra.webp"):
        Image.new("RGBA", (96, 96)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"96x96 pixels, but index.json places .*rebuild"):
        Sprites.load(tmp_path)
