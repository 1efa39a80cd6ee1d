"""The bundled artwork: complete, apart by licence, and what its index says."""

from __future__ import annotations

import numpy as np
import pytest

from nanomolmo2.data.emoji.sprites import (
    ASSETS,
    CATEGORIES,
    PLURALS,
    STYLE_GROUPS,
    Sprites,
    article,
)

ALL_STYLES = [style for styles in STYLE_GROUPS.values() for style in styles]


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return Sprites.load()


def test_style_groups_are_disjoint_and_complete(sprites):
    assert len(set(ALL_STYLES)) == len(ALL_STYLES)
    assert {style for _, style in sprites.images} == set(ALL_STYLES)
    assert STYLE_GROUPS["mild"] == ("twemoji",) and STYLE_GROUPS["openmoji"] == ("openmoji",)
    assert len(STYLE_GROUPS["seen"]) == 6


def test_held_out_styles_have_every_category_and_seen_ones_nearly(sprites):
    assert len(CATEGORIES) == 64
    for i in range(len(CATEGORIES)):
        styles = sprites.styles_of(i)
        assert {"twemoji", "openmoji"} <= set(styles)
        assert len(styles) >= len(ALL_STYLES) - 1


def test_every_drawing_fills_its_cell(sprites):
    """Sizes in scenes mean the drawing's extent only if all are cropped alike."""
    for key in sprites.images:
        alpha = sprites.rgba(*key)[..., 3]
        rows, columns = np.flatnonzero(alpha.max(1) >= 16), np.flatnonzero(alpha.max(0) >= 16)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert sprites.size - 5 <= extent <= sprites.size, key
        assert (alpha >= 128).mean() > 0.08, f"{key} is nearly empty"


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
    for style in ALL_STYLES:
        (row,) = [line for line in attribution.splitlines() if line.startswith(f"| `{style}`")]
        licence = row.split("](")[1].split(")")[0]
        assert len((ASSETS / licence).read_text(encoding="utf-8")) > 1000


def test_share_alike_artwork_is_in_a_file_of_its_own_and_all_is_small():
    sizes = {path.name: path.stat().st_size for path in ASSETS.glob("*.webp")}
    assert set(sizes) == {"sprites.webp", "openmoji.webp"}
    assert sum(sizes.values()) < 3e6


def test_an_atlas_of_another_size_is_refused(tmp_path, sprites):
    from PIL import Image

    (tmp_path / "index.json").write_text((ASSETS / "index.json").read_text(encoding="utf-8"))
    for name in ("sprites.webp", "openmoji.webp"):
        Image.new("RGBA", (96, 96)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"96x96 pixels, but index.json places .*rebuild"):
        Sprites.load(tmp_path)
