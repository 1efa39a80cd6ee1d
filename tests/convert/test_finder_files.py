"""A model that finds all at once, rounded and in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.convert.export_point import export_molmo_point
from nanomolmo2.convert.pretrained import load
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import NanoMolmo2, preset
from nanomolmo2.things.find_model import CONFIG, find_processor

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (192, 192, 3), np.uint8))


def places(vlm: Pipeline) -> list[tuple[float, float]]:
    return [(p.x, p.y) for p in vlm.find(IMAGE, [(40, 60)], min_confidence=0).points]


@pytest.mark.parametrize("mode", ["int8", "int8-weight-only", "fp16-weights"])
@pytest.mark.filterwarnings("ignore:nothing")
def test_what_finds_is_not_rounded(mode: str, tmp_path: Path) -> None:
    """Its attention reads the weights of its layers themselves, which were none any more."""
    torch.manual_seed(0)
    model = NanoMolmo2(CONFIG).eval()
    before = places(Pipeline(model, find_processor()))
    assert model.finder is not None
    weight = model.finder.patch.embed.weight.clone()
    model.quantize(mode)
    assert torch.equal(model.finder.patch.embed.weight, weight)
    rounded = places(Pipeline(model, find_processor()))
    assert rounded and abs(len(rounded) - len(before)) < 0.5 * len(before)
    model.save_pretrained(tmp_path / "model", processor=find_processor())
    again = Pipeline(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(places(again), rounded, atol=0.01)


def test_an_export_leaves_the_finder_out_and_says_so(tmp_path: Path) -> None:
    model = NanoMolmo2(preset("tiny-find")).eval()
    with pytest.warns(UserWarning, match="no part that finds by example: it is left out"):
        export_molmo_point(model, tmp_path / "out", find_processor())
    again, _ = load(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert again.finder is None and model.finder is not None
    ours = {name: x for name, x in model.state_dict().items() if not name.startswith("finder.")}
    theirs = again.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "finds by example: it is left out" in " ".join(card.split())
