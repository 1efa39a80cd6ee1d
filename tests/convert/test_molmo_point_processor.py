"""The processor files of MolmoPoint folders, official ones and ours."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import AddedToken

import nanomolmo2
from nanomolmo2.convert import export_molmo_point
from nanomolmo2.convert.agreement import check_agreement
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Processor, Tokenizer
from tests.convert.checkpoints import edit_json
from tests.convert.molmo_point_checkpoint import CHECKPOINT, write_point_checkpoint
from tests.golden_points import V, byte_tokenizer, cases, golden_processor, picture

NUM_CLASSES = 31_200


def official_folder(folder: Path, **config: Any) -> Path:
    """The golden checkpoint with processor files as AI2's converter writes them."""
    write_point_checkpoint(folder, **config)
    both = {
        "processor_class": "Molmo2Processor",
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 14,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 70, "width": 70},
    }
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {
            **both,
            "image_processor_type": "Molmo2ImageProcessor",
            "max_crops": 4,
            "overlap_margins": [1, 1],
            "pooling_size": [2, 2],
        },
        "video_preprocessor_config.json": {
            **both,
            "video_processor_type": "Molmo2VideoProcessor",
            "frame_sample_mode": "uniform_last_frame",
            "max_fps": 2.0,
            "num_frames": 384,
            "pooling_size": [3, 3],
            "sampling_fps": 2,
        },
        "processor_config.json": {
            "processor_class": "Molmo2Processor",
            "image_use_col_tokens": True,
            "use_frame_special_tokens": True,
            "use_low_res_token_for_global_crops": True,
            "use_single_crop_col_tokens": False,
            "use_single_crop_start_token": True,
            "video_use_col_tokens": False,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    backend = byte_tokenizer().backend
    backend.add_tokens([AddedToken(f"<POINT_{k}>") for k in range(NUM_CLASSES)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_folder(tmp_path_factory.mktemp("official") / "model")


def test_an_official_folder(official: Path) -> None:
    """Markers, overview and V by config.json; crops and frames by the processor's files."""
    model, processor = nanomolmo2.load(official, device="cpu")
    settings, expected = processor.config, golden_processor().config
    assert settings.points is not None
    assert settings.points == replace(expected.points, num_embeddings=V)  # type: ignore[type-var]
    assert settings.multicrop == expected.multicrop
    assert settings.multicrop is not None
    assert settings.multicrop.max_crops == 4
    assert settings.video == expected.video
    assert settings.video is not None
    assert settings.video.use_frame_special_tokens
    assert settings.stop_tokens == ("<|im_end|>",)
    assert model.point_predictor is not None


def test_trap_6_a_prompt_of_an_official_folder_is_the_golden_one(official: Path) -> None:
    """Tokens of overviews, which count as rows and cannot be selected, pooling and crops."""
    processor = nanomolmo2.load(official, device="cpu")[1]
    case = cases()["one"]
    (size,) = case["picture_sizes"]
    image = picture(0, tuple(size))
    encoded = processor.encode([{"role": "user", "content": "Point."}], [image])
    ids, golden = encoded.input_ids.tolist(), np.array(case["input_ids"])
    shown = golden[: np.flatnonzero(golden >= 256)[-1] + 1].tolist()
    start = shown.index(260)  # the overview's start, behind the token that begins a prompt
    assert ids[1 : len(shown) - start + 1] == shown[start:]
    assert 262 in shown


def test_names_of_classes_are_no_tokens_of_a_question(official: Path) -> None:
    """The released tokenizer has 31,200 of them behind V; a question must not become one."""
    tokenizer = nanomolmo2.load(official, device="cpu")[1].tokenizer
    assert tokenizer.vocab_size == V
    assert tokenizer.encode_text("<POINT_3>") == tuple(b"<POINT_3>")
    theirs = tokenizers.Tokenizer.from_file(str(official / "tokenizer.json"))
    assert theirs.token_to_id("<POINT_3>") == V + 3


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "processor_config.json",
            {"use_low_res_token_for_global_crops": False},
            "use_low_res_token_for_global_crops is False, expected True: config.json says",
        ),
        ("processor_config.json", {"video_use_col_tokens": True}, "video_use_col_tokens is True"),
        ("preprocessor_config.json", {"pooling_size": [2, 3]}, "only squares"),
    ],
)
def test_settings_not_built_here(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = official_folder(tmp_path / "model")
    edit_json(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        nanomolmo2.load(folder, device="cpu")


@pytest.mark.parametrize("layout", ["whole", "without the field", "no file"])
def test_trap_27_frames_have_marks_of_their_own(tmp_path: Path, layout: str) -> None:
    """``<frame_start>`` and ``<frame_end>``, which Molmo2's released models do not use."""
    folder = official_folder(tmp_path / "model")
    if layout == "no file":
        (folder / "processor_config.json").unlink()
    elif layout == "without the field":
        changes = {"use_frame_special_tokens": None, "use_low_res_token_for_global_crops": None}
        edit_json(folder / "processor_config.json", **changes)
    processor = nanomolmo2.load(folder, device="cpu")[1]
    video = ([picture(k, (70, 70)) for k in range(2)], [0.0, 0.5])
    ids = processor.encode([{"role": "user", "content": "Point."}], video=video).input_ids
    assert [int((ids == id).sum()) for id in (263, 264, 256, 257, 262)] == [2, 2, 0, 0, 0]
    assert int((ids == 258).sum()) == 2 * 4  # 5 x 5 patches in windows of 3 x 3, all selectable


def test_the_crops_of_the_file_count(tmp_path: Path) -> None:
    """24 in the released 8B."""
    folder = official_folder(tmp_path / "model")
    edit_json(folder / "preprocessor_config.json", max_crops=24)
    crops = nanomolmo2.load(folder, device="cpu")[1].config.multicrop
    assert crops is not None
    assert crops.max_crops == 24


def test_a_tokenizer_without_the_markers(tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "model")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|vit_index|>", "<|vit_other|>"))
    processor = nanomolmo2.load(folder, device="cpu")[1]  # by its id, whatever its name
    assert processor.config.points is not None
    assert processor.config.points.subpatch_token == "<|vit_other|>"
    values = json.loads(text)
    values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] < 262]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"no special token with the id 267.*tokenizer\.json"):
        nanomolmo2.load(folder, device="cpu")


# ---- export with a processor ----


@pytest.fixture(scope="module")
def exported(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    model, processor = nanomolmo2.load(official, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_molmo_point(model, folder, processor)  # nothing to remark
    return folder


FILES = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("model.safetensors", "nanomolmo2_config.json", "nanomolmo2_processor.json"),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "video_preprocessor_config.json"),
}


def test_the_files_of_an_export(exported: Path, official: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        theirs, ours = (json.loads((f / name).read_text()) for f in (official, exported))
        assert {key: ours[key] for key in theirs} == theirs
    layout = json.loads((exported / "processor_config.json").read_text())
    assert layout["use_low_res_token_for_global_crops"] is True
    assert layout["use_frame_special_tokens"] is True
    tokenizer = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert tokenizer.token_to_id("<POINT_0>") == V
    assert tokenizer.token_to_id(f"<POINT_{NUM_CLASSES - 1}>") == V + NUM_CLASSES - 1
    assert tokenizer.decode([V + 276, V + 7, ord("1")]) == "<POINT_276><POINT_7>1"
    assert json.loads((exported / "config.json").read_text())["use_frame_special_tokens"] is True
    assert "No other program was tried" in (exported / "README.md").read_text()


@pytest.mark.parametrize("own", [True, False])
def test_an_export_answers_as_the_original(exported: Path, official: Path, own: bool) -> None:
    """By our own files beside the official ones, and by the official ones alone."""
    folder = exported
    if not own:
        folder = exported.with_name("bare")
        folder.mkdir()
        for path in exported.iterdir():
            if not path.name.startswith("nanomolmo2_"):
                (folder / path.name).write_bytes(path.read_bytes())
    pairs = [nanomolmo2.load(f, device="cpu") for f in (official, folder)]
    assert pairs[1][0].config == pairs[0][0].config
    assert pairs[1][1].config == pairs[0][1].config
    image = picture(0, (150, 100))
    answers = [
        nanomolmo2.Pipeline(*pair).ask(image, "Point to the lamps.", max_new_tokens=40)
        for pair in pairs
    ]
    assert answers[0].text == answers[1].text
    assert answers[0].points == answers[1].points
    assert "<POINT_" in answers[0].text


def test_one_note_on_a_rule_of_our_own(official: Path, tmp_path: Path) -> None:
    model, processor = nanomolmo2.load(official, device="cpu")
    assert model.config.point_config is not None
    other = NanoMolmo2(
        replace(model.config, point_config=replace(model.config.point_config, several_lists=True))
    )
    with pytest.warns(UserWarning) as caught:
        export_molmo_point(other, tmp_path, processor)
    (note,) = [str(warning.message) for warning in caught]
    assert "the rule 'own'" in note
    again = nanomolmo2.load(tmp_path, device="cpu")[0]
    assert again.config == other.config


# ---- a processor of another model ----


DIFFERENT: dict[str, dict[str, Any]] = {
    "the id of the marker of a point's slot: 268, the model expects 277": {
        "subpatch_token_id": 277
    },
    "the id of an overview's tokens: 262, the model expects None": {
        "image_non_indexable_patch_id": None
    },
    "points in questions are selections: False, the model expects True": {"points_in_prompt": True},
}


@pytest.mark.parametrize("message", DIFFERENT)
def test_a_processor_that_writes_other_points(message: str) -> None:
    config = NanoMolmo2.from_pretrained(str(CHECKPOINT)).config
    check_agreement(config, golden_processor())
    assert config.point_config is not None
    other = replace(config, point_config=replace(config.point_config, **DIFFERENT[message]))
    with pytest.raises(ValueError, match=f"does not belong to the model: {message}"):
        check_agreement(other, golden_processor())


def test_a_processor_that_writes_no_points() -> None:
    config = NanoMolmo2.from_pretrained(str(CHECKPOINT)).config
    processor = golden_processor()
    text = Processor(replace(processor.config, points=None), processor.tokenizer)
    with pytest.raises(ValueError, match="points are: text, the model expects selections"):
        check_agreement(config, text)
    with pytest.raises(ValueError, match="points are: selections, the model expects text"):
        check_agreement(replace(config, point_config=None), processor)


def test_trap_24_classes_begin_behind_the_rows_of_the_model() -> None:
    config = NanoMolmo2.from_pretrained(str(CHECKPOINT)).config
    processor = golden_processor(num_embeddings=V + 5)
    with pytest.raises(ValueError, match="first class of a point: 389, the model expects 384"):
        check_agreement(config, processor)


def test_our_own_folder_with_points(official: Path, tmp_path: Path) -> None:
    model, processor = nanomolmo2.load(official, device="cpu")
    model.save_pretrained(tmp_path / "own", processor=processor)
    again, its_processor = nanomolmo2.load(tmp_path / "own", device="cpu")
    assert again.config == model.config
    assert its_processor.config == processor.config
    assert isinstance(its_processor.tokenizer, Tokenizer)
    assert its_processor.tokenizer.backend.to_str() == processor.tokenizer.backend.to_str()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
