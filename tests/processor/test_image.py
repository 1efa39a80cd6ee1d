"""Pictures: what people have becomes RGB; preprocessing equals transformers'; bad files say so."""

import io
import os
import struct
import subprocess
import sys
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
    "text.png": (b"Once upon a time there was a picture.\n", "found text, expected a picture"),
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
    "noise.bin": (b"\x00\x01\x02\x03\xff\xfe" * 20, "found unknown data, expected"),
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


# ---- notes beside the pixels ----


def chunk(kind, data, check=None):
    check = zlib.crc32(kind + data) if check is None else check
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


MEGABYTES = bytes(3 << 20)
PNG_NOTES = {
    "profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(MEGABYTES)),
    "damaged profile": chunk(b"iCCP", b"name\0\7no zlib"),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(MEGABYTES)),
    "zTXt of another kind": chunk(b"zTXt", b"Comment\0\7abc"),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(MEGABYTES)),
    "tEXt": chunk(b"tEXt", b"Comment\0" + MEGABYTES, check=1),
    "checksum of a text": chunk(b"tEXt", b"Comment\0hello", check=7),
    "checksum of a size": chunk(b"pHYs", bytes(9), check=7),
    "checksum of EXIF": chunk(b"eXIf", b"MM\0*" + bytes(20), check=7),
    "checksum of a transparency": chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3), check=7),
    "checksum of an unknown kind": chunk(b"abCd", b"?", check=7),
    "short gamma": chunk(b"gAMA", b"\0"),
    "short transparency": chunk(b"tRNS", b"\0"),
}


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize("name", PNG_NOTES)
def test_notes_of_a_png_do_not_make_its_pixels_worse(name, place):
    """Pillow refuses notes that unpack to over 1 MB, and every wrong checksum."""
    data = encoded(Image.fromarray(smooth(40, 24)), "PNG")
    cut = 33 if place == "before the pixels" else len(data) - 12
    with_note = data[:cut] + PNG_NOTES[name] + data[cut:]
    assert (pixels(with_note) == smooth(40, 24)).all()


def test_a_png_stays_upright_and_on_white_when_another_note_is_taken_out():
    rgb = Image.fromarray(smooth(40, 24))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(rgb, "PNG", exif=exif, transparency=(0, 0, 0))
    with_note = data[:33] + PNG_NOTES["profile"] + data[33:]
    assert (pixels(with_note) == pixels(data)).all()
    assert pixels(with_note).shape == (40, 24, 3) and (pixels(with_note)[0, -1] == 255).all()
    text = PNG_NOTES["iTXt"]  # the turn may stand in a text too
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    plain = encoded(rgb, "PNG")
    assert pixels(plain[:33] + turned + plain[33:]).shape == (40, 24, 3)
    assert pixels(plain[:33] + turned + text + plain[33:]).shape == (40, 24, 3)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
def test_a_wrong_checksum_where_pixels_depend_on_it_stays_an_error(kind):
    data = bytearray(encoded(Image.fromarray(smooth(40, 24)).quantize(8), "PNG"))
    place = data.find(kind)
    length = struct.unpack_from(">I", data, place - 4)[0]
    data[place + 4 + length] ^= 1
    with pytest.raises(ValueError, match="found a damaged PNG file"):
        load_image(bytes(data))


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


JPEG_NOTES = {
    "profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "short JFIF": segment(0xE0, b"JFIF"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "Photoshop": segment(0xED, b"Photoshop 3.0\0008BIM\4\4"),
    "several pictures": segment(0xE2, b"MPF\0MM\0*" + bytes(8)),
    "EXIF": segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=''"),
    "comment": segment(0xFE, b"\xff\xff\xff"),
}


@pytest.mark.parametrize("name", JPEG_NOTES)
def test_notes_of_a_jpeg_do_not_make_its_pixels_worse(name):
    data = encoded(Image.fromarray(smooth(40, 24)), "JPEG")
    assert (pixels(data[:20] + JPEG_NOTES[name] + data[20:]) == pixels(data)).all()


@pytest.mark.parametrize("kind", [b"ICCP", b"EXIF", b"XMP "])
def test_notes_of_a_webp_do_not_make_its_pixels_worse(kind):
    """A note that is longer than the file says, or than the file."""
    image = Image.fromarray(smooth(40, 24))
    plain = pixels(encoded(image, "WEBP", lossless=True))
    note = {"ICCP": "icc_profile", "EXIF": "exif", "XMP ": "xmp"}[kind.decode()]
    data = bytearray(encoded(image, "WEBP", lossless=True, **{note: b"0123456789"}))
    assert (pixels(bytes(data)) == plain).all()
    if kind != b"ICCP":  # the others come after the pixels
        struct.pack_into("<I", data, data.find(kind, 20) + 4, 1 << 20)
        assert (pixels(bytes(data)) == plain).all()


def test_notes_of_a_tiff_do_not_make_its_pixels_worse():
    image = Image.fromarray(smooth(40, 24))
    data = encoded(image, "TIFF", icc_profile=b"0123456789", compression="tiff_lzw")
    start, entries = struct.unpack_from("<I", data, 4)[0], []
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        entries.append((struct.unpack_from("<H", data, place)[0], place))
    place = dict(entries)[34675]
    for kind, length, offset in ((7, 1 << 30, 8), (7, 10, 1 << 31), (12, 10, 8), (99, 1, 0)):
        damaged = bytearray(data)
        struct.pack_into("<HII", damaged, place + 2, kind, length, offset)
        assert (pixels(bytes(damaged)) == smooth(40, 24)).all()


# ---- white, and what is transparent ----


@pytest.mark.parametrize("most", [1, 100, 255, 256, 1000, 65535])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("written", [False, True])
def test_a_pnm_has_its_own_white(most, channels, written):
    values = np.arange(12 * channels).reshape(3, 4 * channels) * most // (12 * channels - 1)
    kind = {(1, False): 5, (3, False): 6, (1, True): 2, (3, True): 3}[channels, written]
    header = b"P%d\n# white is \\\n4 3 # size\n%d\n" % (kind, most)
    if written:
        body = b"# values\n" + "\n".join(" ".join(map(str, row)) for row in values).encode()
    else:
        body = values.astype(np.uint8 if most < 256 else ">u2").tobytes()
    expected = np.rint(values / most * 255).astype(np.uint8).reshape(3, 4, channels)
    assert (pixels(header + body) == np.broadcast_to(expected, (3, 4, 3))).all()
    assert expected.max() == 255
    for short in (header, header + body[: len(body) // 2]):
        with pytest.raises(
            ValueError, match=r"PPM data cannot be decoded \((it ends before|.*truncated)"
        ):
            load_image(short)


def test_small_16_bit_values_are_dark_in_a_pgm():
    """Pillow gives them as 32-bit values, which were taken for 0..255."""
    assert pixels(b"P5 2 1 65535\n" + struct.pack(">HH", 200, 0))[0, 0].tolist() == [1, 1, 1]
    image = Image.open(io.BytesIO(b"P5 2 1 65535\n" + struct.pack(">HH", 200, 257 * 9)))
    assert pixels(image)[0, :, 0].tolist() == [1, 9]


def test_a_bitmap_written_as_text():
    assert pixels(b"P1\n3 2\n101\n# 1 is black\n0 1 1")[..., 0].tolist() == [
        [0, 255, 0],
        [255, 0, 0],
    ]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"P2\n2 1\n9\n1 x", "not a number from 0"),
        (b"P2\n2 1\n9\n1 -2", "not a number from 0"),
        (b"P1\n2 1\n1 2", "not 0 or 1"),
        (b"P5\n2 1\n0\n12", "its white is 0"),
        (b"P5\n2 1\n70000\n12", "its white is 70000"),
        (b"P5\n2", "its header is not complete"),
        (b"P5 " + b"#" * 5000 + b"\n1 1 255\n1", "its header is not complete"),
        (b"P2 9000 9000 9\n", "found 9000 x 9000 pixels, expected at most 8000000"),
        (b"P6 90000 90000 9\n", "found 90000 x 90000 pixels, expected at most"),
    ],
)
def test_damaged_pnm(data, error):
    with pytest.raises(ValueError, match=error):
        load_image(data)


def png_of(values, bits, colour, transparency):
    """A PNG of any depth: rows of bytes as they are stored."""
    height, length = values.shape
    channels = {0: 1, 2: 3}[colour]
    header = struct.pack(">IIBBBBB", length * 8 // bits // channels, height, bits, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = [(b"IHDR", header), (b"tRNS", transparency), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [*chunks, (b"IEND", b"")])


def test_the_transparent_value_of_gray():
    values = np.array([[0, 300, 512, 65535]], dtype=">u2").view(np.uint8)
    read = pixels(png_of(values, 16, 0, struct.pack(">H", 300)))
    assert read[0, :, 0].tolist() == [0, 255, 2, 255]
    assert pixels(png_of(values, 16, 0, struct.pack(">H", 0)))[0, :, 0].tolist() == [255, 1, 2, 255]
    eight = np.array([[0, 7, 255]], dtype=np.uint8)
    assert pixels(png_of(eight, 8, 0, b"\0\7"))[0, :, 0].tolist() == [0, 255, 255]
    four = np.array([[0x03, 0x5F]], dtype=np.uint8)  # 0 3 5 15
    assert pixels(png_of(four, 4, 0, b"\0\5"))[0, :, 0].tolist() == [0, 51, 255, 255]
    two = np.array([[0b00011011]], dtype=np.uint8)
    assert pixels(png_of(two, 2, 0, b"\0\1"))[0, :, 0].tolist() == [0, 255, 170, 255]


def test_the_transparent_colour_of_16_bits_is_told_by_all_of_them():
    """Two colours may differ in the low bytes alone, which Pillow leaves out."""
    colours = np.array([[[0x0102, 0x0304, 0x0506], [0x0102, 0x0304, 0x0507], [0x02, 4, 6]]], ">u2")
    data = png_of(colours.reshape(1, -1).view(np.uint8), 16, 2, colours[0, 0].tobytes())
    assert pixels(data)[0].tolist() == [[255, 255, 255], [1, 3, 5], [0, 0, 0]]
    none = png_of(colours.reshape(1, -1).view(np.uint8), 16, 2, bytes(6))
    assert pixels(none)[0].tolist() == [[1, 3, 5], [1, 3, 5], [0, 0, 0]]


# ---- sources ----


def test_file_addresses(tmp_path):
    path = tmp_path / "a b#%ä.png"
    Image.fromarray(smooth(8, 6)).save(path)
    for address in (path.as_uri(), path.as_uri().replace("file://", "file://localhost")):
        assert (pixels(address) == smooth(8, 6)).all()
    assert (pixels(f"FILE:{path.as_uri()[7:]}") == smooth(8, 6)).all()
    with pytest.raises(FileNotFoundError, match=r"there is no file /nowhere/x\.png"):
        load_image("file:///nowhere/x.png")
    for address in ("file://elsewhere/x.png", "file:", "file://"):
        with pytest.raises(ValueError, match="expected a file of this computer"):
            load_image(address)


def test_open_files_are_read_whole_and_stay_as_they_were(tmp_path):
    data = encoded(Image.fromarray(smooth(8, 6)), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for stream in (io.BytesIO(data), path.open("rb"), path.open("rb", buffering=0)):
        with stream:
            stream.seek(5)
            for _ in range(2):
                assert (pixels(stream) == smooth(8, 6)).all()
                assert stream.tell() == 5 and not stream.closed
            assert stream.read(3) == data[5:8]
            assert getattr(stream, "raw", True) is not None  # not detached
    with path.open("rb") as stream, pytest.raises(ValueError, match="the given file: found 8 x 6"):
        load_image(stream, max_pixels=5)
    with path.open(encoding="latin-1") as stream, pytest.raises(ValueError, match="mode 'rb'"):
        load_image(stream)
    with pytest.raises(ValueError, match="the given file cannot be read"):
        load_image(stream)  # it is closed by now


def test_a_stream_that_cannot_be_wound_back():
    class Pipe:
        def __init__(self, data):
            self.read = io.BytesIO(data).read

        def seekable(self):
            return False

    data = encoded(Image.fromarray(smooth(8, 6)), "PNG")
    assert (pixels(Pipe(data)) == smooth(8, 6)).all()


@pytest.mark.parametrize("source", ["", " ", b""])
def test_nothing_in_place_of_a_picture(source):
    error = "found an empty name, expected the path of a picture" if source != b"" else "0 bytes"
    with pytest.raises(ValueError, match=error):
        load_image(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "link.png")
    for source in (tmp_path / "pipe.png", tmp_path / "link.png", "/proc/self/environ"):
        with pytest.raises(ValueError, match="is not a regular file: give the path of a picture"):
            load_image(source)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel", "WMV"),
        (b"\0\0\1\xba" + bytes(20), "MPEG"),
        (b"\0\0\1\xb3" + bytes(20), "MPEG"),
        ((bytes(4) + b"G" + bytes(187)) * 20, "MPEG transport stream"),
        ((b"G" + bytes(187)) * 20, "MPEG transport stream"),
        (bytes(50) + (b"G" + bytes(187)) * 20, "MPEG transport stream"),
        (b"\0\0\0\x18stypmsdh" + bytes(20), "MP4 or MOV"),
        (b"FLV\1" + bytes(20), "FLV"),
        (b"\x1aE\xdf\xa3" + bytes(20), "Matroska or WebM"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI"),
        (b"OggS" + bytes(20), "Ogg"),
    ],
)
def test_a_video_in_place_of_a_picture_is_called_one(head, kind):
    error = rf"found a video or sound \({kind}\), expected a picture .*give a video as a video"
    with pytest.raises(ValueError, match=error):
        load_image(head)


# ---- memory ----


@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
def test_large_pictures_are_converted_in_bands(monkeypatch, colour):
    mode = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}[colour]
    image = Image.fromarray(noise(37, 29, 4)).convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = 5
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    data = encoded(image, "PNG", exif=exif, **options)
    whole = pixels(data)
    monkeypatch.setattr("nanomolmo2.processor.image._BAND", 100)
    assert (pixels(data) == whole).all()


@pytest.mark.parametrize("mode", ["1", "I;16", "I", "F", "CMYK", "LAB", "YCbCr", "HSV"])
def test_other_modes_are_converted_in_bands(monkeypatch, mode):
    image = Image.fromarray(noise(37, 29))
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((noise(37, 29, 0).astype(np.float64) * 100 - 7).astype(dtype))
    else:
        image = Image.frombytes(mode, (32, 29), noise(32 * 4, 29, 0).tobytes()[: 32 * 29 * 4])
    assert image.mode == mode
    whole = pixels(image)
    monkeypatch.setattr("nanomolmo2.processor.image._BAND", 100)
    assert (pixels(image) == whole).all()


@pytest.mark.parametrize(
    ("width", "height", "bits", "colour", "error"),
    [
        (12_000, 12_000, 8, 0, "at most 143165576"),
        (12_000, 12_000, 1, 0, "at most 143165576"),
        (11_000, 11_000, 16, 0, "at most 119304646"),
        (9_500, 9_500, 8, 4, "at most 89478485"),
        (9_500, 9_500, 16, 6, "at most 89478485"),
        (1, 178_956_970, 1, 0, "at most 143165576"),
        (1, 140_000_000, 1, 0, "no side over 262144"),
        (300_000, 1, 8, 2, "no side over 262144"),
    ],
)
def test_less_is_allowed_where_decoding_takes_more_memory(width, height, bits, colour, error):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(ValueError, match=f"{width} x {height} pixels, expected .*{error}"):
        load_image(data)
    Image.new("LA", (20, 10)).save(stream := io.BytesIO(), "PNG")
    assert load_image(stream.getvalue(), max_pixels=200).size == (20, 10)


PEAK = """
import resource, sys
from nanomolmo2.processor import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_image(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["F", "RGBA", "1"])
def test_memory_at_the_limit(tmp_path, mode):
    """0.7 GB and what a band takes, where it was 2.5 to 4.9 GB."""
    resource = pytest.importorskip("resource")
    assert resource
    side = 9_400 if mode != "1" else 11_900
    path = tmp_path / "a.tif"
    Image.new(mode, (side, side)).save(path, compression="tiff_lzw")
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 900e6


def test_scans_of_a_progressive_jpeg_are_counted():
    """A small file may have thousands, and each goes over all pixels."""
    data = encoded(Image.new("RGB", (3000, 2000)), "JPEG", progressive=True)
    assert load_image(data).size == (3000, 2000)
    start, end = data.rfind(b"\xff\xda"), len(data) - 2
    many = data[:end] + data[start:end] * 300 + data[end:]
    with pytest.raises(ValueError, match="found 310 scans of 3000 x 2000 pixels, expected at most"):
        load_image(many)
