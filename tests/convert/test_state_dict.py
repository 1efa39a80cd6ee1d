"""Tables and renaming: strict, complete, and the same way back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nanomolmo2.convert.state_dict import check_keys, from_reference, to_reference
from nanomolmo2.convert.tables import QWEN3, QWEN3_PREFIX, SIGLIP2, SIGLIP2_PREFIX, Table
from nanomolmo2.convert.tensor_files import open_safetensors
from nanomolmo2.models import LanguageModel, LLMConfig, VisionEncoder
from tests.convert.checkpoints import LLM, VISION, make_qwen3, make_siglip


def ours() -> list[tuple[nn.Module, Table, str]]:
    untied = LLMConfig(**{**LLM.to_dict(), "tie_word_embeddings": False})
    return [
        (VisionEncoder(VISION), SIGLIP2, SIGLIP2_PREFIX),
        (LanguageModel(untied), QWEN3, QWEN3_PREFIX),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["siglip2", "qwen3"])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_there_and_back_again(which: int, with_prefix: bool) -> None:
    module, table, prefix = ours()[which]
    state_dict = module.state_dict()
    reference = to_reference(state_dict, table)
    assert set(reference).isdisjoint(state_dict) or which == 1  # lm_head.weight is the same name
    if not with_prefix:
        reference = {name.removeprefix(prefix): tensor for name, tensor in reference.items()}
    back = from_reference(reference, table, expected=state_dict, prefix=prefix)
    assert back.keys() == state_dict.keys()
    assert all(back[name] is state_dict[name] for name in back)


def test_every_row_is_used_by_real_files(tmp_path: Path) -> None:
    """A row that no file of transformers has would be a typing error in the table."""
    make_siglip(tmp_path / "siglip", whole=True)
    make_qwen3(tmp_path / "qwen3", tied=False)
    for table, folder in ((SIGLIP2, "siglip"), (QWEN3, "qwen3")):
        names = open_safetensors(tmp_path / folder)
        used = {re.sub(r"\.\d+\.", ".{}.", name) for name in names}
        assert used <= set(table)
        # transformers computes these; other converters store them.
        assert set(table) - used == {row for row in table if "rotary_emb" in row}


def test_every_parameter_has_a_row() -> None:
    for module, table, _ in ours():
        patterns = {re.sub(r"\.\d+\.", ".{}.", name) for name in module.state_dict()}
        assert patterns == {row for row in table.values() if row is not None}


def test_our_names_are_given_once() -> None:
    """Two rows with one target would make the way back ambiguous."""
    for table in (SIGLIP2, QWEN3):
        targets = [row for row in table.values() if row is not None]
        assert len(targets) == len(set(targets))


def test_one_error_lists_everything_that_is_wrong() -> None:
    module, table, prefix = ours()[0]
    state_dict = module.state_dict()
    reference = to_reference(state_dict, table)
    del reference["vision_model.post_layernorm.bias"]
    reference["vision_model.encoder.layers.0.mlp.fc1.bias"] = torch.zeros(3)
    reference["vision_model.surprise"] = torch.zeros(1)
    reference["vision_model.encoder.layers.3.mlp.fc1.bias"] = torch.zeros(56)  # a block too many
    with pytest.raises(ValueError) as caught:
        from_reference(reference, table, expected=state_dict, prefix=prefix, source="x.safetensors")
    message = str(caught.value)
    assert "x.safetensors" in message
    assert "1 missing: vision_model.post_layernorm.bias" in message
    assert "2 not known" in message
    assert "vision_model.surprise" in message
    assert "vision_model.encoder.layers.3.mlp.fc1.bias" in message
    assert "vision_model.encoder.layers.0.mlp.fc1.bias is [3], expected [56]" in message


def test_many_wrong_names_are_counted() -> None:
    module, table, prefix = ours()[0]
    with pytest.raises(ValueError, match=r"53 missing: .* and 47 more"):
        from_reference({}, table, expected=module.state_dict(), prefix=prefix)


def test_many_wrong_shapes_stay_one_readable_sentence() -> None:
    name, shapes = "connector.pooling.layers.0.self_attn.q_proj.weight", ([4096, 4096], [8192, 1])
    with pytest.raises(
        ValueError, match=r"11 of another shape: .* is \[4096, 4096\].*more"
    ) as said:
        check_keys(
            missing=[], unused=[], misshapen={f"{name}{n}": shapes for n in range(11)}, source="x"
        )
    assert len(str(said.value)) < 600


def test_a_tensor_stored_with_and_without_prefix_is_an_error() -> None:
    """Which of the two would be the weight?"""
    module, table, prefix = ours()[1]
    reference = to_reference(module.state_dict(), table)
    reference["norm.weight"] = reference["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 not known: norm\.weight"):
        from_reference(reference, table, expected=module.state_dict(), prefix=prefix)


def test_names_without_a_place_in_the_reference_format() -> None:
    with pytest.raises(ValueError, match=r"not known: connector\.proj\.weight"):
        to_reference({"connector.proj.weight": torch.zeros(1)}, QWEN3)
