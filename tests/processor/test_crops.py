"""Crops: golden values of the reference, a slow plain twin, and what people's pictures do to them.

The golden values and where they come from: tests/data/README.md.
"""

import hashlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanomolmo2.processor import MultiCrop
from nanomolmo2.processor.crops import pool_windows, resize
from tests.processor.helpers import golden, golden_picture

IMAGES = golden()["images"]
SMALL = MultiCrop(4, image_size=56, overlap_margins=(1, 1))


def noise(width, height):
    """The same picture for a size, whatever was tested before."""
    rng = np.random.default_rng((width, height))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_uint8(pixel_values):
    return np.rint((pixel_values * 0.5 + 0.5) * 255).astype(np.uint8)


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- the reference ----


@pytest.mark.parametrize(
    "expected",
    IMAGES,
    ids=lambda e: f"{e['width']}x{e['height']}-{e.get('max_crops', 8)}",
)
def test_golden_pictures_bit_for_bit(expected):
    crops = MultiCrop(max_crops=expected.get("max_crops", 8))
    cut = crops(golden_picture(expected["width"], expected["height"]))
    pixels, pooling = cut["pixel_values"], cut["image_token_pooling"]
    assert pixels.shape == (expected["crops"], 729, 588) and pixels.dtype == np.float32
    assert pooling.shape == (expected["image_tokens"], 4) and pooling.dtype == np.int64
    assert cut["image_grid"].tolist() == expected["grid"] and cut["image_grid"].dtype == np.int64
    assert (pooling == -1).sum() == expected["empty_slots"]
    assert sha256(pooling.astype(np.int32)) == expected["pooling_sha256"]
    assert sha256(as_uint8(pixels)) == expected["pixels_u8_sha256"]
    for crop, patch, element, value in expected["pixels_sample"]:
        assert pixels[crop, patch, element] == pytest.approx(value, abs=1e-6)
    assert crops.image_grid(expected["width"], expected["height"]) == tuple(expected["grid"])


def test_golden_pixels_do_not_depend_on_the_number_of_threads():
    """Three channels resized at once once gave other rounded halves on one thread."""
    expected = IMAGES[0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            cut = MultiCrop()(golden_picture(expected["width"], expected["height"]))
            assert sha256(as_uint8(cut["pixel_values"])) == expected["pixels_u8_sha256"]
    finally:
        torch.set_num_threads(before)


def test_against_transformers():
    """More sizes than the golden ones, where torchvision happens to be installed."""
    pytest.importorskip("torchvision", reason="transformers' processor needs torchvision")
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

    reference = Molmo2ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    sizes = [(1, 1), (800, 50), (50, 800), (112, 600), (112, 112), (641, 377), (900, 1200)]
    for (width, height), max_crops in itertools.product(sizes, (1, 7, 24)):
        picture = noise(width, height)
        cut = MultiCrop(max_crops)(picture)
        theirs = reference(Image.fromarray(picture), max_crops=max_crops, return_tensors="pt")
        assert (cut["image_token_pooling"] == theirs["image_token_pooling"].numpy()).all()
        assert (cut["image_grid"] == theirs["image_grids"][0].numpy()).all()
        difference = np.abs(
            as_uint8(cut["pixel_values"]) * 1.0 - as_uint8(theirs["pixel_values"].numpy())
        )
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-4  # halves, on one thread


# ---- a slow plain twin ----


def plain_tiling(crops, width, height):
    """The rule in words: the least enlargement, or else the least reduction; ties to the first."""
    tilings = [
        (i, j)
        for i in range(1, crops.max_crops + 1)
        for j in range(1, crops.max_crops + 1)
        if i * j <= crops.max_crops
    ]
    tilings.sort(key=lambda t: (t[0] * t[1], t[0]))
    window = np.float32(crops.window_size)

    def scale(i, j):
        sides = [(i, height - crops.margin_size), (j, width - crops.margin_size)]
        return min(
            math.inf if side == 0 else float(np.float32(n) * window / np.float32(side))
            for n, side in sides
        )

    large = [tiling for tiling in tilings if scale(*tiling) >= 1]
    if large:
        return min(large, key=lambda tiling: scale(*tiling))
    return max(tilings, key=lambda tiling: scale(*tiling))


def plain_cut(crops, picture):
    """Crops and index with loops over tiles, patches, pixels and windows."""
    rows, cols = plain_tiling(crops, picture.shape[1], picture.shape[0])
    side, patch, window = crops.patches_per_side, crops.patch_size, crops.window_size
    margin = crops.margin_size
    overview, canvas = resize(
        picture,
        (crops.image_size, crops.image_size),
        (rows * window + margin, cols * window + margin),
    )
    tiles = [overview]
    for i, j in itertools.product(range(rows), range(cols)):
        top, left = i * window, j * window
        tiles.append(canvas[top : top + crops.image_size, left : left + crops.image_size])
    patches = [
        [
            tile[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(-1)
            for r, c in itertools.product(range(side), range(side))
        ]
        for tile in tiles
    ]
    # Which tile a patch of the canvas is taken from: the last one in which it is not in the margin.
    step, first = window // patch, crops.overlap_margins[0]

    def owner(position, count):
        return max(k for k in range(count) if k == 0 or position >= k * step + first)

    def windows(height, width, index_of):
        size = crops.pooling_size
        tall, wide = math.ceil(height / size), math.ceil(width / size)
        top, left = (tall * size - height) // 2, (wide * size - width) // 2
        for i, j in itertools.product(range(tall), range(wide)):
            yield [
                index_of(r, c) if 0 <= r < height and 0 <= c < width else -1
                for r in range(i * size - top, (i + 1) * size - top)
                for c in range(j * size - left, (j + 1) * size - left)
            ]

    def detail(r, c):
        i, j = owner(r, rows), owner(c, cols)
        return side * side * (1 + i * cols + j) + (r - i * step) * side + (c - j * step)

    height, width = canvas.shape[0] // patch, canvas.shape[1] // patch
    index = [*windows(side, side, lambda r, c: r * side + c), *windows(height, width, detail)]
    return np.array(patches), np.array(index)


def plain_configs():
    sizes = st.sampled_from([(14, 14), (28, 14), (56, 14), (70, 14), (24, 4)])

    @st.composite
    def config(draw):
        image_size, patch_size = draw(sizes)
        side = image_size // patch_size
        left = draw(st.integers(0, side - 1))
        right = draw(st.integers(0, side - 1 - left))
        pooling = draw(st.integers(1, 4))
        return MultiCrop(
            draw(st.integers(1, 24)), image_size, patch_size, (left, right), pooling_size=pooling
        )

    return config()


@given(crops=plain_configs(), width=st.integers(1, 400), height=st.integers(1, 400))
@settings(deadline=None, max_examples=100)
def test_equals_the_plain_twin(crops, width, height):
    picture = noise(width, height)
    cut = crops(picture)
    patches, index = plain_cut(crops, picture)
    assert (as_uint8(cut["pixel_values"]) == patches).all()
    assert (cut["image_token_pooling"] == index).all()
    low_rows, low_cols, rows, cols = cut["image_grid"]
    assert low_rows * low_cols + rows * cols == len(index)


@given(width=st.integers(1, 9000), height=st.integers(1, 9000), max_crops=st.integers(1, 24))
@settings(deadline=None, max_examples=300)
def test_tiling_of_the_released_size(width, height, max_crops):
    crops = MultiCrop(max_crops)
    tiling = crops.tiling(width, height)
    assert tiling == plain_tiling(crops, width, height)
    assert 1 <= tiling[0] * tiling[1] <= max_crops


@given(crops=plain_configs(), width=st.integers(1, 300), height=st.integers(1, 300))
@settings(deadline=None, max_examples=100)
def test_every_patch_of_the_canvas_is_pooled_once(crops, width, height):
    rows, cols = crops.tiling(width, height)
    index = crops(noise(width, height))["image_token_pooling"]
    used = index[index >= 0]
    assert len(set(used.tolist())) == len(used)
    overview = used < crops.num_patches
    assert overview.sum() == crops.num_patches
    patches = (n * crops.window_size + crops.margin_size for n in (rows, cols))
    assert (~overview).sum() == math.prod(p // crops.patch_size for p in patches)


# ---- traps: where a plausible version differs silently ----


def test_trap_02_every_overview_has_55_empty_slots():
    """27 is odd: 27 windows reach over the border, at the bottom and on the right."""
    index = MultiCrop()(noise(384, 384))["image_token_pooling"][:196]
    windows = (index == -1).reshape(14, 14, 4)
    assert windows.sum() == 55
    assert windows.any(axis=2).sum() == 27
    assert windows[:-1, -1].tolist() == [[False, True, False, True]] * 13
    assert windows[-1, :-1].tolist() == [[False, False, True, True]] * 13
    assert windows[-1, -1].tolist() == [False, True, True, True]


def test_trap_05_patch_vector_runs_row_column_channel():
    picture = noise(56, 56)
    overview = as_uint8(SMALL(picture)["pixel_values"][0])
    for row, col in ((0, 0), (1, 2), (3, 3)):
        patch = picture[row * 14 : row * 14 + 14, col * 14 : col * 14 + 14]
        vector = overview[row * 4 + col]
        assert vector.tolist() == patch.reshape(-1).tolist()
        assert vector[:6].tolist() == [*patch[0, 0], *patch[0, 1]]


def test_trap_06_resize_is_bilinear_without_antialias_and_rounds_half_to_even():
    picture = noise(333, 217)
    (small,) = resize(picture, (56, 101))
    planes = torch.from_numpy(picture).permute(2, 0, 1)[:, None].float()
    expected = F.interpolate(planes, (56, 101), mode="bilinear", align_corners=False)
    assert (small == expected[:, 0].permute(1, 2, 0).round().numpy()).all()
    smooth = F.interpolate(planes, (56, 101), mode="bilinear", antialias=True)
    assert (small != smooth[:, 0].permute(1, 2, 0).round().numpy()).mean() > 0.5
    # Halving takes the mean of four pixels: 0.5, 1.5 and 2.5 become 0, 2 and 2.
    halves = np.array([[0, 1, 1, 2, 2, 3]] * 2, dtype=np.uint8)[:, :, None].repeat(3, axis=2)
    assert resize(halves, (1, 3))[0][0, :, 0].tolist() == [0, 2, 2]


def test_trap_06_resize_by_hand():
    """The four nearest pixels in float64: equal but for what lies within a float of a half."""
    picture = noise(47, 83)
    (result,) = resize(picture, (120, 31))
    height, width = picture.shape[:2]

    def taps(size, out):
        source = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, None)
        low = np.minimum(source.astype(int), size - 1)
        return low, np.minimum(low + 1, size - 1), source - low

    top, bottom, down = taps(height, 120)
    left, right, across = taps(width, 31)
    values = picture.astype(np.float64)
    down, across = down[:, None, None], across[None, :, None]
    upper = values[top][:, left] * (1 - across) + values[top][:, right] * across
    lower = values[bottom][:, left] * (1 - across) + values[bottom][:, right] * across
    exact = upper * (1 - down) + lower * down
    # A place of up to 83 is off by 5e-6 as a float, times a difference of up to 255.
    clear = np.abs(exact - np.floor(exact) - 0.5) > 2e-3
    assert clear.mean() > 0.99
    assert (result == np.rint(exact))[clear].all()
    assert np.abs(result - exact).max() < 0.5001


def test_trap_07_384_pixels_are_not_one_crop_and_378_are_two():
    assert MultiCrop().tiling(384, 384) == (2, 2)
    assert MultiCrop().tiling(378, 378) == (1, 1)
    cut = MultiCrop()(noise(384, 384))
    assert len(cut["pixel_values"]) == 5 and len(cut["image_token_pooling"]) == 725
    small = MultiCrop()(noise(100, 100))["pixel_values"]
    assert len(small) == 2 and (small[0] == small[1]).all()


def test_trap_19_budget_is_8_crops_as_shipped_and_24_in_published_results():
    assert MultiCrop().max_crops == 8
    assert MultiCrop().tiling(1920, 1080) == (2, 4)
    assert MultiCrop(max_crops=24).tiling(1920, 1080) == (4, 6)


@pytest.mark.parametrize(
    ("width", "height", "tiling"),
    [
        (800, 50, (1, 1)),  # 3 tiles in Molmo2's training code
        (50, 800, (1, 1)),
        (112, 600, (2, 1)),
        (600, 112, (1, 2)),
        (112, 112, (1, 1)),
        (1, 1, (1, 1)),
        (1, 5000, (1, 1)),
        (5000, 1, (1, 1)),
    ],
)
def test_trap_20_small_sides_follow_the_hugging_face_layout(width, height, tiling):
    assert MultiCrop().tiling(width, height) == tiling
    cut = MultiCrop()(noise(width, height))
    assert len(cut["pixel_values"]) == 1 + tiling[0] * tiling[1]
    assert np.isfinite(cut["pixel_values"]).all()


# ---- pictures of every kind, frames, configs ----


def test_kinds_of_pictures():
    rgb = noise(90, 60)
    expected = SMALL(rgb)
    gray = rgb[:, :, 0]
    opaque = np.concatenate([rgb, np.full((60, 90, 1), 255, dtype=np.uint8)], axis=2)
    png = io.BytesIO()
    Image.fromarray(rgb).save(png, "PNG")
    for picture in (Image.fromarray(rgb), opaque, Image.fromarray(opaque), png.getvalue()):
        assert (SMALL(picture)["pixel_values"] == expected["pixel_values"]).all()
    of_gray = SMALL(gray)["pixel_values"]
    assert (of_gray == SMALL(gray[:, :, None].repeat(3, axis=2))["pixel_values"]).all()
    clear = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
    assert (SMALL(clear)["pixel_values"] == 1).all()  # transparent is white


def test_exif_rotation_is_applied_before_the_tiling():
    wide = Image.fromarray(noise(90, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    file = io.BytesIO()
    wide.save(file, "PNG", exif=exif)
    turned = SMALL(file.getvalue())
    upright = SMALL(wide.transpose(Image.Transpose.ROTATE_270))
    assert SMALL(wide)["image_grid"].tolist() != upright["image_grid"].tolist()
    for name, values in upright.items():
        assert (turned[name] == values).all()


def test_values_are_normalised_channel_by_channel():
    crops = MultiCrop(
        1, 14, overlap_margins=(0, 0), image_mean=(0.1, 0.5, 0.9), image_std=(0.5, 1.0, 2.0)
    )
    picture = np.full((14, 14, 3), (0, 255, 51), dtype=np.uint8)
    pixels = crops(picture)["pixel_values"]
    assert pixels.shape == (2, 1, 588)
    expected = [(0 - 0.1) / 0.5, (1 - 0.5) / 1.0, (0.2 - 0.9) / 2.0]
    assert pixels.reshape(-1, 3) == pytest.approx(np.array([expected] * 392), abs=1e-6)


def test_a_frame_is_made_as_an_overview_is():
    picture = noise(90, 60)
    assert (SMALL.frame(picture) == SMALL(picture)["pixel_values"][0]).all()


@pytest.mark.parametrize(("width", "height"), [(56, 56), (200, 80), (90, 170)])
def test_tiles_are_what_comes_behind_the_overview(width, height):
    image = noise(width, height)
    cut = SMALL(image)
    low_rows, low_cols, *grid = cut["image_grid"].tolist()
    tiles, windows, found = SMALL.tiles(image)
    assert np.array_equal(tiles, cut["pixel_values"][1:])
    assert list(found) == grid
    behind = cut["image_token_pooling"][low_rows * low_cols :]
    assert (behind >= 0).any() and len(windows) == len(behind)
    assert np.array_equal(windows[behind >= 0], behind[behind >= 0] - SMALL.num_patches)
    assert (windows[behind < 0] == -1).all()


def test_pooling_windows():
    windows, rows, cols = pool_windows(np.arange(6).reshape(2, 3), 2)
    assert (rows, cols) == (1, 2)
    assert windows.tolist() == [[0, 1, 3, 4], [2, -1, 5, -1]]
    windows, rows, cols = pool_windows(np.arange(729).reshape(27, 27), 3)
    assert (rows, cols) == (9, 9) and windows.min() == 0
    assert windows[10].tolist() == [84, 85, 86, 111, 112, 113, 138, 139, 140]
    # Two too many: one before, one after.
    assert pool_windows(np.array([[7]]), 3)[0].tolist() == [[-1, -1, -1, -1, 7, -1, -1, -1, -1]]


def test_results_do_not_share_memory_with_later_ones():
    picture = noise(90, 60)
    first = SMALL(picture)
    expected = first["image_token_pooling"].copy()
    first["image_token_pooling"] += 1000
    assert (SMALL(picture)["image_token_pooling"] == expected).all()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_crops": 0}, "max_crops must be at least 1"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"pooling_size": -1}, "pooling_size must be at least 1"),
        ({"image_size": 384}, r"image_size \(384\) must be a multiple of patch_size \(14\)"),
        ({"overlap_margins": (-1, 4)}, "must not be negative"),
        ({"overlap_margins": (13, 14)}, "at least one of the 27 patches"),
        ({"image_size": 56}, "at least one of the 4 patches"),
        ({"image_std": (0.5, 0.0, 0.5)}, "image_std"),
    ],
)
def test_configs_that_are_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        MultiCrop(**fields)


def test_config_as_json():
    assert MultiCrop.from_dict(SMALL.to_dict()) == SMALL


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (641, 479), (1300, 7), (2000, 1500)])
@pytest.mark.parametrize("sizes", [((56, 56),), ((378, 378), (900, 644)), ((1, 1), (7, 3))])
def test_only_rows_that_are_looked_at_are_copied(monkeypatch, size, sizes):
    """The result of all rows, bit for bit, whether the image is copied in bands or not."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    plane = torch.from_numpy(pixels).permute(2, 0, 1).float()
    expected = []
    for wanted in sizes:
        values = [
            F.interpolate(channel[None, None], wanted, mode="bilinear", align_corners=False)[0, 0]
            for channel in plane
        ]
        whole = torch.stack(values, -1).round_().clamp_(0, 255).to(torch.uint8)
        expected.append(whole.numpy())
    for band in (1 << 22, 1000):
        monkeypatch.setattr("nanomolmo2.processor.crops._BAND", band)
        for source in (pixels, Image.fromarray(pixels)):
            for found, whole in zip(resize(source, *sizes), expected, strict=True):
                assert (found == whole).all()
