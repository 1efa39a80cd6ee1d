"""Pictures: what people have becomes RGB; preprocessing equals transformers'; bad files say so."""

import io
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from nanomolmo2.processor import load_image, preprocess

ORIENTATION = 0x0112


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(width, height):
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + y) % 256], -1)
    return rgb.astype(np.uint8)


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixels(source):
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- formats ----


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("JPEG", {"quality": 98, "subsampling": 0}, 6),
        ("JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 6),
        ("WEBP", {"quality": 100}, 24),
    ],
)
def test_formats_by_path_bytes_and_image(tmp_path, format, options, tolerance):
    original = smooth(40, 24)
    data = encoded(Image.fromarray(original), format, **options)
    path = tmp_path / "picture"  # no suffix: the content decides
    path.write_bytes(data)
    read = pixels(path)
    assert read.shape == (24, 40, 3)
    assert np.abs(read.astype(int) - original).max() <= tolerance
    for source in (str(path), data, bytearray(data), memoryview(data), Image.open(path)):
        assert (pixels(source) == read).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_several(format):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_rotation(format, orientation):
    """A camera held upright writes a lying picture and a note; top left of what we see is red."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = [255, 0, 0]
    upright[:8, 16:] = [0, 255, 0]
    upright[8:, 16:] = [0, 0, 255]
    turn_back = {  # numpy's words for the inverse of each orientation
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    if format == "JPEG":
        options = {"quality": 98, "subsampling": 0}
    stored = Image.fromarray(np.ascontiguousarray(turn_back))
    data = encoded(stored, format, exif=exif, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert image.size == (32, 16)
        difference = np.abs(np.asarray(image).astype(int) - upright)
        assert difference.max() <= (8 if format == "JPEG" else 0)
        # Reading it again must not turn it again.
        assert (np.asarray(load_image(image)) == np.asarray(image)).all()
    pillow = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (np.asarray(pillow.convert("RGB")) == np.asarray(load_image(data))).all()


def test_damaged_exif_does_not_keep_the_picture_from_loading():
    image = Image.new("RGB", (8, 8), "red")
    for exif in (b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00", b"Exif\x00\x00MM\x00"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_image(encoded(image, "PNG", exif=exif)).size == (8, 8)
        assert not caught


# ---- transparency and colour ----


def test_alpha_is_composited_on_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    expected = [[[255] * 3, [127] * 3, [0] * 3]]
    image = Image.fromarray(rgba)
    for source in (rgba, image, encoded(image, "PNG"), encoded(image, "WEBP", lossless=True)):
        assert pixels(source).tolist() == expected
    assert pixels(image.convert("LA")).tolist() == expected
    for mode in ("RGBa", "La"):
        premultiplied = Image.new(mode, (1, 1), (64,) * (len(mode) - 1) + (128,))
        assert abs(pixels(premultiplied).astype(int) - (64 + 127)).max() <= 1


def test_palette_with_and_without_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    assert pixels(encoded(image, "PNG")).tolist() == [[red, green, blue]]
    assert pixels(encoded(image, "GIF")).tolist() == [[red, green, blue]]
    assert pixels(encoded(image, "GIF", transparency=1)).tolist() == [[red, white, blue]]
    assert pixels(encoded(image, "PNG", transparency=1)).tolist() == [[red, white, blue]]
    with warnings.catch_warnings(record=True) as caught:  # Pillow likes to warn about this one
        warnings.simplefilter("always")
        alphas = encoded(image, "PNG", transparency=bytes([255, 0, 255]))
        assert pixels(alphas).tolist() == [[red, white, blue]]
    assert not caught
    rgb = Image.fromarray(np.array([[red, green]], dtype=np.uint8))
    assert pixels(encoded(rgb, "PNG", transparency=(0, 255, 0))).tolist() == [[red, white]]


def test_grayscale_bits_and_cmyk():
    gray = np.array([[0, 128, 255]], dtype=np.uint8)
    rgb = np.repeat(gray[:, :, None], 3, axis=2)
    for source in (gray, gray[:, :, None], encoded(Image.fromarray(gray), "PNG")):
        assert (pixels(source) == rgb).all()
    bits = np.array([[True, False]])
    expected = [[[255] * 3, [0] * 3]]
    assert pixels(bits).tolist() == expected
    assert pixels(encoded(Image.fromarray(bits), "PNG")).tolist() == expected
    cmyk = Image.fromarray(smooth(32, 32)).convert("CMYK")
    for data in (encoded(cmyk, "JPEG", quality=98), encoded(cmyk, "TIFF")):
        difference = np.abs(pixels(data).astype(int) - smooth(32, 32))
        assert difference.mean() < 6
    for mode in ("YCbCr", "HSV", "LAB", "RGBX", "PA"):
        assert load_image(Image.new(mode, (4, 2))).size == (4, 2)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(format):
    """Pillow's own conversion makes everything above 255 white."""
    values = np.array([[0, 257, 128 * 257, 65535, 65535 - 257]], dtype=np.uint16)
    expected = [0, 1, 128, 255, 254]
    for source in (values, encoded(Image.fromarray(values), format), Image.fromarray(values)):
        assert pixels(source)[0].tolist() == [[v] * 3 for v in expected]


def test_32_bit_values_by_what_they_hold():
    def first_channel(values, dtype):
        data = encoded(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")
        return pixels(data)[0, :, 0].tolist()

    assert first_channel([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert first_channel([0, 100.4, 255], np.float32) == [0, 100, 255]
    assert first_channel([0, 257, 65535], np.float32) == [0, 1, 255]
    assert first_channel([-1, 0, 1], np.float32) == [0, 128, 255]
    assert first_channel([np.nan, 0.5, 1], np.float32) == [0, 128, 255]
    assert first_channel([np.nan, np.inf], np.float32) == [0, 0]
    assert first_channel([0, 1, 255], np.int32) == [0, 1, 255]
    assert first_channel([0, 257, 65535], np.int32) == [0, 1, 255]
    assert first_channel([-1000, 0, 1000], np.int32) == [0, 128, 255]
    assert first_channel([7, 7], np.int32) == [7, 7]
    assert first_channel([70000, 70000], np.int32) == [0, 0]


def test_arrays():
    rgb = noise(5, 4)
    assert (pixels(rgb) == rgb).all()
    assert (pixels(rgb.astype(np.float32) / 255) == rgb).all()
    assert (pixels(rgb.astype(np.uint16) * 257) == rgb).all()
    assert (pixels(rgb[::-1, ::-1]) == rgb[::-1, ::-1]).all()
    assert (pixels(np.asfortranarray(rgb)) == rgb).all()


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (noise(5, 4).transpose(2, 0, 1), r"shape \(3, 4, 5\), expected \(H, W\)"),
        (noise(5, 4, 2), r"shape \(4, 5, 2\)"),
        (noise(5, 4)[None], r"shape \(1, 4, 5, 3\)"),
        (np.zeros(5, dtype=np.uint8), r"shape \(5,\)"),
        (np.zeros((0, 5, 3), dtype=np.uint8), r"shape \(0, 5, 3\)"),
        (noise(5, 4).astype(np.float32), r"float array with values 0? ?.* expected 0 .. 1"),
        (np.full((2, 2), -0.5), "values -0.5 .. -0.5, expected 0 .. 1"),
        (np.full((2, 2), np.nan), "values nan .. nan, expected 0 .. 1"),
        (noise(5, 4).astype(np.int64), "array of int64, expected uint8"),
        (np.zeros((2, 2), dtype=object), "array of object"),
    ],
)
def test_arrays_that_are_refused(array, error):
    with pytest.raises(ValueError, match=error):
        load_image(array)


def test_the_given_image_is_not_changed():
    image = Image.fromarray(noise(5, 4, 4))
    before = image.tobytes()
    load_image(image)
    assert image.tobytes() == before and image.mode == "RGBA"


# ---- bad input: one clear error ----


def png(width, height, idat=b""):
    """The beginning of a PNG with any size in its header."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"
BAD_FILES = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "JPEG data cannot be decoded .*truncated"),
    "start.jpg": (JPEG[:20], "found a damaged JPEG file"),
    "truncated.png": (encoded(Image.fromarray(noise(64, 64)), "PNG")[:5000], "cannot be decoded"),
    "huge.png": (png(50_000, 50_000), "found 2500000000 pixels, expected at most 178956970"),
    "large.png": (png(13_000, 13_800), "found .* pixels, expected at most"),
    "no_data.png": (png(8, 8), "PNG data cannot be decoded"),
    "wrong_data.png": (png(8, 8, zlib.compress(b"abc")), "PNG data cannot be decoded"),
    "text.png": (b"Once upon a time there was a picture.\n", "found text .'Once upon a time the'"),
    "empty.png": (b"", r"found an empty file \(0 bytes\)"),
    "drawing.png": (b'<?xml version="1.0"?><svg xmlns="x"></svg>', "found an SVG drawing"),
    "paper.jpg": (b"%PDF-1.7 ...", "found a PDF document"),
    "phone.jpg": (HEIC, "found a HEIC picture of type 'heic'"),
    "film.png": (b"\x00\x00\x00\x18ftypisom\x00\x00", "found a video or picture of type 'isom'"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
    "zip.png": (b"PK\x03\x04 ...", "found a zip archive"),
    "eps.png": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "found text",
    ),
    "noise.bin": (b"\x00\x01\x02\x03\xff\xfe" * 20, "found unknown data .00 01 02 03"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    data, error = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    for source in (path, data):
        start = time.perf_counter()
        with (
            warnings.catch_warnings(record=True) as caught_warnings,
            pytest.raises(ValueError, match=error) as caught,
        ):
            warnings.simplefilter("always")
            load_image(source)
        assert not caught_warnings
        assert "\n" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        if source is path:
            assert str(path) in str(caught.value)
        assert time.perf_counter() - start < 2  # nothing of that size was decoded


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.png") as caught:
        load_image(tmp_path / "missing.png")
    assert caught.value.__suppress_context__
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="is not a regular file"):
        load_image("/dev/zero")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image("x" * 5000)
    for address in ("https://example.com/a.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ValueError, match="found the address"):
            load_image(address)


@pytest.mark.parametrize("source", [None, 7, ["a.png"], {"image": 1}])
def test_sources_of_other_types(source):
    with pytest.raises(ValueError, match=f"from {type(source).__name__}: give a path"):
        load_image(source)


def test_max_pixels_counts_before_decoding():
    picture = noise(20, 10)
    sources = (picture, Image.fromarray(picture), encoded(Image.fromarray(picture), "PNG"))
    for source in sources:
        assert load_image(source, max_pixels=200).size == (20, 10)
        with pytest.raises(ValueError, match="found 20 x 10 pixels, expected at most 199"):
            load_image(source, max_pixels=199)


SEEDS = [
    encoded(Image.fromarray(smooth(24, 16)), "PNG"),
    encoded(Image.fromarray(smooth(24, 16)), "JPEG"),
    encoded(Image.fromarray(smooth(24, 16)), "WEBP"),
    encoded(Image.fromarray(smooth(24, 16)).quantize(8), "GIF"),
    encoded(Image.fromarray(smooth(24, 16)), "BMP"),
    encoded(Image.fromarray(smooth(24, 16)), "TIFF", compression="tiff_lzw"),
]


@given(st.sampled_from(SEEDS), st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_damaged_bytes_give_a_picture_or_a_clear_error(data, draw):
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    damaged = (
        damaged[: draw.draw(st.integers(0, len(damaged)))] if draw.draw(st.booleans()) else damaged
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = load_image(damaged, max_pixels=1_000_000)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("the given bytes")
        else:
            assert image.mode == "RGB"


def test_threads_leave_the_warning_filters_as_they_were():
    """catch_warnings in two threads at once once left warnings off for good."""
    data = encoded(Image.fromarray(noise(200, 200)), "PNG")
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [load_image(data) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


# ---- preprocessing ----

SHAPES = [(384, 384), (640, 480), (480, 640), (1000, 300), (17, 900), (1, 1), (5, 3), (385, 383)]


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("transformers")
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    def run(image, image_size, resample="bicubic", **options):
        processor = SiglipImageProcessorPil(
            size={"height": image_size, "width": image_size},
            resample={"bilinear": 2, "bicubic": 3}[resample],
            **options,
        )
        return np.asarray(processor(image)["pixel_values"][0])

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [noise, smooth])
def test_preprocess_equals_transformers(reference, shape, make):
    image = Image.fromarray(make(*shape))
    result = preprocess(image)
    assert result.shape == (3, 384, 384) and result.dtype == np.float32
    np.testing.assert_array_equal(result, reference(image, 384))


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 192},
        {"image_size": 224, "resample": "bilinear"},
        {"image_size": 37, "image_mean": (0.48, 0.46, 0.41), "image_std": (0.27, 0.26, 0.28)},
        {"image_size": 32, "rescale_factor": 1 / 256},
    ],
)
def test_preprocess_options_equal_transformers(reference, options):
    image = Image.fromarray(noise(301, 203))
    np.testing.assert_array_equal(preprocess(image, **options), reference(image, **options))


def test_every_kind_of_picture_equals_transformers(reference):
    """Where transformers converts colours as we do: all 8-bit modes, with and without alpha."""
    rgba = Image.fromarray(noise(70, 50, 4))
    palette = Image.fromarray(smooth(70, 50)).quantize(16)
    transparent = Image.open(io.BytesIO(encoded(palette, "PNG", transparency=3)))
    kinds = [rgba, palette, transparent, Image.fromarray(noise(70, 50, 0))]
    kinds += [rgba.convert(mode) for mode in ("LA", "1", "CMYK", "YCbCr", "HSV", "PA")]
    kinds += [Image.open(io.BytesIO(JPEG))]
    for image in kinds:
        result = preprocess(load_image(image), image_size=48)
        np.testing.assert_array_equal(result, reference(image, 48), err_msg=image.mode)


def test_arrays_of_the_right_size_skip_the_resize():
    picture = noise(48, 48)
    expected = preprocess(Image.fromarray(picture), image_size=48)
    np.testing.assert_array_equal(preprocess(picture, image_size=48), expected)
    by_hand = (picture.astype(np.float64) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(expected, by_hand.transpose(2, 0, 1), atol=1e-6)
