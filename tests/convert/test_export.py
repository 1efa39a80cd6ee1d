"""Exporting a model with its processor: the files, what they say, and the way back."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

import nanomolmo2
from nanomolmo2.convert import export, export_molmo2
from nanomolmo2.convert.molmo2_processor import TEMPLATE, read_molmo2_processor
from nanomolmo2.convert.pretrained import check_agreement
from nanomolmo2.convert.tensor_files import open_safetensors
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import MultiCrop, Processor, ProcessorConfig, Tokenizer, VideoConfig
from nanomolmo2.processor.chat import STYLES_WITHOUT_PREFIX
from tests import small_model as small
from tests.convert.checkpoints import edit_json
from tests.small_model import small_processor

FILES = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("model.safetensors", "nanomolmo2_processor.json", "preprocessor_config.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("video_preprocessor_config.json", "configuration_molmo2.py", "image_processing_molmo2.py"),
    *("modeling_molmo2.py", "processing_molmo2.py", "video_processing_molmo2.py"),
}
BOS = "<|im_end|>"


def small_model(seed: int = 0, **changes: Any) -> NanoMolmo2:
    """Random weights; all special tokens of a picture count in the mask, as in Molmo2."""
    torch.manual_seed(seed)
    config = small.small_config(small_processor())
    special = tuple(config.llm_config.vocab_size + i for i in (0, 1, 3, 4, 6, 7, 8))
    return NanoMolmo2(replace(config, **{"image_special_token_ids": special, **changes})).eval()


def crops_processor(**changes: Any) -> Processor:
    """Crops of 64 pixels with 4 x 4 patches, `tiny`'s vocabulary."""
    crops = MultiCrop(max_crops=3, image_size=64, patch_size=16, overlap_margins=(1, 1))
    video = VideoConfig(max_frames=20, max_fps=1.0)
    config = ProcessorConfig.molmo2(**{"multicrop": crops, "video": video, **changes})
    return Processor(config, small_processor().tokenizer)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, exported."""
    folder = tmp_path_factory.mktemp("tiny") / "out"
    model, processor = nanomolmo2.load("tiny")
    said = "one view of 192 x 192 pixels without crops|no part that finds by example"
    with pytest.warns(UserWarning, match=said) as caught:
        export_molmo2(model, folder, processor)
    assert len(caught) == 2
    return folder


def remarks(model: NanoMolmo2, folder: Path, *arguments: Any) -> list[str]:
    """What an export says beside its work."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_molmo2(model, folder, *arguments)
    return [str(warning.message) for warning in caught]


def export_quietly(model: NanoMolmo2, folder: Path, *arguments: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_molmo2(model, folder, *arguments, **options)


def test_the_files(tiny: Path) -> None:
    assert {p.name for p in tiny.iterdir()} == FILES
    config = json.loads((tiny / "config.json").read_text())
    assert config["model_type"] == "molmo2"
    assert config["architectures"] == ["Molmo2ForConditionalGeneration"]
    assert config["tie_word_embeddings"] is False
    assert config["image_patch_id"] == config["image_high_res_id"] == 738
    assert config["image_start_token_id"] == 736
    assert (config["frame_start_token_id"], config["frame_end_token_id"]) == (736, 737)
    assert config["is_mm_prefix_lm"] is True
    assert config["dtype"] == "bfloat16"
    assert config["transformers_version"] == "5.23.0"
    assert open_safetensors(tiny)["lm_head.weight"].shape == (736, 256)
    assert "without crops" in (tiny / "README.md").read_text()


def test_trap_10_a_prompt_begins_with_the_token_that_ends_an_answer(tiny: Path) -> None:
    generation = json.loads((tiny / "generation_config.json").read_text())
    ids = Tokenizer.from_file(tiny).special_ids
    assert generation["bos_token_id"] == ids["<|im_end|>"] == 708
    assert generation["eos_token_id"] == [708, 706]
    assert generation["pad_token_id"] == ids["<|endoftext|>"]
    assert generation["do_sample"] is False  # greedy in transformers,
    assert generation["temperature"] == 0  # and in vLLM
    assert generation["transformers_version"] == "5.23.0"
    tokens = json.loads((tiny / "tokenizer_config.json").read_text())
    assert tokens["bos_token"] == tokens["eos_token"] == "<|im_end|>"
    assert tokens["pad_token"] == "<|endoftext|>"
    assert tokens["add_bos_token"] is False
    assert tokens["padding_side"] == "left"


def test_tiny_comes_back_with_the_same_bits_and_answers(tiny: Path) -> None:
    model, processor = nanomolmo2.load("tiny")
    again, its_processor = nanomolmo2.load(tiny)
    assert its_processor.config == processor.config
    ours = {name: x for name, x in model.state_dict().items() if not name.startswith("finder.")}
    theirs = again.state_dict()
    assert again.finder is None and model.finder is not None
    assert theirs.keys() - ours.keys() == {"llm.lm_head.weight"}
    for name, weight in ours.items():
        assert torch.equal(theirs[name], weight), name
    head = model.llm.embed_tokens.weight[: model.config.llm_config.vocab_size]
    assert torch.equal(theirs["llm.lm_head.weight"], head)
    scene = "nanomolmo2/assets/demo/scene.png"
    for question in ("Point to the dog.", "Point to the snail.", "Describe this picture."):
        expected = nanomolmo2.Pipeline(model, processor).ask(scene, question)
        found = nanomolmo2.Pipeline(again, its_processor).ask(scene, question)
        assert (found.text, found.points) == (expected.text, expected.points)


def test_tiny_in_transformers(tiny: Path) -> None:
    from transformers import AutoTokenizer, Molmo2ForConditionalGeneration

    model, processor = nanomolmo2.load("tiny", dtype=torch.float32)
    theirs, report = Molmo2ForConditionalGeneration.from_pretrained(
        tiny, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    picture = Image.effect_noise((192, 192), 80).convert("RGB")
    encoded = processor.encode(
        [{"role": "user", "content": "Describe this picture."}], images=[picture]
    )
    ids = torch.from_numpy(encoded.input_ids)[None]
    pixels = torch.from_numpy(np.asarray(encoded.pixel_values))
    P, side = 16, 12
    patches = pixels.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 4, 5, 1)
    index = torch.arange(side * side).view(6, 2, 6, 2).transpose(1, 2).reshape(36, 4)
    with torch.no_grad():
        found = model(ids, pixels)
        expected = theirs.eval()(
            ids,
            pixel_values=patches.flatten(3).flatten(1, 2),
            image_token_pooling=index,
            image_grids=torch.tensor([[6, 6, 0, 0]]),
            image_num_crops=torch.tensor([1]),
            mm_token_type_ids=(ids >= 736).long(),
        ).logits
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (708, 708)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (706, "left")
    messages = [{"role": "user", "content": "Point to the dog."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = processor.encode(messages)
    assert tokenizer(text)["input_ids"] == plain.input_ids.tolist()


def test_crops_go_through_the_official_files(tmp_path: Path) -> None:
    processor = crops_processor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small_model()
        with torch.no_grad():
            model.llm.embed_tokens.weight[model.config.image_token_id] = 0
        export_molmo2(model, tmp_path, processor)  # nothing to remark
    assert "Remarks" not in (tmp_path / "README.md").read_text()
    assert nanomolmo2.load(tmp_path)[1].config == processor.config
    (tmp_path / "nanomolmo2_processor.json").unlink()
    again, its_processor = nanomolmo2.load(tmp_path)
    picture = Image.effect_noise((150, 90), 80).convert("RGB")
    expected, answer = (
        nanomolmo2.Pipeline(*pair).ask(picture, "Dogs?", max_new_tokens=8).text
        for pair in ((model, processor), (again, its_processor))
    )
    assert answer == expected
    found = its_processor.config
    assert found.multicrop == processor.config.multicrop
    assert found.video == processor.config.video
    assert found.chat_format == "molmo2"
    official = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert official["image_processor_type"] == "Molmo2ImageProcessor"
    assert official["size"] == {"height": 64, "width": 64}
    assert official["pooling_size"] == [2, 2]
    assert official["overlap_margins"] == [1, 1]
    layout = json.loads((tmp_path / "processor_config.json").read_text())
    assert layout["use_single_crop_col_tokens"] is False
    assert layout["use_frame_special_tokens"] is False


def test_settings_that_transformers_keeps_in_one_file(tmp_path: Path) -> None:
    """Its newer versions put the picture and video settings into processor_config.json."""
    processor = crops_processor()
    export_quietly(small_model(), tmp_path, processor)
    (tmp_path / "nanomolmo2_processor.json").unlink()
    parts = {}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        parts[name] = json.loads((tmp_path / name).read_text())
        (tmp_path / name).unlink()
    edit_json(
        tmp_path / "processor_config.json",
        image_processor=parts["preprocessor_config.json"],
        video_processor=parts["video_preprocessor_config.json"],
    )
    found = read_molmo2_processor(tmp_path).config
    assert (found.multicrop, found.video) == (processor.config.multicrop, processor.config.video)


def test_a_folder_without_the_layout_is_taken_as_released(tmp_path: Path) -> None:
    processor = crops_processor()
    export_quietly(small_model(), tmp_path, processor)
    for name in ("nanomolmo2_processor.json", "processor_config.json"):
        (tmp_path / name).unlink()
    found = read_molmo2_processor(tmp_path).config
    assert (found.multicrop, found.video) == (processor.config.multicrop, processor.config.video)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("processor_config.json", {"image_use_col_tokens": False}, "image_use_col_tokens is False"),
        ("processor_config.json", {"use_single_crop_col_tokens": None}, "use_single_crop_col"),
        ("processor_config.json", {"use_single_crop_start_token": False}, "single_crop_start"),
        ("processor_config.json", {"video_use_col_tokens": True}, "video_use_col_tokens is True"),
        ("preprocessor_config.json", {"size": {"height": 64, "width": 32}}, "only squares"),
        ("preprocessor_config.json", {"pooling_size": [2, 3]}, "only squares"),
        ("preprocessor_config.json", {"resample": 3}, "resample is 3"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("preprocessor_config.json", {"max_crops": 0}, "max_crops"),
        ("video_preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "frames other"),
    ],
)
def test_processor_settings_not_built_here(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    export_quietly(small_model(), tmp_path, crops_processor())
    (tmp_path / "nanomolmo2_processor.json").unlink()
    edit_json(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=message):
        read_molmo2_processor(tmp_path)


def test_a_folder_without_processor_files(tmp_path: Path) -> None:
    assert "no processor was given" in remarks(small_model(), tmp_path)[0]
    NanoMolmo2.from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"tokenizer"):
        nanomolmo2.load(tmp_path)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ({"image_size": 80}, "pixels a side of a crop: 80, the model expects 64"),
        ({"patch_size": 8}, "pixels a side of a patch: 8, the model expects 16"),
        ({"pooling_size": 3}, "patches a side of a window: 3, the model expects 2"),
    ],
)
def test_crops_of_another_model(crops: dict[str, int], message: str) -> None:
    processor = crops_processor()
    check_agreement(small_model().config, processor)
    assert processor.config.multicrop is not None
    other = crops_processor(multicrop=replace(processor.config.multicrop, **crops))
    with pytest.raises(ValueError, match=f"does not belong to the model: {message}"):
        check_agreement(small_model().config, other)


def test_the_remark_on_the_image_tokens_row(tmp_path: Path) -> None:
    """Programs that replace the embedding instead of adding to it would differ."""
    model = small_model()
    assert not remarks(model, tmp_path, crops_processor())
    with torch.no_grad():
        model.llm.embed_tokens.weight[model.config.image_token_id] = 0.1
    (remark,) = remarks(model, tmp_path, crops_processor())
    assert "embedding of the image token is not zero" in remark
    assert "embedding of the image token is not zero" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "changes", [{"bidirectional_image_attention": False}, {"image_special_token_ids": ()}]
)
def test_the_remark_on_another_mask(tmp_path: Path, changes: dict[str, Any]) -> None:
    (remark,) = remarks(small_model(**changes), tmp_path, crops_processor())
    assert "not made for image tokens that see each other" in remark


@pytest.mark.parametrize("both_ways", [True, False])
def test_the_mask_is_stated_and_read_back(tmp_path: Path, both_ways: bool) -> None:
    model = small_model(bidirectional_image_attention=both_ways)
    export_quietly(model, tmp_path, crops_processor())
    assert json.loads((tmp_path / "config.json").read_text())["is_mm_prefix_lm"] is both_ways
    again = NanoMolmo2.from_pretrained(str(tmp_path))
    assert again.config.bidirectional_image_attention is both_ways
    edit_json(tmp_path / "config.json", is_mm_prefix_lm="no")
    with pytest.raises(ValueError, match="is_mm_prefix_lm is 'no', expected True"):
        NanoMolmo2.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("marked", [False, True])
def test_frames_have_the_ids_of_the_tokens_that_mark_them(tmp_path: Path, marked: bool) -> None:
    """vLLM puts the embeddings of these two around every frame, whatever the prompt has there."""
    processor = crops_processor(video=VideoConfig(max_frames=20, use_frame_special_tokens=marked))
    model = small_model()
    export_quietly(model, tmp_path, processor)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_frame_special_tokens"] is marked
    ids = processor.tokenizer.special_ids
    names = ("<frame_start>", "<frame_end>") if marked else ("<im_start>", "<im_end>")
    found = (config["frame_start_token_id"], config["frame_end_token_id"])
    assert found == tuple(ids[name] for name in names)
    # The tokens of frames count in the mask either way, as before the export.
    again = NanoMolmo2.from_pretrained(str(tmp_path)).config
    assert set(again.image_special_token_ids) == set(model.config.image_special_token_ids)


def test_the_remark_on_the_layout_of_tiny_is_true(tiny: Path) -> None:
    """82 tokens for 38: what the written settings make of a picture."""
    text = " ".join((tiny / "README.md").read_text().split())
    assert "82 tokens for 38" in text
    assert "`<im_start>` to `<im_end>`) of 6 rows that end with `<im_col>`" in text
    picture = Image.new("RGB", (300, 200))
    question = [{"role": "user", "content": "Describe this picture."}]
    own = nanomolmo2.load(tiny)[1]
    official = json.loads((tiny / "preprocessor_config.json").read_text())
    crops = MultiCrop(
        max_crops=official["max_crops"],
        image_size=official["size"]["height"],
        patch_size=official["patch_size"],
        overlap_margins=tuple(official["overlap_margins"]),
    )
    theirs = Processor(ProcessorConfig.molmo2(multicrop=crops), own.tokenizer)
    lengths = [
        len(p.encode(question, [picture]).input_ids) - len(p.encode(question).input_ids)
        for p in (own, theirs)
    ]
    assert lengths == [38, 82]
    video = json.loads((tiny / "video_preprocessor_config.json").read_text())
    assert video["pooling_size"] == [2, 2]  # a frame has the 36 tokens of a picture


def test_a_failed_export_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_quietly(small_model(), tmp_path / "old")
    before = {p: p.read_bytes() for p in (tmp_path / "old").iterdir()}

    def no_space(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "write_weights", no_space)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space"):
            export_molmo2(small_model(seed=1), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_an_export_replaces_an_earlier_one_but_not_a_card_of_ones_own(tmp_path: Path) -> None:
    export_quietly(small_model(), tmp_path, max_shard_size="20KB")
    (tmp_path / "README.md").write_text("my own words")
    export_quietly(small_model(seed=1), tmp_path)
    assert not list(tmp_path.glob("model-*"))
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert torch.equal(
        NanoMolmo2.from_pretrained(str(tmp_path)).llm.norm.weight,
        small_model(seed=1).llm.norm.weight,
    )


# ---- the chat template ----


def rendered(messages: Any, add_generation_prompt: bool = True) -> str:
    """As transformers renders a template."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def user(*items: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(items)}


TEXT, PICTURE = {"type": "text", "text": "Hi"}, {"type": "image"}
TURN = "<|im_start|>user\nHi<|im_end|>\n"
ASK = "<|im_start|>assistant\n"

# The first five are what the released template makes of these messages, behind the begin token,
# which it leaves to the processor.
RENDERED = {
    "text last": (
        [user({"type": "text", "text": "Describe this image."}, PICTURE)],
        f"<|image|><|im_start|>user\nDescribe this image.<|im_end|>\n{ASK}",
    ),
    "text only": (
        [user({"type": "text", "text": "What is the capital of France?"})],
        f"<|im_start|>user\nWhat is the capital of France?<|im_end|>\n{ASK}",
    ),
    "two pictures": (
        [user(PICTURE, PICTURE, {"type": "text", "text": "Which image has more boats?"})],
        "Image 1<|image|>Image 2<|image|><|im_start|>user\nWhich image has more boats?<|im_end|>\n"
        + ASK,
    ),
    "several turns, with a space before a past answer": (
        [
            user(PICTURE, {"type": "text", "text": "How many cups are there?"}),
            {"role": "assistant", "content": [{"type": "text", "text": "There are 2."}]},
            user({"type": "text", "text": "And plates?"}),
        ],
        "<|image|><|im_start|>user\nHow many cups are there?<|im_end|>\n <|im_start|>assistant\n"
        f"There are 2.<|im_end|>\n<|im_start|>user\nAnd plates?<|im_end|>\n{ASK}",
    ),
    "a style": (
        [user(PICTURE, {"type": "text", "text": "What year is it?", "style": "vqa2"})],
        f"<|image|><|im_start|>user\nvqa2: What year is it?<|im_end|>\n{ASK}",
    ),
    "a style without a prefix": ([user({**TEXT, "style": "pointing"})], TURN + ASK),
    "plain strings": ([{"role": "user", "content": "Hi"}], TURN + ASK),
    "texts are joined by a space": (
        [user(TEXT, TEXT)],
        f"<|im_start|>user\nHi Hi<|im_end|>\n{ASK}",
    ),
    "a picture by its key": (
        [user({"type": "x", "image_url": "a.png"}, TEXT)],
        f"<|image|>{TURN}{ASK}",
    ),
    "pictures of later turns come first": (
        [user(PICTURE, TEXT), {"role": "assistant", "content": "Yes"}, user(PICTURE, TEXT)],
        f"Image 1<|image|>Image 2<|image|>{TURN} {ASK}Yes<|im_end|>\n{TURN}{ASK}",
    ),
    "a video": ([user({"type": "video"}, TEXT)], f"<|video|>{TURN}{ASK}"),
    "subtitles": (
        [{"role": "subtitle", "content": "subtitle\n0 1 Oh"}, user({"type": "video"}, TEXT)],
        f"<|video|>subtitle\n0 1 Oh{TURN}{ASK}",
    ),
}


@pytest.mark.parametrize("case", RENDERED)
def test_chat_template(case: str) -> None:
    messages, expected = RENDERED[case]
    assert rendered(messages) == BOS + expected


def test_chat_template_knows_the_styles_without_a_prefix() -> None:
    for style in STYLES_WITHOUT_PREFIX:
        assert rendered([user({**TEXT, "style": style})]) == BOS + TURN + ASK
    listed = set(re.findall(r"'(\w+)'", TEMPLATE.read_text().split("] -%}")[0]))
    assert listed == STYLES_WITHOUT_PREFIX


def test_chat_template_without_a_prompt_for_an_answer() -> None:
    assert rendered([user(TEXT)], add_generation_prompt=False) == BOS + TURN
    answered = [user(TEXT), {"role": "assistant", "content": "Yes"}]
    assert rendered(answered, add_generation_prompt=False) == f"{BOS}{TURN} {ASK}Yes"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Hi"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
    ],
)
def test_chat_template_wants_turns(messages: Any) -> None:
    with pytest.raises(TemplateError, match="in turns"):
        rendered(messages)
