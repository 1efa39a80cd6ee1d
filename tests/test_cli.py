"""The command line: what it prints, what it refuses, and that a refusal is one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import typing
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nanomolmo2 import cli, demo
from nanomolmo2.checks import save_image
from nanomolmo2.cli import ask
from nanomolmo2.cli.options import UsageError, check_ranges
from nanomolmo2.convert.parts import LLM, VISION
from nanomolmo2.convert.tensor_files import write_cache
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.sampling import SamplingParams
from nanomolmo2.models import ConnectorConfig, LanguageModel, NanoMolmo2, VisionEncoder
from nanomolmo2.processor import Point, Processor, ProcessorConfig, format_points
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.processor import LossWeighting, VideoConfig
from nanomolmo2.recipes import finetune
from scripts.make_demo_picture import make_demo
from tests.small_model import ScriptedModel, small_model, small_processor

TAG = '<points coords="1 1 210 455 2 640 480">dog</points>'


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    small_model().save_pretrained(folder, processor=small_processor())
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (100, 50), "green").save(path)
    return path


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedModel]:
    """``says(text, ...)``: every model answers with these texts."""

    def install(*texts: str) -> ScriptedModel:
        scripted = ScriptedModel(*texts)
        pipeline = Pipeline(scripted, scripted.processor)
        monkeypatch.setattr(ask, "load_pipeline", lambda name, cache_dir: pipeline)
        return scripted

    return install  # type: ignore[return-value]


class Refusal:
    """Runs command lines that must fail, each with one line on stderr and nothing written."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def __call__(self, *arguments: str | Path, code: int = 1) -> str:
        before = sorted(self.folder.rglob("*"))
        found = cli.main([str(a) for a in arguments])
        out, err = self.capsys.readouterr()
        assert (found, out) == (code, ""), err
        assert err.startswith("nanomolmo2: "), err
        assert err.count("\n") == 1, err
        assert sorted(self.folder.rglob("*")) == before
        return err


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refusal:
    monkeypatch.chdir(tmp_path)
    return Refusal(capsys, tmp_path)


# ---- ask ----


def test_ask_prints_the_answer_and_nothing_else(
    saved: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", str(picture), "Dogs?", "--model", str(saved), "--max-new-tokens", "5"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    expected = Pipeline.from_pretrained(saved).ask(picture, "Dogs?", max_new_tokens=5)
    assert out == expected.text + "\n"
    assert err == "on the CPU, float32\n"


def test_ask_json(says, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(f"Counting the {TAG} shows a total of 2.")
    assert cli.main(["ask", str(picture), "How many dogs?", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "tiny"
    assert report["question"] == "How many dogs?"
    assert report["text"] == f"Counting the {TAG} shows a total of 2."
    assert report["count"] == 2
    assert report["points"][1] == {
        "image": 1,
        "id": 2,
        "label": "dog",
        "x": 64.0,
        "y": 24.0,
        "x_thousandths": 640,
        "y_thousandths": 480,
    }
    assert report["images"] == [{"path": str(picture), "width": 100, "height": 50}]
    assert (report["video"], report["problems"]) == (None, [])
    assert set(report["timings"]) == {"load", "prepare", "first_token", "generate"}


def test_the_report_is_the_one_that_the_docs_show(says, picture: Path, capsys) -> None:
    says(f"There are 2 {TAG}.")
    cli.main(["ask", str(picture), "How many dogs?", "--json"])
    report = json.loads(capsys.readouterr().out)
    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = json.loads(text.split("```json\n")[1].split("```")[0])

    def keys(value: object) -> object:
        if isinstance(value, dict):
            return {k: keys(v) for k, v in value.items()}
        return [keys(v) for v in value[:1]] if isinstance(value, list) else None

    assert keys(shown) == keys(report)


def test_options_reach_the_model(says, picture: Path) -> None:
    scripted = says("Yes.")
    options = "--max-new-tokens=9 --temperature=0.5 --top-p=0.9 --top-k=7 --seed=3".split()  # noqa: SIM905
    assert cli.main(["ask", str(picture), "?", *options]) == 0
    (call,) = scripted.calls
    assert call["max_new_tokens"] == 9
    sampling = call["sampling"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
    assert (sampling.stop, sampling.constraint, call["lookup"]) == ((), None, True)


def test_more_options_reach_the_model(says, picture: Path, capsys) -> None:
    scripted = says("One, two, three")
    options = "--min-p=0.1 --repetition-penalty=1.2 --stop=five --no-lookup --well-formed-points"
    arguments = ["ask", str(picture), "?", *options.split(), "--stop", " two"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "One,\n"
    (call,) = scripted.calls
    sampling = call["sampling"]
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.stop, call["lookup"]) == (("five", " two"), False)
    assert sampling.constraint is not None


def test_draw(says, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(TAG)
    target = tmp_path / "out.png"
    assert cli.main(["ask", str(picture), "Point to the dogs.", "--draw", str(target)]) == 0
    out, err = capsys.readouterr()
    assert out == TAG + "\n"
    assert err == f"wrote {target}\n"
    with Image.open(target) as drawn:
        assert drawn.size == (100, 50)
        assert drawn.getpixel((99, 49)) == (0, 128, 0)
        assert drawn.getpixel((21, 23)) != (0, 128, 0)


def test_draw_on_several_pictures(says, picture: Path, tmp_path: Path) -> None:
    says('<points coords="2 1 500 500">dog</points>')
    target = tmp_path / "out.jpg"
    assert cli.main(["ask", str(picture), str(picture), "?", "--draw", str(target)]) == 0
    assert not target.exists()
    first, second = (Image.open(tmp_path / f"out-{i}.jpg").convert("L") for i in (1, 2))
    assert len(first.getcolors()) == 1
    assert len(second.getcolors()) > 1


def test_what_cannot_be_read_is_noted(says, picture: Path, capsys) -> None:
    says(TAG.replace("640 480", "64 480"), TAG.replace("640 480", "64 480"))
    assert cli.main(["ask", str(picture), "?"]) == 0
    out, err = capsys.readouterr()
    assert out == TAG.replace("640 480", "64 480") + "\n"
    assert err == "note: points tag 1: left out '2 64 480', group 1: not 'id x y'\n"
    assert cli.main(["ask", str(picture), "?", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["problems"] == [
        "points tag 1: left out '2 64 480', group 1: not 'id x y'"
    ]
    assert err == ""


# ---- ask: crops and videos ----


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """An animated GIF: 3 frames of 100 x 50 pixels, half a second each."""
    path = tmp_path / "clip.gif"
    frames = [Image.new("RGB", (100, 50), colour) for colour in ("green", "blue", "gray")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    return path


@pytest.fixture
def says_in_crops(says):
    """As ``says``, for a model of the Molmo2 design: 4 x 4 patches a crop, and videos."""

    def install(*texts: str) -> ScriptedModel:
        scripted = says(*texts)
        config = ProcessorConfig.molmo2(
            multicrop=MultiCrop(max_crops=4, image_size=64, patch_size=16, overlap_margins=(1, 1)),
            video=VideoConfig(max_frames=8, pooling_size=2),
        )
        scripted.processor = Processor(config, scripted.processor.tokenizer)
        ask.load_pipeline("scripted", Path()).processor = scripted.processor
        return scripted

    return install


def test_max_crops(says_in_crops, picture: Path) -> None:
    scripted = says_in_crops("Yes.", "Yes.")
    assert cli.main(["ask", str(picture), "?"]) == 0
    assert cli.main(["ask", str(picture), "?", "--max-crops", "1"]) == 0
    as_saved, fewer = (len(call["pixel_values"]) for call in scripted.calls)
    assert as_saved > fewer == 2  # the overview and one crop


def test_a_video(says_in_crops, clip: Path, tmp_path: Path, capsys) -> None:
    tag = '<points coords="0.0 1 500 500;0.5 2 200 200;1.5 3 500 500">dog</points>'
    scripted = says_in_crops(tag, tag)
    target = tmp_path / "out.gif"
    question = ("ask", str(clip), "Where?", "--video")
    assert cli.main([*question, "--json", "--draw", str(target)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["video"]["path"] == str(clip)
    assert (report["video"]["width"], report["video"]["height"]) == (100, 50)
    assert report["video"]["frame_times"] == [0.0, 0.5, 1.0, 1.5]
    assert report["images"] == []
    assert report["points"][1] == {
        "time": 0.5,
        "id": 2,
        "label": "dog",
        "x": 20.0,
        "y": 10.0,
        "x_thousandths": 200,
        "y_thousandths": 200,
    }
    with Image.open(target) as drawn:
        assert drawn.size == (100, 50)
        assert drawn.n_frames == 4
        drawn.seek(1)
        assert drawn.convert("RGB").getpixel((20, 13)) != (0, 0, 255)
    assert cli.main([*question, "--max-frames", "2"]) == 0
    every, two = (len(call["pixel_values"]) for call in scripted.calls)
    assert (every, two) == (4, 2)


def test_points_of_a_long_video_are_in_its_own_pixels(
    says_in_crops, clip: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Frames that do not fit into memory in their own size are drawn smaller; pixels of the answer
    and what the model sees are those of the video."""
    scripted = says_in_crops(*['<points coords="0.5 1 200 200">dog</points>'] * 2)
    question = ["ask", str(clip), "Where?", "--video", "--json", "--draw"]
    assert cli.main([*question, str(tmp_path / "own.gif")]) == 0
    monkeypatch.setattr("nanomolmo2.processor.video.MAX_VIDEO_BYTES", 4 * 3 * 100 * 50 // 4)
    assert cli.main([*question, str(tmp_path / "small.gif")]) == 0
    own, small = map(json.loads, capsys.readouterr().out.splitlines())
    assert small["points"] == own["points"] and small["video"] == own["video"]
    first, second = (call["pixel_values"] for call in scripted.calls)
    assert torch.equal(first, second)
    with Image.open(tmp_path / "small.gif") as drawn:
        assert drawn.size == (50, 25)
        drawn.seek(1)
        assert drawn.convert("RGB").getpixel((10, 5 + 2)) != (0, 0, 255)
        assert drawn.convert("RGB").getpixel((40, 20)) == (0, 0, 255)


def test_a_gif_is_a_picture_unless_video_is_said(says_in_crops, clip: Path, capsys) -> None:
    says_in_crops("Yes.")
    assert cli.main(["ask", str(clip), "?", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["video"] is None
    assert report["images"] == [{"path": str(clip), "width": 100, "height": 50}]


@pytest.mark.parametrize(("name", "kind"), [("a.MTS", "mpegts"), ("a.bin", "mp4")])
def test_a_video_is_told_by_its_content(says_in_crops, tmp_path: Path, capsys, name, kind) -> None:
    av = pytest.importorskip("av")
    says_in_crops("Yes.")
    with av.open(str(tmp_path / name), "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 100, 50, "yuv420p"
        image = av.VideoFrame.from_image(Image.new("RGB", (100, 50)))
        container.mux([packet for _ in range(6) for packet in stream.encode(image)])
        container.mux(stream.encode())
    address = (tmp_path / name).as_uri()
    assert cli.main(["ask", address, "?", "--json"]) == 0
    video = json.loads(capsys.readouterr().out)["video"]
    assert (video["path"], video["width"], video["height"]) == (address, 100, 50)


def test_a_label_that_cannot_be_drawn_is_told(
    says_in_crops, clip: Path, tmp_path: Path, capsys
) -> None:
    says_in_crops('<points coords="1 1 500 500">猫</points>')
    assert cli.main(["ask", str(clip), "Where?", "--draw", str(tmp_path / "out.png")]) == 0
    assert "note: label A in the drawing is '猫'" in capsys.readouterr().err


def test_what_crops_and_videos_need(
    refused: Refusal, saved: Path, picture: Path, clip: Path
) -> None:
    def ask(*arguments: str | Path, code: int = 2) -> str:
        return refused("ask", *arguments, "--model", saved, code=code)

    assert "expected pictures or one video" in ask(picture, "a.mp4", "?")
    assert "does not take videos" in ask(clip, "?", "--video")
    assert "--max-crops is for pictures" in ask(clip, "?", "--video", "--max-crops", "2")
    assert "--max-frames is for videos" in ask(picture, "?", "--max-frames", "2")
    assert "reads a picture as a whole" in ask(picture, "?", "--max-crops", "2")
    assert "expected one of .gif" in ask(clip, "?", "--video", "--draw", "out.png")
    assert "expected one of .png" in ask(picture, "?", "--draw", "out.gif")
    assert "there is no file a.MP4" in ask("a.MP4", "?", code=1)


def test_a_video_that_cannot_be_read_is_one_line(
    says_in_crops, refused: Refusal, tmp_path: Path
) -> None:
    says_in_crops()
    (tmp_path / "broken.gif").write_bytes(b"GIF89a and no more")
    assert "broken.gif" in refused("ask", "broken.gif", "?", "--video")
    assert "is a folder" in refused("ask", tmp_path, "?", "--video")


def test_where_nothing_can_be_drawn_is_found_before_any_work(
    refused: Refusal, tmp_path: Path
) -> None:
    """The picture does not exist either, but that would be found later."""
    ask = ("ask", "missing.png", "?", "--draw")
    assert "expected one of .png" in refused(*ask, "out.mp3", code=2)
    assert "no suffix" in refused(*ask, "out", code=2)
    assert "No such file or directory" in refused(*ask, "no/such/folder/out.png", code=2)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused(*ask, "folder.png", code=2)


# ---- wrong command lines ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Expected one of {ask, chat, info"),
        (["bogus"], "bogus"),
        (["ask", "a.png", "?", "--max-tokens", "3"], "perhaps --max-new-tokens?"),
        (["ask", "a.png", "?", "--top-p", "x"], "could not convert string to float"),
        (["ask", "a.png", "?", "--top-p", "0"], "--top-p must be above 0"),
        (["ask", "a.png", "?", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["ask", "a.png", "?", "--temperature", "nan"], "--temperature must be 0 or more"),
        (["ask", "a.png", "?", "--top-k", "-1"], "--top-k must be 0 or more"),
        (["ask", "a.png", "?", "--min-p", "2"], "--min-p must be 0 to 1, found 2.0"),
        (["ask", "a.png", "?", "--repetition-penalty", "0"], "--repetition-penalty must be above"),
        (["ask", "a.png", "?", "--stop", ""], "--stop must not be empty"),
        (["ask", "a.png", "?", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["ask", "a.png", "?", "--max-crops", "0"], "--max-crops must be 1 or more"),
        (["ask", "a.mp4", "?", "--max-frames", "0"], "--max-frames must be 1 or more"),
        (["ask"], "at least one picture and a question"),
        (["ask", "only a question"], "at least one picture and a question"),
        (["info"], "MODEL"),
        (["download", "--vision-only", "--llm-only"], "exclude each other"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, refused: Refusal
) -> None:
    assert said in refused(*arguments, code=2)


def test_a_forgotten_question(picture: Path, refused: Refusal) -> None:
    assert "is a file where the question was expected" in refused("ask", picture, picture, code=2)


# ---- bad pictures ----


def huge_png() -> bytes:
    """A PNG whose header promises 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def test_bad_pictures(refused: Refusal, saved: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 300), "red").save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    cases = {
        "truncated.jpg": (whole[: len(whole) // 2], "damaged or incomplete"),
        "huge.png": (huge_png(), "make the picture smaller"),
        "text.png": (b"not a picture at all", "expected a picture"),
        "empty.png": (b"", "empty file"),
    }
    for name, (data, said) in cases.items():
        (tmp_path / name).write_bytes(data)
        message = refused("ask", name, "What is this?", "--model", saved)
        assert name in message
        assert said in message
    assert "missing.png" in refused("ask", "missing.png", "What is this?", "--model", saved)
    assert "is a folder" in refused("ask", tmp_path, "What is this?", "--model", saved)


# ---- bad models ----


def spoil_json(path: Path, **fields: object) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **fields}), encoding="utf-8")


@pytest.fixture(params=["ask", "info"])
def refused_model(request: pytest.FixtureRequest, refused: Refusal, picture: Path):
    """Both commands that load a model, on a model that must be refused."""

    def run(name: str | Path, *options: str | Path) -> str:
        if request.param == "ask":
            return refused("ask", picture, "?", "--model", name, *options)
        return refused("info", name, *options)

    return run


def test_truncated_weights(refused_model, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refused_model(model)


def test_weights_of_a_wrong_shape(refused_model, model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["llm.norm.weight"] = torch.ones(31)
    save_file(tensors, path)
    message = refused_model(model)
    assert "llm.norm.weight" in message
    assert "31" in message


def test_a_config_with_an_unknown_field(refused_model, model: Path) -> None:
    spoil_json(model / "config.json", colour="blue")
    message = refused_model(model)
    assert "config.json" in message
    assert "colour" in message


def test_a_config_with_a_wrong_type(refused_model, model: Path) -> None:
    spoil_json(model / "config.json", image_token_id="many")
    message = refused_model(model)
    assert "config.json" in message
    assert "expected int, found 'many'" in message


def test_a_config_that_is_not_json(refused_model, model: Path) -> None:
    (model / "config.json").write_text("{", encoding="utf-8")
    assert "config.json is not valid JSON" in refused_model(model)


def test_a_name_that_is_no_model(refused_model) -> None:
    assert "there is no model 'small'" in refused_model("small")


class Bomb:
    """Pickles to a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_pickle_payload_is_not_run(how: str, refused_model, tmp_path: Path) -> None:
    trace = tmp_path / "it_was_run"
    cache = tmp_path / "cache"
    cache.mkdir()
    path = cache / VISION.cache_name
    if how == "torch.save":
        torch.save({"state_dict": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    assert VISION.cache_name in refused_model("base", "--cache-dir", cache)
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle goes off before torch complains
        torch.load(path, weights_only=False)  # the bomb is a real one
    assert trace.exists()


def test_a_pt_file_that_is_broken_or_something_else(refused: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "part.pt"
    path.write_bytes(b"PK\x03\x04 and no more")
    assert "part.pt" in refused("info", path)
    torch.save({"weight": torch.ones(3)}, path)
    assert "part.pt" in refused("info", path)


def test_a_cache_file_of_another_model(refused_model, tmp_path: Path) -> None:
    """The small vision encoder of some other project under SigLIP 2's name."""
    encoder = small_model().vision_encoder
    write_cache(
        tmp_path / VISION.cache_name,
        component="vision_encoder",
        config=encoder.config.to_dict(),
        source={"repo": "someone/else"},
        state_dict=encoder.state_dict(),
    )
    message = refused_model("base", "--cache-dir", tmp_path)
    assert "holds another model" in message
    assert "someone/else" in message


# ---- info ----


def test_info_of_a_model(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(saved)]) == 0
    out = capsys.readouterr().out
    count = sum(p.numel() for p in small_model().parameters())
    assert f"{count:,}" in out
    assert f"{count * 4 / 1e6:,.1f} MB" in out
    assert "stored as float32" in out
    assert "4 visual tokens" in out
    assert '"hidden_size": 32' in out


def test_info_of_a_preset_loads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty gigabytes in float32; only the sizes are looked at."""
    assert cli.main(["info", "molmo2-4b"]) == 0
    out = capsys.readouterr().out
    assert "4,850,869,200" in out
    assert "sizes only" in out
    assert "19,403.5 MB" in out


def test_info_of_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints in their reference formats, and a converted file."""
    config = small_model().config
    torch.manual_seed(0)
    encoder, llm = VisionEncoder(config.vision_config), LanguageModel(config.llm_config)
    llm_config = config.llm_config.to_dict()
    write_cache(
        tmp_path / "llm.pt",
        component=LLM.component,
        config=llm_config,
        source={},
        state_dict=llm.state_dict(),
    )
    tensors = VISION.config_to_reference(encoder.config)
    from nanomolmo2.convert.pretrained import save_pretrained

    save_pretrained(encoder, tmp_path / "siglip")
    assert tensors["model_type"].startswith("siglip")
    for name, part in (("siglip", encoder), ("llm.pt", llm)):
        assert cli.main(["info", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        count = sum(p.numel() for p in part.parameters())
        assert f"{type(part).__name__}: {count:,} parameters" in out


# ---- export ----


def test_export_and_ask_the_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = str(Path("nanomolmo2/assets/demo/scene.png").resolve())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "--format", "molmo2-hf", "tiny", "out"]) == 0
    out, err = capsys.readouterr()
    assert out == "wrote out\n"
    assert err.startswith(
        "warning: Molmo2's processor files can not say that a picture is one view"
    )
    assert err.endswith("\non the CPU, bfloat16\n")  # as it is stored
    assert "warning: Molmo2 has no part that finds by example: it is left out" in err
    assert err.count("\n") == 3
    answers = []
    for model in ("tiny", "out"):
        drawn = f"{model}.png"
        arguments = ["ask", "--model", model, scene, "Point to the snail.", "--draw", drawn]
        assert cli.main(arguments) == 0
        answers.append((capsys.readouterr().out, Path(drawn).read_bytes()))
    assert "<points" in answers[0][0]
    assert answers[0] == answers[1]
    assert cli.main(["info", "out"]) == 0
    assert "vit_layers" in capsys.readouterr().out


def test_export_splits_large_files(tmp_path: Path) -> None:
    assert cli.main(["export", "tiny", str(tmp_path / "out"), "--max-shard-size", "5MB"]) == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) == 4


def test_a_linear_model_is_not_exported(refused: Refusal, tmp_path: Path) -> None:
    """The error names what can be done instead."""
    config = small_model().config
    connector = ConnectorConfig(vision_dim=32, llm_dim=32, connector_type="linear")
    model = NanoMolmo2(dataclasses.replace(config, connector_config=connector))
    processor = small_processor()
    settings = dataclasses.replace(processor.config, image_tokens=16)
    processor = Processor(settings, processor.tokenizer)
    model.save_pretrained(tmp_path / "linear", processor=processor)
    err = refused("export", tmp_path / "linear", tmp_path / "out")
    assert "only express the attention-pooling connector" in err
    assert "save_pretrained" in err
    assert "connector_type 'pooling'" in err


@pytest.mark.parametrize("size", ["5", "big", "-1GB", "0GB"])
def test_export_wants_a_size(refused: Refusal, size: str) -> None:
    err = refused("export", "tiny", "out", f"--max-shard-size={size}", code=2)
    assert f"such as 5GB or 500MB, found {size}" in err


def test_export_into_a_file(refused: Refusal, picture: Path) -> None:
    assert "is a file: name a folder" in refused("export", "tiny", picture, code=2)


# ---- train and eval ----


def test_train_hands_its_options_on(monkeypatch, tmp_path: Path, capsys) -> None:
    from nanomolmo2.emoji import train

    calls = []

    def train_tiny(out: Path, **options: object) -> bool:
        calls.append((out, options))
        return len(calls) > 1

    monkeypatch.setattr(train, "train_tiny", train_tiny)
    arguments = ["train", "tiny", "--out", str(tmp_path), "--seed", "3", "--scale", "small"]
    assert cli.main([*arguments, "--stop-after", "5", "--workers", "0"]) == 0
    assert f"nanomolmo2 train tiny --out {tmp_path} --resume" in capsys.readouterr().out
    assert cli.main([*arguments, "--resume"]) == 0
    assert f"nanomolmo2 eval emoji --model {tmp_path / 'model'}" in capsys.readouterr().out
    (out, first), (_, second) = calls
    assert out == tmp_path
    assert (first["scale"], first["seed"], first["resume"]) == ("small", 3, False)
    assert (first["config"].stop_after, first["config"].workers) == (5, 0)
    assert second["resume"]
    assert second["config"].stop_after is None


def test_train_and_plot_and_ask(picture: Path, tmp_path: Path, capsys) -> None:
    """A person's own data to a model that answers, stopped in between."""
    lines = [
        {"image": str(picture), "question": f"Is there a dog {n}?", "answer": "Yes."} for n in "abc"
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = tmp_path / "small"
    small_model().save_pretrained(small, processor=small_processor())
    recipe = finetune([str(tmp_path / "my.jsonl")], str(small), steps=2)
    smaller = dataclasses.replace(
        recipe, name="mine", sequence_length=64, packing_buffer=2, dtype="float32", save_every=1
    )
    smaller.save(tmp_path / "mine.json")
    run = ["train", str(tmp_path / "mine.json"), "--out", str(tmp_path / "run"), "--workers", "0"]
    assert cli.main([*run, "--max-steps", "1"]) == 0
    assert f"go on with: nanomolmo2 train {tmp_path / 'mine.json'}" in capsys.readouterr().out
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--resume", "--workers", "0"]) == 0
    model = tmp_path / "run" / "model"
    assert f"wrote {model}" in capsys.readouterr().out
    steps = [
        json.loads(x)["step"] for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2]
    assert (
        cli.main(["ask", str(picture), "A dog?", "--model", str(model), "--max-new-tokens", "2"])
        == 0
    )
    curves = tmp_path / "curves.png"
    assert cli.main(["plot", str(tmp_path / "run"), "--out", str(curves)]) == 0
    assert Image.open(curves).size[0] > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a recipe or --data FILE"),
        (("smok",), "there is no recipe 'smok'"),
        (("tiny", "--data", "my.jsonl"), "are not for the recipe tiny"),
        (("smoke", "--scale", "small"), "--scale is for the recipe tiny"),
        (("smoke", "--lora"), "--lora is for finetune"),
        (("smoke", "--max-steps", "0"), "--max-steps must be 1 or more"),
        (("finetune",), "finetune needs data"),
    ],
)
def test_train_refuses(refused: Refusal, arguments: tuple[str, ...], message: str) -> None:
    code = 1 if "smok" in arguments else 2
    assert message in refused("train", *arguments, code=code)


def test_plot_of_nothing(refused: Refusal) -> None:
    assert "expected the folder of a training run" in refused("plot", "nowhere")
    assert "expected one of .png" in refused("plot", "nowhere", "--out", "curves.jpg", code=2)


def test_a_run_is_not_overwritten(refused: Refusal, tmp_path: Path) -> None:
    run = ["train", "tiny", "--out", "run", "--scale", "smoke", "--workers", "0"]
    assert cli.main([*run, "--stop-after", "1"]) == 0
    refused.capsys.readouterr()
    assert "already holds a run" in refused(*run)


def test_eval(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, folder = tmp_path / "scores.json", tmp_path / "report"
    arguments = ["eval", "emoji", "--model", str(saved), "--scenes", "2", "--json", str(target)]
    arguments += ["--tasks", "presence", "more", "--report", str(folder), "--failures", "3"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"seen \|\s+mild \|\s+openmoji \|", out)
    report = json.loads(target.read_text(encoding="utf-8"))
    assert (report["scenes"], set(report["groups"])) == (2, {"seen", "mild", "openmoji"})
    mild = report["groups"]["mild"]
    assert (mild["answers"]["presence"], mild["answers"]["pairs"]) == (4, 2)
    assert "track" not in mild["scores"] and "count" not in mild["scores"]
    low, high = mild["intervals"]["presence"]
    assert low <= mild["scores"]["presence"] <= high
    row = next(line for line in out.splitlines() if line.startswith("| presence"))
    assert row.split("|")[3].strip().startswith(f"{mild['scores']['presence']:.3f}"[1:])
    assert re.search(r"of 6 goals are met", out)
    assert f"wrote {folder / 'index.html'}" in out
    assert len(list(folder.glob("pictures/mild-*"))) == 3


def test_eval_finds_out_before_the_work_what_it_cannot_do(refused: Refusal) -> None:
    arguments = ("eval", "emoji", "--model", "no such model")
    assert "expected one of .json" in refused(*arguments, "--json", "scores.txt", code=2)
    assert "nothing can be written" in refused(*arguments, "--json", "no/folder/s.json", code=2)
    assert "choose from presence" in refused(*arguments, "--tasks", "guess", code=2)
    assert "--clips must be 0 or more" in refused(*arguments, "--clips", "-1", code=2)
    err = refused(*arguments, "--group", "mild", "--styles", "noto", code=2)
    assert "--styles: no style 'noto' in the art group 'mild'; it has twemoji" in err
    (refused.folder / "full").mkdir()
    (refused.folder / "full" / "mine.txt").touch()
    assert "full is not empty" in refused(*arguments, "--report", "full", code=2)


def test_choices_are_those_there_are() -> None:
    """The command line lists them itself: it must not import torch to answer --help."""
    from nanomolmo2.emoji.exam import TEST_GROUPS
    from nanomolmo2.emoji.plans import SCALES
    from nanomolmo2.things.train import SCALES as FIND_SCALES

    def choices(command: type, field: str) -> tuple[str, ...]:
        hint = typing.get_type_hints(command)[field]
        return typing.get_args(hint)

    assert choices(cli.Inspect, "loss_weighting") == typing.get_args(LossWeighting)
    assert set(choices(cli.Train, "scale")) == {*SCALES, *FIND_SCALES}
    assert set(choices(cli.Eval, "group")) == {*TEST_GROUPS, "all"}


# ---- demo ----


def test_demo(says, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every question and its answer in order, then a picture with the points of all answers."""
    scene = json.loads((demo.DEMO / "scene.json").read_text(encoding="utf-8"))
    size = Image.open(demo.DEMO / "scene.png").size
    texts, points = [], 0
    for question in scene["questions"]:
        centers = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in question.get("boxes", ())]
        points += len(centers)
        found = [Point(x, y) for x, y in centers]
        texts.append(format_points(found, "thing", [size]) if found else question["truth"])
    scripted = ScriptedModel(*texts)
    target = tmp_path / "demo.png"
    demo.run_demo(target, Pipeline(scripted, scripted.processor))
    out = capsys.readouterr().out
    places = [out.index(question["question"]) for question in scene["questions"]]
    assert places == sorted(places)
    for text in texts:
        assert text in out.replace("\n", "")
    assert out.count("pointed at") >= 2
    assert "astray" not in out
    assert "Try next" in out
    with Image.open(target) as drawn:
        assert drawn.size == (demo.ZOOM * size[0], demo.ZOOM * size[1])


def test_hits_and_misses() -> None:
    boxes = [(0, 0, 10, 10), (20, 0, 30, 10)]
    assert demo.hits([Point(5, 5), Point(25, 5)], boxes) == "there are 2, 2 pointed at"
    assert demo.hits([Point(5, 5), Point(6, 6)], boxes) == "there are 2, 1 pointed at"
    assert demo.hits([Point(15, 5)], boxes) == "there are 2, 0 pointed at, 1 astray"


def test_nobody_picked_the_demo_by_hand() -> None:
    """The shipped picture and questions are what the script makes from its seed and its rule."""
    image, description = make_demo()
    shipped = np.asarray(Image.open(demo.DEMO / "scene.png"))
    assert json.loads((demo.DEMO / "scene.json").read_text(encoding="utf-8")) == description
    # Pillow versions resample alike, but not bit for bit.
    assert np.abs(shipped.astype(int) - image).mean() < 1


def test_defaults_of_generation_are_those_of_the_library() -> None:
    options, sampling = ask.GenerationOptions().generation(), SamplingParams()
    shared = [field.name for field in dataclasses.fields(SamplingParams) if field.name in options]
    assert {"temperature", "top_p", "seed", "stop"} <= {*shared}
    assert {name: options[name] for name in shared} == {n: getattr(sampling, n) for n in shared}


def test_smallest_values_of_options() -> None:
    """A mark in the type of an option is all that its check needs, also for lists and for none."""
    check_ranges(cli.Bench(threads=(1, 2)))
    check_ranges(cli.Plan("smoke"))
    with pytest.raises(UsageError, match="--threads must be 1 or more, found 0"):
        check_ranges(cli.Bench(threads=(2, 0)))
    with pytest.raises(UsageError, match="--failures must be 0 or more, found -1"):
        check_ranges(cli.Eval("emoji", failures=-1))


# ---- what is written never replaces what is read ----


def other_names(path: Path) -> list[Path]:
    """Names by which the same file is found."""
    soft, hard = path.with_name(f"soft{path.suffix}"), path.with_name(f"hard{path.suffix}")
    soft.symlink_to(path)
    os.link(path, hard)
    (path.parent / "below").mkdir()
    return [path, soft, hard, path.parent / "." / path.name, path.parent / "below/.." / path.name]


@pytest.mark.parametrize("option", ["--data", "--model", "--out"])
def test_names_that_no_recipe_can_hold(refused: Refusal, option: str) -> None:
    arguments = {"--data": "my.jsonl", "--model": "tiny", "--out": "run"} | {option: "caf\udce9"}
    flat = [word for pair in arguments.items() for word in pair]
    assert "'caf\\udce9' holds bytes that are no text" in refused("train", *flat, code=2)


def test_no_picture_is_drawn_over(refused: Refusal, says, picture: Path, clip: Path) -> None:
    says(TAG)
    before = picture.read_bytes(), clip.read_bytes()
    for name in other_names(picture):
        assert "which is read" in refused("ask", picture, "?", "--draw", name, code=2)
        assert "which is read" in refused("ask", name.as_uri(), "?", "--draw", picture, code=2)
    assert "which is read" in refused("ask", clip, "?", "--video", "--draw", clip, code=2)
    address = f"file://localhost{clip}"
    assert "which is read" in refused("ask", address, "?", "--video", "--draw", clip, code=2)
    second = picture.with_name("picture-2.png")
    os.link(picture, second)
    arguments = ("ask", picture, picture, "?", "--draw", picture)  # writes picture-1 and picture-2
    assert "picture-2.png would be written over" in refused(*arguments, code=2)
    assert (picture.read_bytes(), clip.read_bytes()) == before


def test_no_model_is_written_over(refused: Refusal, model: Path, picture: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(refused.folder.rglob("*.*"))}

    link = refused.folder / "link"
    link.symlink_to(model)
    before = contents()
    for command in ("quantize", "export"):
        for out in (model, link, model / ".." / model.name, refused.folder):
            assert "name another place" in refused(command, model, out, code=2)
    config = model / "config.json"
    scores = ("eval", "emoji", "--model", model, "--json")
    for out in (config, link / "config.json", model / "../model/config.json"):
        assert "which is read" in refused(*scores, out, code=2)
    assert contents() == before


def test_a_folder_of_other_things_gets_no_model(refused: Refusal, picture: Path) -> None:
    for command in ("quantize", "export"):
        message = refused(command, "tiny", refused.folder, code=2)
        assert "is not empty and holds no model" in message


def test_no_log_and_no_data_is_written_over(refused: Refusal, tmp_path: Path) -> None:
    log, data = tmp_path / "log.jsonl", tmp_path / "data.jsonl"
    log.write_text('{"step": 1, "loss": 2}\n')
    data.write_text('{"question": "?", "answer": "!"}\n')
    (tmp_path / "curves.png").symlink_to(log)
    (tmp_path / "page.html").symlink_to(data)
    assert "which is read" in refused("plot", tmp_path, "--out", "curves.png", code=2)
    assert "which is read" in refused("plot", log, "--out", "curves.png", code=2)
    assert "which is read" in refused("inspect", data, "--html", "page.html", code=2)
    assert log.read_text() == '{"step": 1, "loss": 2}\n'
    scene = demo.DEMO / "scene.png"
    assert "which is read" in refused("demo", "--draw", scene, code=2)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 200 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_a_full_disk_names_the_drawing(
    says, picture: Path, tmp_path: Path, capsys, small_disk: None, name: str
) -> None:
    says(TAG)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["ask", str(picture), "?", "--draw", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"nanomolmo2: {tmp_path / name} could not be written (")
    assert "is the disk full?" in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_drawing_is_not_cut_by_a_full_disk(tmp_path: Path) -> None:
    """PIL wrote as much of a JPEG and of a GIF as there was room for, and said nothing."""
    noise = Image.effect_noise((200, 200), 90)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        for name in ("a.jpg", "a.gif", "a.png", "a.webp"):
            with pytest.raises(OSError, match=rf"{name} could not be written \(File too large"):
                save_image(noise, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_other_files(
    says_in_crops, clip: Path, tmp_path: Path, capsys, small_disk: None
) -> None:
    says_in_crops('<points coords="0.0 1 500 500">dog</points>')
    out = tmp_path / "out.gif"
    assert cli.main(["ask", str(clip), "?", "--video", "--draw", str(out)]) == 1
    assert f"{out} could not be written (" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert cli.main(["inspect", "emoji", "--count", "1", "--html", str(page)]) == 1
    assert f"{page} could not be written (File too large)" in capsys.readouterr().err
    assert cli.main(["data", "emoji", "--out", str(tmp_path / "scenes"), "--count", "1"]) == 1
    assert f"{tmp_path / 'scenes'} could not be written (" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [clip]


# ---- texts of strangers ----

CODES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\ud800[red]x[/red]"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e\ud800[red]x[/red]"


def test_codes_of_an_answer_are_shown(says, picture: Path, capsys) -> None:
    codes, shown = (
        text.replace(half, "") for text, half in ((CODES, "\ud800"), (SHOWN, r"\ud800"))
    )
    says(codes, codes)
    assert cli.main(["ask", str(picture), "?"]) == 0
    assert capsys.readouterr().out == shown + "\n"
    assert cli.main(["ask", str(picture), f"{codes}?", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out
    report = json.loads(out)
    assert (report["text"], report["question"]) == (codes, f"{codes}?")


def test_codes_of_names_and_notes_are_shown(says, picture: Path, tmp_path: Path, capsys) -> None:
    name = "\x1b[2J\u202e[red]\nx"
    out = tmp_path / f"{name}.png"
    says('<points coords="1 1 100 100 2 \x1b[2J\u202e 300">dog</points>')
    assert cli.main(["ask", str(picture), "?", "--draw", str(out)]) == 0
    err = capsys.readouterr().err
    assert not set(err) & set("\x1b\u202e\x9b\ud800")
    assert err.splitlines()[-1] == rf"wrote {tmp_path}/\x1b[2J\u202e[red]\nx.png"
    assert out.is_file()
    for arguments in (
        ("ask", f"{CODES}.png", "?"),
        ("ask", str(picture), "?", "--model", CODES, "--debug"),
        ("info", CODES),
        ("plan", CODES),
        ("plot", CODES),
        ("inspect", CODES),
        ("quantize", CODES, str(tmp_path / "q")),
        ("export", CODES, str(tmp_path / "e")),
        (CODES,),
        ("ask", str(picture), "?", f"--{CODES}"),
    ):
        assert cli.main(arguments) in (1, 2)
        out_text, err = capsys.readouterr()
        assert not set(out_text + err) & set("\x1b\x07\u202e\x9b\ud800"), (arguments, err)
        assert err.count("\n") == 1 or "--debug" in arguments


def test_codes_of_data_are_shown(tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    records = [{"question": f"{CODES}?", "answer": CODES}, {CODES: CODES, "question": CODES}]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for options in ((), ("--audit",), ("--json",), ("--audit", "--json")):
        cli.main(["inspect", str(data), "--count", "2", *options])
        out, err = capsys.readouterr()
        assert not set(out + err) & set("\x1b\x07\u202e\x9b\ud800"), (options, out, err)
        assert "[red]" in out or "--audit" in options


def test_a_warning_is_one_line(says, picture: Path, capsys, monkeypatch) -> None:
    scripted = says("Yes.")
    pipeline = ask.load_pipeline("tiny", Path())

    def load(name: str, cache_dir: Path) -> Pipeline:
        warnings.warn(f"two\nlines {CODES}", UserWarning, stacklevel=1)
        return pipeline

    monkeypatch.setattr(ask, "load_pipeline", load)
    assert cli.main(["ask", str(picture), "?"]) == 0
    assert capsys.readouterr().err == f"warning: two lines {SHOWN}\n"
    assert len(scripted.calls) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_a_console_with_another_encoding(says, picture: Path, monkeypatch, encoding: str) -> None:
    """It failed after all the work, with nothing printed."""
    text = "Größe \u732b \u20ac \U0001f40c"
    says(text, text)
    question = ["ask", str(picture), text]
    printed = []
    for arguments in (question, [*question, "--json"]):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert cli.main(arguments) == 0
        stream.flush()
        printed.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    plain, report = printed
    escaped = text.encode(encoding, "backslashreplace").decode(encoding)
    assert plain == escaped + "\n"
    assert json.loads(report)["text"] == json.loads(report)["question"] == text


# ---- what people type ----


@pytest.mark.parametrize("name", ["typo.png", "no/such.JPEG", "cat.MP4", "x.wmv", "é.webp"])
def test_a_second_file_that_is_not_there_is_no_question(
    refused: Refusal, picture: Path, name: str
) -> None:
    assert f"there is no file {name}: check its path" in refused("ask", picture, name)


def test_a_question_that_ends_like_a_file_is_noted(says, picture: Path, capsys) -> None:
    says("Yes.", "Yes.")
    assert cli.main(["ask", str(picture), "my cat.png"]) == 0
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("Yes.\n", 1)
    assert err.startswith("warning: the question, my cat.png, ends like a file")
    assert cli.main(["ask", str(picture), "Is this cat.png?"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("question", ["", "  ", "\n\t", "\u3000", "\u200b"])
def test_an_empty_question(refused: Refusal, picture: Path, question: str) -> None:
    assert "the question is empty" in refused("ask", picture, question, code=2)


def test_an_empty_name(refused: Refusal, picture: Path) -> None:
    assert "the name of a picture is empty" in refused("ask", "", "?", code=2)
    assert "the name of a picture is empty" in refused("ask", picture, "", "?", code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seed", str(2**70)), f"--seed must be below 2**63, found {2**70}"),
        (("--seed", "-1"), "--seed must be 0 or more, found -1"),
        (("--seed", "2**70"), "--seed must be a whole number, found '2**70'"),
        (("--seed", "1.5"), "--seed must be a whole number, found '1.5'"),
        (("--max-new-tokens", str(10**400)), "--max-new-tokens must be below 2**63, found 1000"),
        (("--top-k", str(2**64)), "--top-k must be below 2**63"),
    ],
)
def test_numbers_that_nothing_holds(refused: Refusal, arguments: tuple, said: str) -> None:
    assert said in refused("ask", "a.png", "?", *arguments, code=2)


def test_seeds_of_other_commands(refused: Refusal) -> None:
    for seed, said in ((str(2**70), "below 2**63"), ("-1", "0 or more")):
        assert said in refused("data", "emoji", "--out", "d", "--seed", seed, code=2)
        assert said in refused("train", "smoke", "--out", "r", "--seed", seed, code=2)
    SamplingParams(seed=2**64 - 1)
    with pytest.raises(ValueError, match="a seed must be below"):
        SamplingParams(seed=2**64)
    with pytest.raises(ValueError, match="a seed must be below"):
        SamplingParams(seed=[1, -(2**70)])


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("av", "video", ("ask", "clip.mp4", "?", "--model", "MODEL")),
        ("matplotlib.figure", "plot", ("plot", "run")),
        ("pyarrow.parquet", "data", ("data", "emoji", "--out", "d", "--format", "parquet")),
        ("pyarrow.parquet", "data", ("inspect", "data.parquet")),
        ("datasets", "hub-data", ("inspect", "hub:someone/something")),
    ],
)
def test_a_missing_extra_is_named(
    monkeypatch, refused: Refusal, says_in_crops, module: str, extra: str, arguments: tuple
) -> None:
    for missing in (module, "torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, missing, None)
    says_in_crops("Yes.")
    (refused.folder / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    (refused.folder / "data.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (refused.folder / "run").mkdir()
    (refused.folder / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    chosen = [a for a in arguments if a not in ("--model", "MODEL")]
    assert f"pip install 'nanomolmo2[{extra}]'" in refused(*chosen)


# ---- the process ----


def run_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "nanomolmo2", *arguments],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        timeout=120,
        **options,
    )


def test_standard_output_that_takes_nothing() -> None:
    """Closed, and on a disk that is full."""
    done = run_process("info", "tiny", preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert done.stderr == (
        b"nanomolmo2: standard output is closed: send it to a file, or to /dev/null\n"
    )
    for arguments in (("--version",), ("--help",)):
        with open("/dev/full", "wb") as full:
            done = run_process(*arguments, stdout=full)
        assert done.returncode == 1
        assert done.stderr == b"nanomolmo2: standard output: No space left on device\n"


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_answer_that_cannot_be_printed(
    says, picture: Path, monkeypatch, capsys, options
) -> None:
    says("Yes.")
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["ask", str(picture), "?", *options]) == 1
    said = "nanomolmo2: standard output: No space left on device\n"
    assert capsys.readouterr().err == said


def test_standard_error_that_is_closed() -> None:
    done = run_process("--version", stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
    assert (done.returncode, done.stdout[:10]) == (0, b"nanomolmo2")


def test_ctrl_c_while_it_is_loaded() -> None:
    """An import that is interrupted ended in a traceback."""
    program = (
        "import sys, signal, nanomolmo2.__main__ as m\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tyro': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "sys.exit(m.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"\ninterrupted\n")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "missing.png", "?", "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("nanomolmo2: there is no file missing.png")


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, picture: Path, refused: Refusal
) -> None:
    def fail(name: str, cache_dir: Path) -> Pipeline:
        raise KeyError("two\nlines")

    monkeypatch.setattr(ask, "load_pipeline", fail)
    assert "KeyError" in refused("ask", picture, "?")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, picture: Path, capsys) -> None:
    monkeypatch.setattr(ask, "load_pipeline", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.main(["ask", str(picture), "?"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "\ninterrupted\n"


def test_a_reader_that_goes_away(saved: Path) -> None:
    """`nanomolmo2 info model | true` used to end in a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "nanomolmo2", "info", str(saved)],
        cwd=Path(__file__).parents[1],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""


LOADS = {
    "ask": ("picture.png", "?", "--model", "MODEL"),
    "chat": ("picture.png", "--model", "MODEL"),
    "eval": ("emoji", "--model", "MODEL"),
    "quantize": ("MODEL", "out"),
    "export": ("MODEL", "out"),
    "info": ("MODEL",),
    "demo": (),
    "train": ("smoke", "--out", "out"),
    "serve": ("--port", "0", "--model", "MODEL"),
    "find": ("picture.png", "--at", "9,9", "--model", "MODEL"),
    "teach": ("walnut", "picture.png@1,2", "--model", "MODEL", "--out", "out"),
}


@pytest.mark.parametrize("command", LOADS)
def test_a_device_that_is_not_there(
    refused: Refusal, saved: Path, picture: Path, command: str
) -> None:
    """One sentence, with those that are; CUDA is hidden from the tests."""
    arguments = [saved if a == "MODEL" else a for a in LOADS[command]]
    found = {"cuda": "there is no device 'cuda' here", "gpu": "'gpu' is no device"}
    for name, problem in {**found, "cuda:7": "there is no device 'cuda:7' here"}.items():
        said = refused(command, *arguments, "--device", name, code=2)
        assert f"--device: {problem}" in said
        assert said.endswith("choose cpu, or leave it out\n")
    assert "computes nothing" in refused(command, *arguments, "--device", "meta", code=2)


def test_every_command_that_loads_a_model_has_a_device() -> None:
    """Not `inspect`, which reads a model's settings, nor `bench`, which starts other programs."""
    for command in typing.get_args(cli.Command):
        name, fields = command.__name__.lower(), typing.get_type_hints(command)
        if "model" in fields and name not in ("inspect", "plan"):
            assert name in LOADS
        if name in LOADS:
            assert {"device", "dtype"} <= fields.keys(), name


def test_tiny_trains_on_the_cpu(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanomolmo2.cli.train.device_of", torch.device)
    said = refused("train", "tiny", "--out", "out", "--device", "cuda", code=2)
    assert "the recipe tiny trains on the CPU only" in said


def test_a_device_without_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, refused: Refusal
) -> None:
    def fail(name: str, cache_dir: Path) -> Pipeline:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 20 GiB.")

    monkeypatch.setattr(ask, "load_pipeline", fail)
    Image.new("RGB", (9, 9)).save(refused.folder / "a.png")
    said = refused("ask", "a.png", "?")
    assert "--device cpu (CUDA out of memory. Tried to allocate 20 GiB.)" in said


@pytest.mark.parametrize("command", typing.get_args(cli.Command), ids=lambda c: c.__name__)
def test_every_option_is_explained(command: type) -> None:
    assert command.__doc__
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        texts = [getattr(entry, "help", None) for entry in hints[field.name].__metadata__]
        assert any(text and len(text) > 10 for text in texts), field.name
