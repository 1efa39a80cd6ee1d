"""Point targets in batches and packs; tokenizers with the markers of points."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file

from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.data.packing import join
from nanomolmo2.processor import (
    Encoded,
    MultiCrop,
    Point,
    PointTokens,
    Processor,
    ProcessorConfig,
    Tokenizer,
    collate,
    format_points,
    molmo_point_processor,
)
from nanomolmo2.processor.tokenizer import (
    MOLMO2_TOKENS,
    MOLMO_POINT_TOKENS,
    molmo2_tokenizer,
    molmo_point_tokenizer,
)
from tests.processor.helpers import assistant, small_backend, user
from tests.processor.point_prompts import (
    BASE,
    GOLDEN,
    V,
    one_view,
    picture,
    pictures,
    point_tokenizer,
    small_processor,
)

END = [NO_MORE_POINTS, -1, -1]
PATCH, SUBPATCH, LOCATION = BASE + 11, BASE + 12, BASE + 13


def one_picture(*points, label="cup"):
    answer = format_points([Point(*p) for p in points], label, [(150, 100)])
    return small_processor().encode([user("x"), assistant(answer)], [picture(150, 100)])


def one_video():
    video = (pictures([(90, 60)] * 3), [0.0, 0.5, 1.0])
    answer = format_points([Point(3, 3, time=0.6)], "egg", video_size=(90, 60))
    return small_processor().encode([user("x"), assistant(answer)], video=video)


def only_text():
    return small_processor().encode([user("x"), assistant("yes")])


# ---- batches and packs ----


@pytest.mark.parametrize("together", [collate, join], ids=["collate", "join"])
def test_rows_count_on_over_examples_and_the_end_of_a_list_does_not(together):
    """Pictures, a text and a video: 25, 0 and 12 rows; windows of 4 and 9 become 9 wide."""
    examples = [one_picture((3, 3), (102, 50)), only_text(), one_video(), one_picture((3, 3))]
    batch = together(examples, 0) if together is collate else together(examples)
    assert batch.point_targets.tolist() == [
        [9, 0, 0], [19, 1, 3], END, [25 + 4, 0, 0], END, [25 + 12 + 9, 0, 0], END
    ]  # fmt: skip
    assert batch.point_lists.tolist() == [0, 0, 0, 1, 1, 2, 2]
    pooling = np.asarray(batch.image_token_pooling)
    assert pooling.shape == (25 + 12 + 25, 9)
    assert (pooling[:25, 4:] == -1).all()
    crops = [len(e.pixel_values) for e in (examples[0], examples[2])]
    assert pooling[25, 0] == crops[0] * 25
    assert pooling[37, 0] == sum(crops) * 25
    if together is join:
        assert (batch.input_ids == PATCH).sum() == 7
        assert batch.point_space is None


def test_the_pack_of_the_reference():
    """Its pack of two examples, taken apart and joined: rows and patches are moved in step."""
    tensors = load_file(GOLDEN / "training.safetensors")
    ids, pooling, targets = (
        tensors[f"pack.{name}"].astype(np.int64)
        for name in ("input_tokens", "token_pooling", "point_target_ids")
    )
    cut = int(np.flatnonzero(tensors["pack.subsegment_ids"] >= 100_000)[0])
    pixels = tensors["pack.pixel_values_u8"].astype(np.float32)
    rows = len(load_file(GOLDEN / "training.safetensors")["single.token_pooling"])
    parts = []
    for part, (first_row, first_crop) in (
        (slice(None, cut), (0, 0)),
        (slice(cut, None), (rows, 5)),
    ):
        own = slice(first_row, first_row + rows if first_row == 0 else None)
        windows = pooling[own]
        shifted = targets[:5] if first_row == 0 else targets[5:]
        parts.append(
            Encoded(
                input_ids=ids[part],
                position_ids=np.arange(len(ids[part])),
                pixel_values=pixels[:5] if first_crop == 0 else pixels[5:],
                image_token_pooling=np.where(windows < 0, -1, windows - 25 * first_crop),
                point_targets=np.where(
                    (shifted == NO_MORE_POINTS) | (np.arange(3) > 0), shifted, shifted - first_row
                ),
            )
        )
    assert all((part.image_token_pooling >= -1).all() for part in parts)
    joined = join(parts)
    np.testing.assert_array_equal(joined.point_targets, targets)
    np.testing.assert_array_equal(joined.image_token_pooling, pooling)
    ends = np.cumsum(targets[:, 0] == NO_MORE_POINTS)
    assert joined.point_lists.tolist() == [0, *ends[:-1]]


def test_trees_and_packs_of_packs():
    first = join([one_picture((3, 3)), one_video()])
    again = join([first, one_picture((3, 3))])
    batch = collate([first, again], 0)
    assert batch.point_targets[:, 0].tolist() == [
        9, NO_MORE_POINTS, 29, NO_MORE_POINTS,
        46, NO_MORE_POINTS, 66, NO_MORE_POINTS, 83, NO_MORE_POINTS,
    ]  # fmt: skip
    assert batch.point_lists.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_pictures_without_crops_count_their_patches():
    """144 patches and 36 rows a picture, though its pixels are not cut into patches."""
    processor = one_view()
    answer = format_points([Point(24, 7, 2)], "dog", [(192, 192)] * 2)
    images = [picture(192, 192)] * 2
    encoded = processor.encode([user("x"), assistant(answer)], images)
    assert encoded.point_targets.tolist() == [[36, 1, 4], END]
    for batch in (collate([encoded, encoded], 0), join([encoded, encoded])):
        assert batch.point_targets[:, 0].tolist() == [36, NO_MORE_POINTS, 108, NO_MORE_POINTS]
        assert batch.image_token_pooling[72].tolist() == [288, 289, 300, 301]
        assert batch.image_token_pooling[-1].tolist() == [562, 563, 574, 575]


def test_no_points_no_targets():
    batch = collate([only_text(), only_text()], 0)
    assert batch.point_targets is None and batch.point_lists is None
    joined = join([only_text(), only_text()])
    assert joined.point_targets is None and joined.point_lists is None


# ---- what is cut off ----


def cut(encoded, length, targets):
    """The first tokens of an example, with these targets."""
    short = {
        name: getattr(encoded, name)[:length] for name in ("input_ids", "position_ids", "labels")
    }
    return dataclasses.replace(
        encoded, **short, point_targets=targets, point_lists=np.zeros(len(targets), dtype=np.int64)
    )


@pytest.mark.parametrize("together", [lambda e: collate(e, 0), join], ids=["collate", "join"])
def test_trap_33_what_is_cut_cuts_its_targets_in_step(together):
    """At every length within two points: in step it is taken, out of step it is one clear error."""
    encoded = one_picture((3, 3), (102, 50))
    whole = encoded.point_targets
    other = one_picture((3, 3))
    begin = int(np.flatnonzero(encoded.input_ids == PATCH)[0])
    for length in range(begin, len(encoded.input_ids)):
        ids = encoded.input_ids[:length]
        kept = whole[: (ids == PATCH).sum()].copy()
        if (ids == SUBPATCH).sum() < (kept[:, 1] >= 0).sum():
            kept[-1, 1:] = -1
        if (ids == LOCATION).sum() < (kept[:, 2] >= 0).sum():
            kept[-1, 2] = -1
        batch = together([cut(encoded, length, kept), other])
        assert batch.point_targets[: len(kept)].tolist() == kept.tolist()
        assert batch.point_targets[len(kept) :].tolist() == [[25 + 9, 0, 0], END]
        if kept.tolist() != whole.tolist():
            with pytest.raises(ValueError, match=r"an example (that was cut|holds)"):
                together([cut(encoded, length, whole), other])


@pytest.mark.parametrize(
    "place, value, problem",
    [
        ((0, 0), 25, "select row 25, but the prompt has 25 rows"),
        ((0, 0), -1, "but the prompt has 25 rows"),
        ((0, 1), -1, "a point without its slot, or a slot without its point"),
        ((0, 2), -1, "a point without its cell, or a cell without its point"),
        ((1, 1), 3, "a point without its slot, or a slot without its point"),
    ],
)
def test_targets_that_do_not_fit_their_markers(place, value, problem):
    encoded = one_picture((3, 3))
    targets = encoded.point_targets.copy()
    targets[place] = value
    with pytest.raises(ValueError, match=problem):
        collate([dataclasses.replace(encoded, point_targets=targets)], 0)


def test_markers_that_stand_alone():
    encoded = one_picture((3, 3))
    ids = encoded.input_ids.copy()
    ids[-1] = SUBPATCH
    with pytest.raises(ValueError, match="a slot without its point"):
        collate([dataclasses.replace(encoded, input_ids=ids)], 0)
    with pytest.raises(ValueError, match="2 markers of rows and 0 point_targets"):
        collate([dataclasses.replace(encoded, point_targets=None)], 0)


# ---- tokenizers ----


@pytest.fixture
def base(tmp_path):
    small_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>")).save(
        str(tmp_path / "tokenizer.json")
    )
    return tmp_path


def test_the_markers_stand_at_their_official_offsets(base):
    tokenizer = molmo_point_tokenizer(base, vocab_size=512)
    offsets = {name: tokenizer.special_ids[name] - 512 for name in MOLMO_POINT_TOKENS}
    assert list(offsets.values()) == list(range(14))
    assert offsets["<im_low>"] == 6 and offsets["<frame_end>"] == 8
    assert (offsets["<|points|>"], offsets["<|token_index|>"]) == (10, 11)
    assert (offsets["<|vit_index|>"], offsets["<|vit_loc|>"]) == (12, 13)
    assert tokenizer.special_ids["<EXTRA_TOKENS_POINT_0>"] == 512 + 14
    assert tokenizer.special_ids["<EXTRA_TOKENS_POINT_113>"] == 512 + 127
    assert tokenizer.vocab_size == 640
    tokenizer.save(base / "again.json")
    again = molmo_point_tokenizer(base / "again.json")
    assert again.special_ids == tokenizer.special_ids


def test_molmo2s_tokenizer_gets_the_markers_behind_its_tokens(base):
    molmo2_tokenizer(base, vocab_size=512).save(base / "molmo2.json")
    tokenizer = molmo_point_tokenizer(base / "molmo2.json")
    assert tokenizer.special_ids["<|vit_loc|>"] == 512 + 13
    assert tokenizer.special_ids["<im_low>"] == 512 + MOLMO2_TOKENS.index("<im_low>")
    assert tokenizer.vocab_size == 640
    # And the other way round: a tokenizer of MolmoPoint is one of Molmo2.
    tokenizer.save(base / "point.json")
    assert molmo2_tokenizer(base / "point.json", vocab_size=512).vocab_size == 640


def test_markers_at_other_ids_are_refused(base):
    backend = small_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    backend.add_special_tokens([*MOLMO2_TOKENS, "<|vit_loc|>"])
    backend.save(str(base / "other.json"))
    with pytest.raises(ValueError, match="has MolmoPoint's tokens at the ids"):
        molmo_point_tokenizer(base / "other.json")


def test_names_of_classes_in_a_tokenizer_say_where_classes_begin_and_are_never_typed(base):
    """The released file has 31,200 of them, as words that a person could type."""
    tokenizer = molmo_point_tokenizer(base, vocab_size=512)
    backend = tokenizer.backend
    backend.add_tokens([f"<POINT_{k}>" for k in range(500)])
    backend.save(str(base / "released.json"))
    assert "<POINT_499>" in (base / "released.json").read_text()
    read = molmo_point_tokenizer(base / "released.json")
    assert read.vocab_size == 640
    assert max(read.encode_text("<POINT_3> is typed")) < 512
    processor = molmo_point_processor(base / "released.json")
    assert processor.decode([640 + 3, *read.encode_text("1")]) == "<POINT_3>1"
    assert processor.encode([user("x")], [picture(30, 20)]).point_space.first_class == 640

    # V is the id of <POINT_0>, also where tokens are missing before it.
    values = json.loads((base / "released.json").read_text())
    for token in values["added_tokens"]:
        if token["content"].startswith("<POINT_"):
            token["id"] += 8
    (base / "gap.json").write_text(json.dumps(values))
    assert Tokenizer.from_file(base / "gap.json").vocab_size == 648


def test_names_of_classes_before_other_tokens_are_refused(base):
    backend = small_backend(("<|endoftext|>",))
    backend.add_tokens(["<POINT_0>", "<POINT_1>", "other"])
    backend.save(str(base / "other.json"))
    with pytest.raises(ValueError, match="are not the last ones, in order"):
        Tokenizer.from_file(base / "other.json")


def test_a_tokenizer_without_the_markers_is_one_clear_error(base):
    config = ProcessorConfig.molmo2(multicrop=MultiCrop(1), points=PointTokens())
    with pytest.raises(
        ValueError, match="no special token '<\\|token_index\\|>', one of the three"
    ):
        Processor(config, molmo2_tokenizer(base, vocab_size=512))
    with pytest.raises(
        ValueError, match="num_embeddings of points is 600, but the tokenizer has 640"
    ):
        Processor(
            dataclasses.replace(config, points=PointTokens(num_embeddings=600)), point_tokenizer()
        )


def test_settings_of_points_go_to_files_and_back(tmp_path):
    for processor in (small_processor(in_prompt=True), one_view()):
        processor.save(tmp_path)
        again = Processor.load(tmp_path)
        assert again.config == processor.config
        sent = pickle.loads(pickle.dumps(processor))
        images = [picture(150, 100)]
        for other in (again, sent):
            space = other.encode([user("x")], images).point_space
            assert space.first_class == V
            assert space.target(Point(3, 3)) == processor.encode(
                [user("x")], images
            ).point_space.target(Point(3, 3))


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"image_size": 190}, "must be a multiple of the patch_size of points"),
        ({"image_tokens": 49}, "in windows of 2 x 2, which points say, are 36"),
    ],
)
def test_windows_of_a_single_view_fit_the_image(settings, problem):
    fields = {"image_size": 192, "image_tokens": 36, **settings}
    with pytest.raises(ValueError, match=problem):
        ProcessorConfig.molmo2(**fields, points=PointTokens(patch_size=16))


def test_the_markers_are_three_tokens():
    with pytest.raises(ValueError, match="expected three different tokens"):
        PointTokens(patch_token="<|vit_loc|>")
    with pytest.raises(ValueError, match="pooling_size must be at least 1"):
        PointTokens(pooling_size=0)
