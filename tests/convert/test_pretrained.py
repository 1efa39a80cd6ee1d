"""Loading and saving: against transformers, bit for bit, and with files that are not right."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanomolmo2.convert import pretrained
from nanomolmo2.convert.pretrained import save_pretrained
from nanomolmo2.convert.tensor_files import open_safetensors, write_cache
from nanomolmo2.models import LanguageModel, NanoMolmo2, VisionEncoder
from tests.convert.checkpoints import (
    LLM,
    VISION,
    edit_json,
    edit_weights,
    make_nanomolmo2,
    make_qwen3,
    make_siglip,
)


def assert_same_bits(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert found_state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert found_state[name].dtype == tensor.dtype
        assert torch.equal(found_state[name].view(torch.uint8), tensor.view(torch.uint8)), name


# ---- reference checkpoints ----


@pytest.mark.parametrize("layout", ["whole", "tower", "tower with prefix", "tower without head"])
def test_siglip_equals_transformers(tmp_path: Path, layout: str) -> None:
    extra: dict[str, Any] = {"vision_use_head": False} if "without head" in layout else {}
    reference = make_siglip(tmp_path, whole=layout == "whole", **extra)
    if layout == "tower with prefix":  # what transformers 4 writes

        def add_prefix(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensors[f"vision_model.{name}"] = tensors.pop(name)

        edit_weights(tmp_path / "model.safetensors", add_prefix)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert encoder.config == VISION
    assert not encoder.training
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = reference(images).last_hidden_state
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}], ids=["one", "sharded"])
def test_qwen3_equals_transformers(tmp_path: Path, tied: bool, shards: dict[str, Any]) -> None:
    reference = make_qwen3(tmp_path, tied=tied, **shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 * len(shards)
    llm = LanguageModel.from_pretrained(tmp_path)
    assert ("lm_head.weight" in llm.state_dict()) is not tied
    ids = torch.randint(0, 120, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(llm(ids), reference(ids).logits, rtol=0, atol=2e-5)


def test_decoder_saved_without_its_head(tmp_path: Path) -> None:
    """Qwen3Model, unlike Qwen3ForCausalLM, leaves out the prefix ``model.``."""
    reference = make_qwen3(tmp_path / "whole")
    reference.model.save_pretrained(tmp_path / "body")
    assert_same_bits(
        LanguageModel.from_pretrained(tmp_path / "body"),
        LanguageModel.from_pretrained(tmp_path / "whole"),
    )


def test_tied_file_with_a_copy_of_the_embedding(tmp_path: Path) -> None:
    make_qwen3(tmp_path)
    before = LanguageModel.from_pretrained(tmp_path)

    def store_copies(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.rotary_emb.inv_freq"] = torch.zeros(5)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)

    edit_weights(tmp_path / "model.safetensors", store_copies)
    assert_same_bits(LanguageModel.from_pretrained(tmp_path), before)


def test_tied_file_whose_head_is_another_matrix(tmp_path: Path) -> None:
    """Dropping it would silently throw a trained head away."""
    make_qwen3(tmp_path)

    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    edit_weights(tmp_path / "model.safetensors", store_head)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not a copy.*tie_word_embeddings"):
        LanguageModel.from_pretrained(tmp_path)


def test_dtype_as_stored_or_as_asked(tmp_path: Path) -> None:
    make_qwen3(tmp_path, dtype=torch.bfloat16)
    stored = LanguageModel.from_pretrained(tmp_path)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    wide = LanguageModel.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in stored.state_dict().items():
        assert torch.equal(wide.state_dict()[name], tensor.float())
    named = LanguageModel.from_pretrained(tmp_path, dtype="float32")
    assert {p.dtype for p in named.parameters()} == {torch.float32}
    for wrong in ("int8", "bf16", torch.int64):
        with pytest.raises(ValueError, match=r"dtype is .*, expected a floating point"):
            LanguageModel.from_pretrained(tmp_path, dtype=wrong)


def test_each_class_says_what_the_folder_holds(siglip_folder: Path, qwen3_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: model_type 'siglip' is not a dense Qwen3"):
        LanguageModel.from_pretrained(siglip_folder)
    with pytest.raises(ValueError, match=r"model_type 'qwen3' is not a vision encoder"):
        VisionEncoder.from_pretrained(qwen3_folder)
    with pytest.raises(ValueError, match=r"'qwen3', expected 'nanomolmo2'.*LanguageModel\.from_"):
        NanoMolmo2.from_pretrained(qwen3_folder)


# ---- our own format ----


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    model = make_nanomolmo2()
    model.llm.to(torch.bfloat16)  # dtypes may differ between the parts
    model.save_pretrained(tmp_path / "a" / "model")
    first = NanoMolmo2.from_pretrained(tmp_path / "a" / "model")
    second = NanoMolmo2.from_pretrained(str(tmp_path / "a" / "model"))
    assert first.config == second.config == model.config
    assert_same_bits(first, model)
    assert_same_bits(second, model)
    assert not first.training
    assert {n for n, p in first.named_parameters() if not p.requires_grad} == {
        n for n, _ in first.named_parameters() if n.startswith("vision_encoder.")
    }
    modes = {p.stat().st_mode for p in (tmp_path / "a" / "model").iterdir()}
    assert len(modes) == 1  # safetensors alone would make the weights private
    saved_again = tmp_path / "b"
    first.save_pretrained(saved_again)
    for file in ("config.json", "model.safetensors", "README.md"):
        original = (tmp_path / "a" / "model" / file).read_bytes()
        assert (saved_again / file).read_bytes() == original
    assert json.loads((saved_again / "config.json").read_text())["model_type"] == "nanomolmo2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    make_nanomolmo2().save_pretrained(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        names = file.keys()
        rows = [n for n in names if tuple(file.get_slice(n).get_shape()) == (120, 48)]
    assert rows == ["llm.embed_tokens.weight"]


def test_sharded_save(tmp_path: Path) -> None:
    model = make_nanomolmo2()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_bits(NanoMolmo2.from_pretrained(tmp_path), model)


def test_saving_over_an_earlier_model(tmp_path: Path) -> None:
    """The index of an earlier, sharded save once decided which weights were loaded."""
    model = make_nanomolmo2()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("my own words")
    with torch.no_grad():
        model.llm.norm.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert_same_bits(NanoMolmo2.from_pretrained(tmp_path), model)


def test_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_nanomolmo2()
    model.save_pretrained(tmp_path / "old")
    changed = make_nanomolmo2()
    torch.nn.init.ones_(changed.llm.embed_tokens.weight)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "write_weights", no_space)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space"):
            changed.save_pretrained(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert_same_bits(NanoMolmo2.from_pretrained(tmp_path / "old"), model)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        make_nanomolmo2().save_pretrained(tmp_path / "model")


def test_parts_of_a_whole_model(tmp_path: Path) -> None:
    model = make_nanomolmo2()
    model.save_pretrained(tmp_path)
    assert_same_bits(VisionEncoder.from_pretrained(tmp_path), model.vision_encoder)
    assert_same_bits(LanguageModel.from_pretrained(tmp_path), model.llm)


def test_parts_are_saved_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    llm, encoder = LanguageModel(LLM).eval(), VisionEncoder(VISION).eval()
    save_pretrained(llm, tmp_path / "llm")
    save_pretrained(encoder, tmp_path / "vision")
    assert_same_bits(LanguageModel.from_pretrained(tmp_path / "llm"), llm)
    assert_same_bits(VisionEncoder.from_pretrained(tmp_path / "vision"), encoder)
    ids, images = torch.randint(0, 120, (1, 7)), torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
        torch.testing.assert_close(llm(ids), theirs(ids).logits, rtol=0, atol=2e-5)
        tower = AutoModel.from_pretrained(tmp_path / "vision")
        expected = tower(images).last_hidden_state
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=2e-5)


def test_a_shortened_encoder_is_not_a_siglip_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        save_pretrained(VisionEncoder(VISION, num_layers=2), tmp_path / "vision")
    assert not list(tmp_path.iterdir())


def test_model_card_counts_the_parameters(tmp_path: Path) -> None:
    model = make_nanomolmo2()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"| Total | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert f"{model.config.num_visual_tokens} visual tokens" in card
    assert "license: apache-2.0" in card


# ---- files that are not right ----


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (folder / "model.safetensors").write_text(text)


def wrong_shape(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["llm.norm.weight"] = torch.ones(47)

    edit_weights(folder / "model.safetensors", change)


def quantised(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["llm.norm.weight"] = torch.ones(48, dtype=torch.int8)

    edit_weights(folder / "model.safetensors", change)


def missing_tensor(folder: Path) -> None:
    edit_weights(folder / "model.safetensors", lambda tensors: tensors.pop("llm.norm.weight"))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'image_token_id': 1}")


def not_an_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def unknown_field(folder: Path) -> None:
    edit_json(folder / "config.json", surprise=1)


def wrong_type(folder: Path) -> None:
    edit_json(folder / "config.json", image_token_id="100")


def wrong_sizes(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", llm_config={**values["llm_config"], "intermediate_size": 81})


def endless_depth(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit_json(
        folder / "config.json", llm_config={**values["llm_config"], "num_hidden_layers": 10**9}
    )


def endless_width(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", llm_config={**values["llm_config"], "vocab_size": 10**30})


BREAKAGES = {
    endless_depth: r"asks for 1000000000 blocks, but the weights are \d+ tensors",
    endless_width: r"sizes that can not be built",
    cut: "not a whole safetensors file.*download or copy it again",
    cut_header: "not a whole safetensors file",
    empty_file: "not a whole safetensors file.*0 bytes",
    huge_header: "not a whole safetensors file",
    lfs_pointer: "git lfs pull",
    wrong_shape: r"llm\.norm\.weight is \[47\], expected \[48\]",
    quantised: r"llm\.norm\.weight is stored as I8",
    missing_tensor: r"1 missing: llm\.norm\.weight",
    only_a_pickle: r"pytorch_model\.bin is a pickle",
    no_config: r"holds no config\.json",
    empty_folder: r"holds no config\.json",
    not_json: r"config\.json is not valid JSON",
    not_an_object: r"config\.json: expected a JSON object",
    unknown_field: r"config\.json: NanoMolmo2Config does not know the field\(s\) surprise",
    wrong_type: r"config\.json: NanoMolmo2Config\.image_token_id: expected int, found '100'",
    wrong_sizes: r"9 of another shape.*and 5 more",
}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda b: b.__name__)
def test_broken_checkpoint(tmp_path: Path, breakage: Any) -> None:
    make_nanomolmo2().save_pretrained(tmp_path / "model")
    breakage(tmp_path / "model")
    with pytest.raises(ValueError, match=BREAKAGES[breakage]) as caught:
        NanoMolmo2.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)
    if breakage is not endless_width:
        assert str(tmp_path / "model") in str(caught.value)  # which file it was


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", "points outside its folder"),
        ("/etc/hostname", "points outside its folder"),
        ("sub/x.safetensors", "points outside its folder"),
        ("..\\outside.safetensors", "points outside its folder"),
        ("..", "points outside its folder"),
        ("missing.safetensors", r"1 of \d weight files are missing: missing\.safetensors"),
        ("two\nlines.safetensors", r"weight files are missing: two\\nlines\.safetensors;"),
        ("x" * 200, r"weight files are missing: x{80};"),
        (3, "expected weight_map to map"),
    ],
)
def test_index_that_names_a_wrong_file(tmp_path: Path, file: Any, message: str) -> None:
    folder = tmp_path / "model"
    make_nanomolmo2().save_pretrained(folder, max_shard_size="200KB")
    save_file({"llm.norm.weight": torch.ones(48)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "llm.norm.weight": file})
    with pytest.raises(ValueError, match=message):
        NanoMolmo2.from_pretrained(folder)


def test_missing_shard_and_shards_of_two_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_nanomolmo2().save_pretrained(folder, max_shard_size="50KB")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=f"files are missing: {first.name}"):
        NanoMolmo2.from_pretrained(folder)
    shutil.copy(second, first)
    with pytest.raises(ValueError, match="the shards are of different checkpoints"):
        NanoMolmo2.from_pretrained(folder)
    first.write_bytes(kept)
    NanoMolmo2.from_pretrained(folder)


FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "README.md")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "of the kernel"])
@pytest.mark.parametrize("file", FILES)
def test_only_regular_files_of_a_folder_are_opened(tmp_path: Path, kind: str, file: str) -> None:
    """A named pipe would wait for ever, and /dev/zero has no end."""
    model = make_nanomolmo2()
    model.save_pretrained(tmp_path, max_shard_size="200KB" if "index" in file else "5GB")
    path = tmp_path / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/proc/self/status")
    if file == "README.md":
        model.save_pretrained(tmp_path)  # the card is not read as text, and no file of ours
        assert_same_bits(NanoMolmo2.from_pretrained(tmp_path), model)
        return
    with pytest.raises(ValueError, match=rf"{file} is .*expected a regular file"):
        NanoMolmo2.from_pretrained(tmp_path)


def test_a_shard_that_is_a_pipe(tmp_path: Path) -> None:
    make_nanomolmo2().save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*"))[2]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=rf"{shard.name} is a device or a pipe"):
        NanoMolmo2.from_pretrained(tmp_path)


def write_header(path: Path, header: Any, content: bytes = b"", padding: int = 0) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def entry(first: int, last: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "content", "reason"),
    [
        ({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, 12, "overlap or leave gaps"),
        ({"a": entry(0, 8, 2), "b": entry(0, 8, 2)}, 8, "overlap or leave gaps"),
        ({"a": entry(4, 12, 2)}, 12, "overlap or leave gaps"),
        ({"a": entry(0, 8, 2)}, 12, "do not end where the file ends"),
        ({"a": entry(0, 8, 2)}, 4, "do not end where the file ends"),
        ({"a": entry(0, 8, 10**9)}, 8, "'a' has not the size of its shape"),
        ({"a": entry(0, 8, -1, -2)}, 8, "'a' in its header has no shape or no place"),
        ({"a": entry(0, 0, *[2**60] * 9)}, 0, "'a' in its header has no shape or no place"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8, "'a' in its header"),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "'a' in its header"),
        ({"a": 5}, 0, "'a' in its header is no tensor"),
        ([1], 0, "its header is no JSON object"),
        (b"\xff\xfe", 0, "decode"),
        (b"[" * 100_000, 0, "recursion"),
    ],
)
def test_a_header_that_is_not_true(header: Any, content: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, header, bytes(content))
    with pytest.raises(ValueError, match=rf"not a whole safetensors file \(.*{reason}") as caught:
        open_safetensors(tmp_path)
    assert len(str(caught.value).replace(str(path), "")) < 300


def test_a_header_of_99_megabytes(tmp_path: Path) -> None:
    """It was parsed into gigabytes before anything was compared with the file."""
    path = tmp_path / "model.safetensors"
    write_header(path, {"a": entry(0, 8, 2)}, bytes(8), padding=99_000_000)
    before = time.process_time()
    with pytest.raises(
        ValueError, match=r"its header has 99,000,0\d\d bytes, expected at most 8,0"
    ):
        open_safetensors(tmp_path)
    assert time.process_time() - before < 1
    write_header(path, {"a": entry(0, 8, 2)}, bytes(8), padding=7_000_000)
    assert open_safetensors(tmp_path)["a"].read().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["nothing", "/nowhere/at/all", "../a/b", "C:\\x", ""])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="there is no model"):
        NanoMolmo2.from_pretrained(name)


def test_a_weights_file_is_not_a_folder(tmp_path: Path) -> None:
    make_nanomolmo2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file: name the folder"):
        NanoMolmo2.from_pretrained(tmp_path / "model.safetensors")


# ---- the cache ----


def make_cache(path: Path, module: torch.nn.Module, **changes: Any) -> None:
    is_vision = isinstance(module, VisionEncoder)
    values: dict[str, Any] = {
        "component": "vision_encoder" if is_vision else "llm",
        "config": module.config.to_dict(),  # type: ignore[operator, union-attr]
        "source": {"repo": "Qwen/Qwen3-0.6B-Base", "revision": "main", "commit": "c0ffee"},
        "state_dict": module.state_dict(),
    }
    write_cache(path, **{**values, **changes})


@pytest.mark.usefixtures("small_parts")
def test_cache_is_mapped_and_can_be_trained(tmp_path: Path) -> None:
    """Weights are views of the file; an optimiser step must not write into it."""
    llm = LanguageModel(LLM)
    path = tmp_path / "qwen3_0.6b_base.pt"
    make_cache(path, llm)
    before = path.read_bytes()
    loaded = LanguageModel.from_pretrained(cache_dir=tmp_path)
    assert_same_bits(loaded, llm)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert_same_bits(LanguageModel.from_pretrained(path), llm)  # a file by its path
    half = LanguageModel.from_pretrained(cache_dir=tmp_path, dtype=torch.float16)
    for name, tensor in llm.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.half())


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (self.path,))  # type: ignore[return-value]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["torch.save", "inside state_dict", "pickle", "old torch.save"])
def test_code_in_a_cache_file_does_not_run(tmp_path: Path, kind: str) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "qwen3_0.6b_base.pt"
    payload: Any = Payload(ran)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif kind == "inside state_dict":
        make_cache(path, LanguageModel(LLM), state_dict={"norm.weight": payload})
    else:
        old = kind.startswith("old")
        torch.save(payload, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"not a weight cache.*can not load safely") as caught:
        LanguageModel.from_pretrained(cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    pickle.loads(pickle.dumps(payload))
    assert ran.exists()  # the payload does work where it is trusted


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"component": "vision_encoder"}, "holds another model: found vision_encoder"),
        ({"source": {"repo": "Qwen/Qwen3-4B"}}, r"found llm of Qwen/Qwen3-4B, expected llm of"),
        (
            {"config": {**LLM.to_dict(), "hidden_size": 50}},
            "hidden_size 50 instead of 48.*download --force.*cache_dir=None",
        ),
        ({"config": 3}, "config of type int"),
        ({"state_dict": {f"x{i}": torch.ones(1) for i in range(9)}}, "35 missing.*9 not known"),
        ({"state_dict": {"norm.weight": torch.ones(48).long()}}, "not floating point"),
    ],
)
def test_cache_file_of_another_model(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_cache(tmp_path / "qwen3_0.6b_base.pt", LanguageModel(LLM), **changes)
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_pretrained(cache_dir=tmp_path)


def expanded() -> dict[str, Any]:
    """Every row is the same one: 4 bytes in the file."""
    state = LanguageModel(LLM).state_dict()
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}


def overlapping() -> dict[str, Any]:
    """All tensors lie in the memory of the largest."""
    state = LanguageModel(LLM).state_dict()
    memory = torch.zeros(max(t.numel() for t in state.values()))
    return {n: memory[: t.numel()].view(t.shape) for n, t in state.items()}


def transposed() -> dict[str, Any]:
    state = LanguageModel(LLM).state_dict()
    return {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}


def sparse() -> dict[str, Any]:
    index = torch.zeros(1, 1, dtype=torch.long)
    return {"norm.weight": torch.sparse_coo_tensor(index, torch.ones(1), (10**12,))}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (expanded, "rows do not lie one behind the other"),
        (overlapping, r"tensors of [\d,]+ bytes in a file of"),
        (transposed, "rows do not lie one behind the other"),
        (sparse, "no plain tensors|can not load safely"),
    ],
)
def test_tensors_that_say_more_than_the_file_holds(
    state: Any, message: str, tmp_path: Path
) -> None:
    """They would become as large as they say when they are cast or quantised."""
    make_cache(tmp_path / "qwen3_0.6b_base.pt", LanguageModel(LLM), state_dict=state())
    with pytest.raises(ValueError, match=rf"is not a weight cache: found .*({message})"):
        LanguageModel.from_pretrained(cache_dir=tmp_path)


@pytest.mark.usefixtures("small_parts")
def test_a_cache_that_is_compressed_or_no_file(tmp_path: Path) -> None:
    path, small = tmp_path / "qwen3_0.6b_base.pt", tmp_path / "small"
    make_cache(path, LanguageModel(LLM))
    path.with_suffix(".json").unlink()
    with (
        zipfile.ZipFile(path) as whole,
        zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    small.replace(path)
    with pytest.raises(ValueError, match=r"not a weight cache.*it is compressed"):
        LanguageModel.from_pretrained(cache_dir=tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"qwen3_0\.6b_base\.pt is a device or a pipe"):
        LanguageModel.from_pretrained(cache_dir=tmp_path)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("place", ["config", "source"])
def test_a_config_that_holds_itself(place: str, tmp_path: Path) -> None:
    """Written out, fifty lists of fifty lists of ... are more than the universe holds."""
    shared: Any = [0] * 50
    for _ in range(50):
        shared = [shared] * 50
    path = tmp_path / "x.pt"
    make_cache(path, LanguageModel(LLM))
    payload = torch.load(path, weights_only=True)
    torch.save({**payload, place: {"hidden_size": shared}}, path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="not made of a few numbers and names"):
        LanguageModel.from_pretrained(path)


@pytest.mark.usefixtures("small_parts")
def test_files_that_are_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "qwen3_0.6b_base.pt"
    for content in (b"", b"hello", b"PK\x03\x04 not really"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a weight cache"):
            LanguageModel.from_pretrained(cache_dir=tmp_path)
    for value in (
        {"norm.weight": torch.ones(3)},
        [1],
        {"format": "nanomolmo2", "format_version": 9},
    ):
        torch.save(value, path)
        with pytest.raises(ValueError, match="is not a weight cache"):
            LanguageModel.from_pretrained(cache_dir=tmp_path)


@pytest.mark.usefixtures("small_parts")
def test_cut_cache_file(tmp_path: Path) -> None:
    path = tmp_path / "qwen3_0.6b_base.pt"
    make_cache(path, LanguageModel(LLM))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"recorded \d+: it was cut or replaced.*--force"):
        LanguageModel.from_pretrained(cache_dir=tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="is not a weight cache"):
        LanguageModel.from_pretrained(cache_dir=tmp_path)
