"""Where a token looked: attention as transformers computes it, laid out on the picture by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.generation.answer import SELECTED
from nanomolmo2.generation.looked import _laid_out, _longer, _views
from nanomolmo2.generation.vlm import VLM
from nanomolmo2.models.attention import sequence_mask
from nanomolmo2.processor.video import Video
from tests.generation.test_vlm import SCENE, noise, small_vlm
from tests.golden_points import consistent_pipeline, golden_folder, picture


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return small_vlm()


@pytest.fixture(scope="module")
def pointer(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return consistent_pipeline(golden_folder(tmp_path_factory.mktemp("own") / "model"))


def attention_of_transformers(vlm: VLM, x: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """(T, T): mean over layers and heads of Qwen3's eager attention for embeddings (T, D)."""
    transformers = pytest.importorskip("transformers")
    ours = vlm.model.llm.config
    config = transformers.Qwen3Config(
        vocab_size=8,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        rope_theta=ours.rope_theta,
        rms_norm_eps=ours.rms_norm_eps,
        attn_implementation="eager",
    )
    reference = transformers.Qwen3Model(config).eval()
    weights = vlm.model.llm.state_dict()
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][:8]
    names = reference.state_dict().keys()
    reference.load_state_dict({name: weights[name] for name in names}, strict=True)
    T = len(x)
    sees = torch.tensor(
        [[j <= i or bool(is_image[i] and is_image[j]) for j in range(T)] for i in range(T)]
    )
    mask = torch.zeros(1, 1, T, T).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = reference(inputs_embeds=x[None], attention_mask=mask, output_attentions=True)
    return torch.stack(found.attentions).mean(dim=(0, 1, 2))


@pytest.mark.parametrize("images", [[noise(0)], [noise(0), noise(1, 200, 50)]])
def test_it_is_the_attention_of_transformers(images: Any, vlm: VLM) -> None:
    question = "Point to the dog."
    answer = vlm.ask(images, question, max_new_tokens=6, eos_token_id=None)
    encoded = vlm.processor.encode([{"role": "user", "content": question}], images)
    T, ids = len(encoded.input_ids), list(answer.token_ids)
    pixels = torch.from_numpy(encoded.pixel_values)
    whole = torch.tensor([[*encoded.input_ids.tolist(), *ids]])
    with torch.no_grad():
        x = vlm.model.embed(vlm.model.batch_of(whole, pixels))[0]
    is_image = whole[0] == vlm.processor.image_token_id
    attention = attention_of_transformers(vlm, x, is_image)
    for number in range(len(ids)):
        found = vlm.looked(images, question, answer, number)
        row = attention[T - 1 + number][is_image]  # the position that chose the token
        assert found.to_images == pytest.approx(float(row.sum()), rel=1e-4)
        parts = row.view(len(images), 2, 2)
        for grid, share, part in zip(found.images, found.shares, parts, strict=True):
            np.testing.assert_allclose(grid, part / part.sum(), rtol=1e-4)
            assert share == pytest.approx(float(part.sum() / row.sum()), rel=1e-4)
        assert found.chosen == (number,)
    both = vlm.looked(images, question, answer, (0, 10**6))
    assert both.chosen == tuple(range(len(ids)))
    rows = attention[T - 1 : T - 1 + len(ids)][:, is_image].mean(dim=0)
    assert both.to_images == pytest.approx(float(rows.sum()), rel=1e-4)


def test_tokens_are_named_by_number_text_or_place() -> None:
    tiny = VLM("tiny")
    text = "There is a snail and a snail."
    asked: Any = (SCENE, "Describe this picture.", text)
    tokens = tiny.looked(*asked).tokens
    assert "".join(tokens) == text
    first = tokens.index("snail")
    assert tiny.looked(*asked, "snail").chosen == (first,)
    at = text.rindex("snail")
    assert tiny.looked(*asked, (at, at + 1)).chosen[0] > first
    assert tiny.looked(*asked).chosen == tiny.looked(*asked, -1).chosen == (len(tokens) - 1,)
    assert tiny.looked(*asked, len(tokens)).chosen == (len(tokens),)  # the one to come
    assert tiny.looked(SCENE, "Describe this picture.", "").chosen == (0,)
    for wrong, message in (
        (len(tokens) + 1, f"token {len(tokens) + 1} is asked for: from 0 on"),
        (-len(tokens) - 1, "is asked for: from 0 on"),
        ("dog", "the answer has no 'dog'"),
        ("", "the answer has no ''"),
        ((100, 120), "found the characters 100 to 120, but the answer has 29"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.looked(*asked, wrong)
    with pytest.raises(ValueError, match="nothing is shown"):
        tiny.looked(None, "Hello?", text)


def test_a_snail_is_where_its_coordinates_looked() -> None:
    """`tiny` looks at the object that it points to."""
    tiny = VLM("tiny")
    answer = tiny.point(SCENE, "snail")
    (snail,) = answer.points
    found = tiny.looked(SCENE, "Point to the snail.", answer, "</points>")
    (grid,) = found.images
    assert grid.shape == (6, 6) and grid.dtype == np.float32
    assert float(grid.sum()) == pytest.approx(1, abs=1e-5)
    row, col = np.unravel_index(int(grid.argmax()), grid.shape)
    side = 192 / 6
    assert math.hypot((col + 0.5) * side - snail.x, (row + 0.5) * side - snail.y) < 1.5 * side
    shown = json.loads(json.dumps(found.to_dict()))
    assert shown["images"][0]["rows"] == shown["images"][0]["cols"] == 6
    assert np.sum(shown["images"][0]["weights"]) == pytest.approx(1, abs=1e-4)
    assert shown["tokens"][shown["token"]] == "</points>" and "Weak evidence" in shown["note"]


def painted(weights: np.ndarray, index: np.ndarray, grids: list[np.ndarray], cells: Any) -> Any:
    """Each token's weight over its patches, these over a fine raster, that into cells.

    Args:
        index: (n, K) patches of the tokens. grids: of patches, each over the whole picture.
    """
    height = math.lcm(cells[0], *(len(grid) for grid in grids))
    width = math.lcm(cells[1], *(grid.shape[1] for grid in grids))
    raster = np.zeros((height, width))
    for grid in grids:
        of_patch = np.zeros(int(max(index.max(), grid.max())) + 1)
        for weight, patches in zip(weights, index, strict=True):
            known = patches[patches >= 0]
            of_patch[known] += weight / len(known)
        down, across = height // len(grid), width // grid.shape[1]
        raster += np.kron(of_patch[grid], np.full((down, across), 1 / (down * across)))
    rows, cols = cells
    return raster.reshape(rows, height // rows, cols, width // cols).sum(axis=(1, 3))


@pytest.mark.parametrize("size", [(150, 100), (100, 400), (60, 60)])
def test_overview_and_details_lie_on_one_grid(size: tuple[int, int], pointer: VLM) -> None:
    encoded = pointer.processor.encode([{"role": "user", "content": "?"}], [picture(0, size)])
    space, index = encoded.point_space, encoded.image_token_pooling
    assert space is not None and index is not None
    overview = np.arange(25).reshape(5, 5)  # the first crop: 5 x 5 patches, windows of 2 x 2
    (details,) = space.subpatch_mapping
    weights = np.random.default_rng(0).random(len(index)).astype(np.float32)
    (grid,) = _laid_out(weights, _views(pointer.model, pointer.processor, encoded))
    rows, cols = (n if n % 2 else n // 2 for n in details.shape)
    np.testing.assert_allclose(
        grid, painted(weights, index, [overview, details], (rows, cols)), rtol=1e-5
    )
    assert grid.sum() == pytest.approx(float(weights.sum()), rel=1e-5)


def test_an_answer_that_selects_points_is_gone_over_as_it_was_written(pointer: VLM) -> None:
    """The second pass chooses every text token of the answer again, from the same positions."""
    shot, question = picture(0, (150, 100)), "Point to the cups."
    answer = pointer.ask(shot, question, max_new_tokens=40, eos_token_id=None)
    assert len(answer.points) > 2
    encoded = pointer.processor.encode([{"role": "user", "content": question}], [shot])
    request = pointer._see(_longer(pointer.model, encoded, answer.token_ids[:-1]))
    assert request.inputs_embeds is not None and request.bidirectional is not None
    T, llm = len(encoded.input_ids), pointer.model.llm
    both = torch.from_numpy(request.bidirectional)[None]
    mask = sequence_mask(T + 39, image_tokens=both, device=torch.device("cpu"))
    with torch.no_grad():
        states = llm.states(request.inputs_embeds[None], torch.arange(T + 39)[None], mask)[0]
        chosen = llm.head(llm.norm(states[T - 1 :])).argmax(dim=-1).tolist()
    first = pointer.model.config.llm_config.num_embeddings
    pairs = [(a, b) for a, b in zip(answer.token_ids, chosen, strict=True) if a < first]
    assert pairs and sum(a == b for a, b in pairs) >= 0.9 * len(pairs)  # markers may be forbidden
    found = pointer.looked(shot, question, answer, -1)
    assert found.images[0].sum() == pytest.approx(1, abs=1e-5)
    # The same points as text, whose classes are tokens too.
    text = f'<points coords="{"".join(SELECTED.findall(answer.text)[:3])}1">cup'
    as_text = pointer.looked(shot, question, text, "cup")
    assert "".join(as_text.tokens) == text and as_text.chosen == tuple(
        range(len(as_text.tokens) - 3, len(as_text.tokens))
    )


def test_frames_of_a_video_have_grids_and_times(pointer: VLM) -> None:
    frames = Video(tuple(np.asarray(picture(k, (70, 70))) for k in range(3)), (0.0, 0.5, 1.0))
    found = pointer.looked(None, "Where?", "a dog", video=frames)
    assert found.times == (0.0, 0.5, 1.0) and len(found.images) == 3
    assert {grid.shape for grid in found.images} == {(5, 5)}  # windows of 3 do not fit: patches
    assert sum(found.shares) == pytest.approx(1)
    assert [one["time"] for one in found.to_dict()["images"]] == [0.0, 0.5, 1.0]


def test_a_resampler_has_no_places(vlm: VLM) -> None:
    connector = replace(vlm.model.config.connector, connector_type="resampler")
    config = replace(vlm.model.config, connector_config=connector)
    encoded = vlm.processor.encode([{"role": "user", "content": "?"}], [Image.new("RGB", (9, 9))])

    class Model:
        pass

    model: Any = Model()
    model.config = config
    with pytest.raises(ValueError, match="says nothing of places"):
        _views(model, vlm.processor, encoded)
