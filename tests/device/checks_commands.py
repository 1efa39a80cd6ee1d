"""Every command that loads a model: its weights and all that meets them are on the device, and what
it says is what the CPU says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import nanomolmo2
from nanomolmo2 import cli, demo
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.things.find_model import find_processor
from tests.device.simulated import DEVICE, NAME
from tests.find_model import find_net
from tests.small_model import small_model, small_processor

ON = ("--device", NAME)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = small_model()
    model.llm.embed_tokens.weight.data[:257] = 0  # random weights would write halves of characters
    model.save_pretrained(folder, processor=small_processor())
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def places() -> Iterator[set[str]]:
    """The kinds of devices whose weights computed something."""
    found: set[str] = set()

    def look(module: nn.Module, inputs: Any) -> None:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        found.update(tensor.device.type for tensor in own)

    hook = register_module_forward_pre_hook(look)
    yield found
    hook.remove()


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[str, str]:
        """Standard output and standard error of a command that succeeds."""
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--json",),
        ("--well-formed-points", "--temperature", "1", "--seed", "1"),
        ("--quantize", "int8"),
        ("--quantize", "fp16-weights"),
        ("--draw", "points.png"),
    ],
    ids=" ".join,
)
def test_ask(
    saved: Path, picture: Path, run: Run, places: set[str], options: tuple[str, ...]
) -> None:
    ask = ("ask", picture, "Point to the dog.", "--model", saved, "--max-new-tokens", "12")
    found, said = run(*ask, *options, *ON)
    assert places == {NAME}
    first = said.splitlines()[0]
    assert first.startswith(f"on {NAME}:0, float32")
    if "int8" in options:
        assert first.endswith(", weights int8, which save memory there, not time")
        return  # rounded activations are of the CPU's kernels
    places.clear()
    expected, _ = run(*ask, *options)
    assert places == {"cpu"}
    if "--json" in options:
        found, expected = (json.loads(text) | {"timings": 0} for text in (found, expected))
    assert found == expected


def test_find(
    picture: Path, run: Run, places: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("finds") / "model"
    find_net().save_pretrained(folder, processor=find_processor())
    find = ("find", picture, "--at", "20,20", "--model", folder, "--json")
    found, said = run(*find, *ON)
    assert places == {NAME} and said.startswith(f"on {NAME}:0, float32")
    places.clear()
    expected, _ = run(*find)
    assert places == {"cpu"}
    one, other = (json.loads(text) for text in (found, expected))
    assert one["count"] and one["text"] == other["text"]
    for name in ("x", "y", "confidence", "size"):
        values = [[point[name] for point in report["points"]] for report in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_info(saved: Path, run: Run) -> None:
    found, said = run("info", saved, *ON, "--dtype", "bfloat16")
    assert f"\non {NAME}:0, bfloat16\n" in found and not said
    expected, _ = run("info", saved, "--dtype", "bfloat16")
    assert found == expected.replace("on the CPU", f"on {NAME}:0")


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16")], ids=["stored", "bfloat16"])
def test_export(saved: Path, tmp_path: Path, run: Run, options: tuple[str, ...]) -> None:
    _, said = run("export", saved, tmp_path / "found", *options, *ON)
    assert f"on {NAME}:0, {options[1] if options else 'float32'}\n" in said
    run("export", saved, tmp_path / "expected", *options)
    assert same_tensors(tmp_path / "found", tmp_path / "expected")


@pytest.mark.parametrize("mode", ["int8", "int8-weight-only", "fp16-weights"])
def test_quantize(
    saved: Path, picture: Path, tmp_path: Path, run: Run, places: set[str], mode: str
) -> None:
    options = ("--mode", mode, "--picture", picture, "--rows", "0")
    found, said = run("quantize", saved, tmp_path / "found", *options, *ON)
    assert places == {NAME} and said == f"on {NAME}:0, float32\n"
    assert found.startswith(f"wrote {tmp_path / 'found'}")
    run("quantize", saved, tmp_path / "expected", *options)
    assert same_tensors(tmp_path / "found", tmp_path / "expected")


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    return all(t.dtype == second[n].dtype and t.equal(second[n]) for n, t in first.items())


def test_eval(saved: Path, tmp_path: Path, run: Run, places: set[str]) -> None:
    options = ("--model", saved, "--scenes", "2", "--group", "seen")
    options += ("--tasks", "presence", "unknown")
    _, said = run("eval", "emoji", *options, "--json", "found.json", *ON)
    assert places == {NAME} and said == f"on {NAME}:0, float32\n"
    run("eval", "emoji", *options, "--json", "expected.json")
    found, expected = (
        json.loads((tmp_path / name).read_text()) for name in ("found.json", "expected.json")
    )
    assert found == expected


def test_eval_of_own_data(
    saved: Path, picture: Path, tmp_path: Path, run: Run, places: set[str]
) -> None:
    write_records(tmp_path, picture)
    options = ("eval", "my.jsonl", "--model", saved)
    _, said = run(*options, "--json", "found.json", *ON)
    assert places == {NAME} and said == f"on {NAME}:0, float32\n"
    run(*options, "--json", "expected.json")
    found, expected = (
        json.loads((tmp_path / name).read_text()) for name in ("found.json", "expected.json")
    )
    assert found == expected != {}


def write_records(folder: Path, picture: Path) -> None:
    """``my.jsonl``: two questions about a picture."""
    records = [
        {"image": picture.name, "question": f"How many {what}?", "answer": "Two."}
        for what in ("dogs", "cats")
    ]
    (folder / "my.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_demo(run: Run, places: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    found, said = run("demo", "--draw", "found.png", *ON)
    assert places == {NAME} and said.startswith(f"on {NAME}:0, ")
    expected, _ = run("demo", "--draw", "expected.png", "--dtype", "float32")
    first, second = (
        text.split("seen it\n")[1].split("answers in")[0] for text in (found, expected)
    )
    assert first == second and "truth:" in first


def test_train(saved: Path, picture: Path, tmp_path: Path, run: Run, places: set[str]) -> None:
    """On the device, then on on the CPU, as a run that was on the CPU all the time."""
    write_records(tmp_path, picture)
    options = ("train", "--data", "my.jsonl", "--model", saved, "--steps", "4", "--workers", "0")
    _, said = run(*options, "--out", "found", "--stop-after", "2", *ON)
    assert places == {NAME} and f"on {NAME}:0, float32\n" in said
    places.clear()
    _, said = run("train", "--out", "found", "--resume", "--workers", "0", "--device", "cpu")
    assert places == {"cpu"} and "on the CPU, float32\n" in said
    run(*options, "--out", "expected", "--device", "cpu")
    found, expected = (
        [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        for out in ("found", "expected")
    )
    losses = [[line["loss"] for line in log if "loss" in line] for log in (found, expected)]
    assert len(losses[1]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_library(saved: Path) -> None:
    pipeline = nanomolmo2.Pipeline.from_pretrained(saved, device=NAME)
    loaded, _ = nanomolmo2.load(saved, device=f"{NAME}:0")
    net = NanoMolmo2.from_pretrained(str(saved), device=DEVICE)
    for model in (pipeline.model, loaded, net):
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {DEVICE}
    for model in (nanomolmo2.load(saved)[0], NanoMolmo2.from_pretrained(str(saved))):
        assert {t.device.type for t in model.parameters()} == {"cpu"}  # it is asked for by name


def test_a_number_too_high(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(saved), "--device", f"{NAME}:1"]) == 2
    assert capsys.readouterr().err == (
        f"nanomolmo2: --device: there is no device '{NAME}:1' here: choose cpu or {NAME}:0, or "
        f"leave it out\n"
    )
