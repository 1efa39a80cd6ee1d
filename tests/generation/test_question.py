"""Questions: images in every form that people have them in, and what is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.generation.question import Question, as_list, read_question
from nanomolmo2.processor import load_image
from tests.generation.test_vlm import noise, small_vlm
from tests.small_model import small_processor

IMAGE = noise(0, 30, 20)
PIXELS = np.asarray(IMAGE)  # (20, 30, 3)
SHARES = PIXELS.astype(np.float32) / 255
GREY = PIXELS[:, :, 0]


def png() -> bytes:
    stream = io.BytesIO()
    IMAGE.save(stream, "PNG")
    return stream.getvalue()


def read(images: Any) -> list[np.ndarray]:
    """As RGB, (H, W, 3) uint8, what the processor will see."""
    question = read_question(Question("Dogs?", images), context=512)
    return [np.asarray(load_image(image)) for image in question.images]


FORMS: dict[str, Any] = {
    "PIL": IMAGE,
    "bytes": png(),
    "open file": io.BytesIO(png()),
    "array": PIXELS,
    "array, channels first": PIXELS.transpose(2, 0, 1),
    "array of floats": SHARES,
    "array of doubles, channels first": SHARES.astype(np.float64).transpose(2, 0, 1),
    "array with alpha": np.dstack([PIXELS, np.full((20, 30), 255, dtype=np.uint8)]),
    "tensor": torch.from_numpy(PIXELS.copy()),
    "tensor, channels first": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "tensor of floats": torch.from_numpy(SHARES).permute(2, 0, 1),
    "tensor with a gradient": torch.from_numpy(SHARES).permute(2, 0, 1).requires_grad_(),
    "a batch of one": torch.from_numpy(SHARES).permute(2, 0, 1)[None],
    "a batch of one, as an array": PIXELS[None],
    "a list": [PIXELS],
    "a tuple": (IMAGE,),
}


@pytest.mark.parametrize("given", FORMS.values(), ids=FORMS)
def test_an_image_is_the_same_in_all_forms(given: Any) -> None:
    if isinstance(given, io.BytesIO):
        given.seek(0)
    (found,) = read(given)
    np.testing.assert_array_equal(found, PIXELS)


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(png())
    for given in (path, str(path), f"file://{path}".replace(" ", "%20")):
        (found,) = read(given)
        np.testing.assert_array_equal(found, PIXELS)
    messages: Any = [{"role": "user", "content": [{"type": "image", "path": str(path)}]}]
    (shown,), _ = read_question(Question(messages), context=512).shown()
    np.testing.assert_array_equal(np.asarray(load_image(shown)), PIXELS)


def test_data_urls() -> None:
    text = base64.b64encode(png()).decode()
    (found,) = read(f"data:image/png;base64,{text}")
    np.testing.assert_array_equal(found, PIXELS)
    video = Question("Dogs?", video=f"data:video/mp4;base64,{text}")
    assert read_question(video, context=512).video == png()
    with pytest.raises(ValueError, match="the question holds a data URL that cannot be read"):
        read("data:image/png;base64,???")


@pytest.mark.parametrize(
    "given",
    [
        GREY,
        GREY[None],
        GREY[:, :, None],
        torch.from_numpy(GREY.copy()),
        torch.from_numpy(GREY.copy())[None],
        torch.from_numpy(GREY.copy()).float() / 255,
    ],
    ids=["(H, W)", "(1, H, W)", "(H, W, 1)", "tensor", "tensor (1, H, W)", "floats"],
)
def test_grey_is_the_same_in_all_channels(given: Any) -> None:
    (found,) = read(given)
    np.testing.assert_array_equal(found, np.dstack([GREY] * 3))


def test_sixteen_bit_floats_are_near() -> None:
    (found,) = read(torch.from_numpy(SHARES).permute(2, 0, 1).bfloat16())
    assert np.abs(found.astype(int) - PIXELS).max() <= 1


def test_a_batch_is_its_images_in_order() -> None:
    batch = np.stack([PIXELS, 255 - PIXELS])
    for given in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), list(batch)):
        first, second = read(given)
        np.testing.assert_array_equal(first, PIXELS)
        np.testing.assert_array_equal(second, 255 - PIXELS)
    assert as_list(None) == [] and as_list("a.png") == ["a.png"]


def test_parts_of_messages_take_the_same_forms() -> None:
    processor = small_processor()
    wanted = processor.encode([{"role": "user", "content": "Dogs?"}], [IMAGE])
    for given in FORMS.values():
        if isinstance(given, (list, tuple)) or getattr(given, "ndim", 3) == 4:
            continue
        if isinstance(given, io.BytesIO):
            given.seek(0)
        content = [{"type": "image", "image": given}, {"type": "text", "text": "Dogs?"}]
        messages: Any = [{"role": "user", "content": content}]
        found = read_question(Question(messages), context=512)
        encoded = processor.encode(found.messages, found.images)
        np.testing.assert_array_equal(encoded.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(encoded.pixel_values, wanted.pixel_values)
        images, video = found.shown()
        assert video is None
        np.testing.assert_array_equal(np.asarray(load_image(images[0])), PIXELS)


def test_normalised_pixels_stay_as_they_are() -> None:
    """The base design takes (3, S, S) floats around 0."""
    pixels = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
    for given in (pixels, torch.from_numpy(pixels)):
        (image,) = read_question(Question("Dogs?", given), context=512).images
        np.testing.assert_array_equal(np.asarray(image), pixels)
        encoded = small_processor().encode([{"role": "user", "content": "?"}], [image])
        np.testing.assert_array_equal(encoded.pixel_values, pixels[None])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 20, 30), r"shape \(2, 20, 30\), expected an image: \(H, W, 3\)"),
        (np.zeros((20, 30, 5)), r"shape \(20, 30, 5\), expected an image"),
        (torch.zeros(7), r"shape \(7,\), expected an image"),
        (torch.full((3, 20, 30), float("nan")), "holds nan or inf"),
        (np.full((20, 30, 3), np.inf), "holds nan or inf"),
        (torch.zeros(3, 0, 30), "(?i)pixel|empty|size|shape"),
        (torch.zeros(3, 20, 30, dtype=torch.int64), "int64"),
        (torch.full((3, 20, 30), -3.0), "3, 64, 64|0 to 1|0..1|shape"),
        (b"no image", "."),
        (b"", "."),
        ("http://127.0.0.1/a.png", "nothing is downloaded here"),
        ("data:image/png,abc", "data URL that cannot be read"),
        (Path("missing.png"), "there is no file"),
        (object(), "object"),
        ([IMAGE, 3], "int"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(given: Any, message: str) -> None:
    vlm = small_vlm()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        vlm.stream(given, "Dogs?")
    assert "\n" not in str(refused.value)
    assert vlm.scheduler._thread is None  # nothing was begun
    content: Any = [{"type": "image", "image": given}, {"type": "text", "text": "Dogs?"}]
    if not isinstance(given, list):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            vlm.stream(None, [{"role": "user", "content": content}])


def test_addresses_are_fetched_only_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    import nanomolmo2.remote

    asked = []

    def fetch(address: str, **limits: Any) -> bytes:
        asked.append(address)
        return png()

    monkeypatch.setattr(nanomolmo2.remote, "fetch", fetch)
    address = "https://example.org/a.png"
    url = {"type": "image_url", "image_url": {"url": address}}
    text = {"type": "text", "text": "Dogs?"}
    ours = {"type": "image", "url": address}
    told: list[Any] = [[{"role": "user", "content": [part, text]}] for part in (url, ours)]
    allowed, refused = small_vlm(allow_remote=True), small_vlm()
    wanted = allowed.ask(IMAGE, "Dogs?", max_new_tokens=4).text
    assert asked == []
    assert allowed.ask(address, "Dogs?", max_new_tokens=4).text == wanted
    for messages in told:
        assert allowed.ask(None, messages, max_new_tokens=4).text == wanted
    assert asked == [address] * 3
    chat = allowed.chat(address)
    assert chat.ask("Dogs?", max_new_tokens=4).text == wanted
    chat.ask("Cats?", max_new_tokens=4)
    assert len(asked) == 4  # once for all turns
    answer = allowed.ask(address, "Dogs?", max_new_tokens=4)
    answer.draw()
    assert len(asked) == 5  # not again to draw on it
    with pytest.raises(ValueError, match="allow_remote=True"):
        refused.ask(address, "Dogs?")
    for question in (
        lambda: refused.ask(address, "Dogs?"),
        *(lambda m=m: refused.ask(None, m) for m in told),
    ):
        with pytest.raises(ValueError):
            question()
    assert len(asked) == 5
    with pytest.raises(ValueError, match="nothing is downloaded here"):
        allowed.ask("ftp://example.org/a.png", "Dogs?")


def test_an_open_file_may_be_closed_once_it_was_asked_about() -> None:
    stream = io.BytesIO(png())
    answer = small_vlm().ask(stream, "Dogs?", max_new_tokens=2)
    stream.close()
    drawn = answer.draw()
    assert isinstance(drawn, Image.Image) and drawn.size == (30, 20)
