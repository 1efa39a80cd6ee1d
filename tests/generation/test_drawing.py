"""Answers that draw themselves: files, notebooks, dictionaries."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.vlm import VLM
from nanomolmo2.processor.config import VideoConfig
from nanomolmo2.processor.draw import draw_points
from nanomolmo2.processor.video import Video
from tests.generation.test_vlm import SCENE, noise, scripted
from tests.small_model import ScriptedModel

TEXT = '<points coords="1 1 500 500;2 2 250 250">dog</points>'


def test_an_image_with_its_points(tmp_path: Path) -> None:
    answer = VLM("tiny").point(SCENE, "snail")
    drawn = answer.draw(tmp_path / "out.png")
    assert isinstance(drawn, Image.Image)
    wanted = draw_points(Image.open(SCENE), answer.points)
    assert drawn.tobytes() == wanted.tobytes()
    changed = np.asarray(drawn) != np.asarray(Image.open(SCENE).convert("RGB"))
    rows, cols = changed.any(axis=2).nonzero()
    (snail,) = answer.points
    assert rows.min() <= snail.y <= rows.max() and cols.min() <= snail.x <= cols.max()
    assert Image.open(tmp_path / "out.png").tobytes() == wanted.tobytes()
    for suffix in (".jpg", ".webp"):
        answer.draw(str(tmp_path / f"out{suffix}"))
        assert Image.open(tmp_path / f"out{suffix}").size == (192, 192)


def test_several_images_have_files_of_their_own(tmp_path: Path) -> None:
    images = [noise(0), noise(1, 100, 50)]
    answer = scripted(TEXT).ask(images, "Point to the dogs.")
    drawn = answer.draw(tmp_path / "out.png")
    assert isinstance(drawn, list) and [image.size for image in drawn] == [(64, 64), (100, 50)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.png", "out-2.png"]
    for number, image in enumerate(images, start=1):
        wanted = draw_points(image, answer.points, number=number)
        assert drawn[number - 1].tobytes() == wanted.tobytes()
        assert Image.open(tmp_path / f"out-{number}.png").tobytes() == wanted.tobytes()


def of_video() -> Answer:
    tag = '<points coords="0.0 1 500 500;0.5 2 250 250">dog</points>'
    model = ScriptedModel(tag)
    config = replace(model.processor.config, video=VideoConfig())
    vlm = VLM(model, type(model.processor)(config, model.processor.tokenizer))
    frames = Video(tuple(np.asarray(noise(n, 80, 40)) for n in range(2)), (0.0, 0.5))
    return vlm.ask(None, "Point to the dogs.", video=frames)


def test_a_video_becomes_an_animated_gif(tmp_path: Path) -> None:
    answer = of_video()
    frames = answer.draw(tmp_path / "out.gif")
    assert isinstance(frames, list) and [frame.size for frame in frames] == [(80, 40)] * 2
    assert frames[0].getpixel((40, 20)) != noise(0, 80, 40).getpixel((40, 20))
    with Image.open(tmp_path / "out.gif") as written:
        assert (written.n_frames, written.size) == (2, (80, 40))
    with pytest.raises(ValueError, match=r"its name must end with \.gif"):
        answer.draw(tmp_path / "out.png")


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    answer = scripted("Yes.").ask(None, "Is it?")
    with pytest.raises(ValueError, match="about no picture"):
        answer.draw()
    answer = scripted("Yes.").ask(noise(0), "Is it?")
    for name in ("out", "out.gif", "out.txt", ".png"):
        with pytest.raises(ValueError, match=r"its name must end with \.png, \.jpg"):
            answer.draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_notebooks_show_images_and_text(tmp_path: Path) -> None:
    answer = scripted(TEXT).ask([noise(0, 1600, 400), noise(1)], "Point to <dogs>.")
    html = answer._repr_html_()
    files = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    sizes = [Image.open(io.BytesIO(base64.b64decode(file))).size for file in files]
    assert sizes == [(800, 200), (64, 64)]
    assert "&lt;points coords=" in html and "<points" not in html
    png = answer._repr_png_()
    assert png is not None and Image.open(io.BytesIO(png)).size == (800, 200)
    for other in (scripted("Yes.").ask(None, "Is it?"), of_video()):
        assert other._repr_png_() is None and "<img" not in other._repr_html_()
    path = tmp_path / "gone.png"
    noise(0).save(path)
    answer = scripted("Yes.").ask(path, "Is it?")
    path.unlink()
    assert answer._repr_html_() == "<div><p>Yes.</p></div>"
    with pytest.raises(FileNotFoundError):
        answer.draw()


def test_an_answer_as_json() -> None:
    answer = scripted(TEXT).ask([noise(0), noise(1, 100, 50)], "Point to the dogs.")
    found: dict[str, Any] = json.loads(json.dumps(answer.to_dict()))
    assert found.pop("timings").keys() == {"prepare", "first_token", "generate"}
    first, second = found.pop("points")
    assert first["x"] == 32 and first["y_thousandths"] == 500 and first["image"] == 1
    assert (second["x"], second["y"], second["label"]) == (25, 12.5, "dog")
    assert found == {
        "text": TEXT,
        "count": 2,
        "problems": [],
        "confidence": 1.0,
        "images": [{"width": 64, "height": 64}, {"width": 100, "height": 50}],
        "video": None,
        "finish_reason": "stop",
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        "reused_tokens": 0,
    }
