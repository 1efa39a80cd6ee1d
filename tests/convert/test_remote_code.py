"""The Python files in an exported folder: another program loads them, without this package."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nanomolmo2.convert import export_molmo2
from nanomolmo2.convert.remote_code import SOURCES
from nanomolmo2.processor.video import Video, sample_indices
from tests.convert.test_export import crops_processor, small_model

FILES = ("config", "preprocessor_config", "processor_config", "video_preprocessor_config")
QUESTION = [{"role": "user", "content": "Describe this picture."}]

# What vLLM does with a folder.
PROGRAM = """
import json, sys
import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

folder, data = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
more = AutoProcessor.from_pretrained(folder, trust_remote_code=True, max_crops=7)
found = {}
for name in sys.stdin.read().split():
    shown = [{"type": "image"}] * name.count("+") + [{"type": "video"}] * name.count("=")
    content = [*shown, {"type": "text", "text": "Describe this picture."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    given = {}
    if "+" in name:
        given["images"] = [Image.open(data + "/" + part) for part in name.split("+")[:-1]]
    if "=" in name:
        given["videos"] = [np.load(data + "/" + name.split("=")[0])]
        given["video_metadata"] = [{"fps": 3.0, "total_num_frames": 7}]
        given["do_sample_frames"] = True
    for key, value in processor(text=text, return_tensors="np", **given).items():
        found[name + " " + key] = value
np.savez(data + "/found.npz", **found)
vision, text, adapter = config.vit_config, config.text_config, config.adapter_config
print(json.dumps({
    "ours": [name for name in sys.modules if name.startswith("nanomolmo2")],
    "classes": [type(thing).__module__.split(".")[0] for thing in (config, images, processor)],
    "vit": [vision.image_default_input_size, vision.image_num_pos, vision.num_hidden_layers],
    "text": [text.vocab_size, text.additional_vocab_size, text.rope_theta, text.rope_parameters],
    "adapter": [adapter.vit_layers, adapter.pooling_attention_mask, adapter.text_hidden_size],
    "mask": config.is_mm_prefix_lm,
    "crops": [p.max_crops for p in (images, processor.image_processor, more.image_processor)],
}))
"""
CASES = ("text", "rgb.png+", "rgb.png+small.png+", "alpha.png+", "palette.png+", "turned.jpg+")
VIDEOS = ("frames.npy=",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "exported"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_molmo2(small_model(), path, crops_processor())
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several kinds, and seven frames."""
    path = tmp_path_factory.mktemp("data")
    picture = Image.effect_noise((150, 90), 80).convert("RGB")
    picture.save(path / "rgb.png")
    picture.resize((40, 70)).convert("L").save(path / "small.png")
    picture.quantize(16).save(path / "palette.png")
    clear = picture.copy()
    clear.putalpha(Image.effect_noise(picture.size, 90))
    clear.save(path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path / "turned.jpg", exif=exif)
    random = np.random.default_rng(0)
    np.save(path / "frames.npy", random.integers(0, 256, (7, 50, 70, 3), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def said(folder: Path, data: Path) -> dict[str, Any]:
    """What the other program says of the config; its arrays are in found.npz."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(data)],
        cwd=data,
        input=" ".join((*CASES, *VIDEOS)),
        env={**environment, "HF_HOME": str(data / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def arrays(data: Path, name: str) -> dict[str, NDArray[Any]]:
    with np.load(data / "found.npz") as found:
        return {k.removeprefix(f"{name} "): found[k] for k in found if k.startswith(f"{name} ")}


def test_every_auto_map_names_a_class_that_is_there(folder: Path) -> None:
    named = {}
    for file in FILES:
        named |= json.loads((folder / f"{file}.json").read_text())["auto_map"]
    assert set(named) == {
        *("AutoConfig", "AutoImageProcessor", "AutoModelForImageTextToText", "AutoProcessor"),
        "AutoVideoProcessor",
    }
    for reference in named.values():
        module, name = reference.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_files_need_nothing_of_ours() -> None:
    allowed = {"numpy", "torch", "PIL", "transformers", *sys.stdlib_module_names}
    for source in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, source.name
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, source.name


def test_the_config_as_vllm_reads_it(said: dict[str, Any]) -> None:
    assert said["ours"] == []
    assert set(said["classes"]) == {"transformers_modules"}
    assert said["vit"] == [[64, 64], 16, 2]
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    assert said["text"] == [736, 16, 1_000_000.0, rope]
    assert said["adapter"] == [[-1], True, 32]
    assert said["mask"] is True
    assert said["crops"] == [3, 3, 7]


@pytest.mark.parametrize("case", CASES)
def test_ids_and_pixels_are_ours(said: dict[str, Any], data: Path, case: str) -> None:
    found = arrays(data, case)
    ours = crops_processor().apply(QUESTION, [data / part for part in case.split("+")[:-1]])
    assert found["input_ids"][0].tolist() == ours["input_ids"].tolist()
    assert found["mm_token_type_ids"][0].tolist() == ours["token_type_ids"].tolist()
    names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    assert ("pixel_values" in found) == (case != "text")
    for name in names if case != "text" else ():
        np.testing.assert_array_equal(found[name], ours[name])


def test_a_video_is_ours(said: dict[str, Any], data: Path) -> None:
    found = arrays(data, VIDEOS[0])
    frames, chosen = np.load(data / "frames.npy"), sample_indices(7, 3.0, 20, 1.0)
    assert chosen == [0, 3, 6]
    video = Video(tuple(frames[chosen]), tuple(index / 3.0 for index in chosen))
    ours = crops_processor().apply(QUESTION, video=video)
    assert found["input_ids"][0].tolist() == ours["input_ids"].tolist()
    np.testing.assert_array_equal(found["pixel_values_videos"], ours["pixel_values"])
    np.testing.assert_array_equal(found["video_token_pooling"], ours["image_token_pooling"])
    np.testing.assert_array_equal(found["video_grids"], ours["video_grids"])


def load(name: str) -> Any:
    """A file of the folder as a module, without its neighbours."""
    spec = importlib.util.spec_from_file_location(f"remote_{name}", SOURCES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_count_on_but_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM adds the patches of the pictures before by itself; transformers is given them added."""
    images = load("image_processing_molmo2")
    index = [np.array([[0, 1], [3, -1]]), np.array([[0, -1], [2, 1]])]
    added = images.counted_on(index, [4, 3])
    assert added.tolist() == [[0, 1], [3, -1], [4, -1], [6, 5]]
    monkeypatch.setitem(sys.modules, "vllm", sys)
    single = images.counted_on(index, [4, 3])
    assert single.tolist() == [[0, 1], [3, -1], [0, -1], [2, 1]]
    # The network for transformers takes both.
    over_the_batch = load("modeling_molmo2").over_the_batch
    for rows in (added, single):
        assert over_the_batch(torch.from_numpy(rows), [2, 2]).tolist() == added.tolist()


def test_transformers_does_not_take_the_code_unless_it_is_told_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    assert type(AutoConfig.from_pretrained(folder)).__module__.startswith("transformers.")
    own, told = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **trust).eval()
        for trust in ({}, {"trust_remote_code": True})
    )
    assert type(own).__module__ == "transformers.models.molmo2.modeling_molmo2"
    assert type(told).__module__.startswith("transformers_modules.")
    processor = crops_processor()
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((150, 90), (60, 64))]
    ours = processor.apply([{"role": "user", "content": "Hi"}], pictures)
    del ours["labels"]
    inputs = {name: torch.from_numpy(np.asarray(array)) for name, array in ours.items()}
    for name in ("input_ids", "token_type_ids"):
        inputs[name] = inputs[name][None]
    inputs["mm_token_type_ids"] = inputs.pop("token_type_ids")
    with torch.no_grad():
        expected, found = own(**inputs).logits, told(**inputs).logits
    assert expected.std() > 1e-3
    assert torch.equal(found, expected)
