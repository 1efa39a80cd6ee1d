"""Processor: ids, labels and pixels of conversations and message trees; text back."""

import base64
import io
import pickle
import re
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.processor import (
    MultiCrop,
    Processor,
    ProcessorConfig,
    Tokenizer,
    Video,
    VideoConfig,
    load_image,
    visual,
)
from nanomolmo2.processor.image import preprocess
from nanomolmo2.processor.video import load_video
from tests.processor.helpers import (
    SPECIAL,
    assistant,
    golden,
    golden_picture,
    runs,
    small_backend,
    user,
)

PICTURE = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
BRANCHES = [
    [user("Is there a dog?"), assistant("yes")],
    [user("dogs"), assistant("2"), user("Sure?"), assistant("yes yes")],
    [user("Point."), assistant('<points coords="1 1 100 200">dogs</points>')],
]


def tokens(processor, ids):
    return [processor.tokenizer.backend.id_to_token(int(i)) for i in ids]


def learned(processor, encoded):
    """Text of the labels, special tokens shown."""
    return processor.decode(encoded.labels[encoded.labels != -100], skip_special_tokens=False)


# ---- conversations ----


def test_ids_of_a_molmo2_prompt(molmo2):
    encoded = molmo2.encode([user("dogs")], [PICTURE])
    assert tokens(molmo2, encoded.input_ids) == [
        "<|im_end|>",
        "<low_res_im_start>",
        *["<im_patch>"] * 4,
        "<im_end>",
        "<|im_start|>user\n",
        "dog",
        "s",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert encoded.labels is None
    assert encoded.position_ids.tolist() == list(range(len(encoded.input_ids)))
    assert encoded.pixel_values.shape == (1, 3, 32, 32)
    assert encoded.image_sizes == ((32, 32),)


def test_ids_of_a_qwen3_prompt(qwen3):
    encoded = qwen3.encode([user("yes")], [PICTURE])
    assert tokens(qwen3, encoded.input_ids) == [
        "<|im_start|>user\n",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|vision_end|>",
        "yes",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]


@pytest.mark.parametrize("processor", ["qwen3", "molmo2"])
def test_labels_are_the_answers_and_nothing_else(processor, request):
    processor = request.getfixturevalue(processor)
    encoded = processor.encode([*BRANCHES[1], user("<|im_end|>"), assistant("<|im_end|>!")])
    assert learned(processor, encoded) == "2<|im_end|>yes yes<|im_end|><|im_end|>!<|im_end|>"
    here = encoded.labels != -100
    assert (encoded.labels[here] == encoded.input_ids[here]).all()
    # The token before an answer is the end of the prompt that generation starts from.
    prompt = processor.encode(BRANCHES[1][:1])
    length = len(prompt.input_ids)
    assert (encoded.input_ids[:length] == prompt.input_ids).all()
    assert (~here[:length]).all() and here[length]


@pytest.mark.parametrize("processor", ["qwen3", "molmo2"])
@pytest.mark.parametrize("special", SPECIAL)
def test_special_tokens_in_what_people_write_stay_text(processor, special, request):
    """A question "<|im_end|>" once could have ended its own turn."""
    processor = request.getfixturevalue(processor)
    plain = processor.encode([user("x"), assistant("x"), user("x")], [PICTURE])
    hostile = processor.encode([user(special), assistant(special), user(special)], [PICTURE])
    ids = list(processor.tokenizer.special_ids.values())
    count = np.isin(plain.input_ids, ids).sum()
    assert np.isin(hostile.input_ids, ids).sum() == count
    text = processor.decode(hostile.input_ids, skip_special_tokens=True)
    assert text.count(special) == 3


def test_pictures_from_messages_and_beside_them(molmo2):
    item = {"type": "image", "image": PICTURE}
    there = {"type": "image"}
    text = {"type": "text", "text": "dog"}
    beside = molmo2.encode([user("dog")], [PICTURE, PICTURE])
    for content, images in (
        ([text, item, item], None),
        ([item, text, there], [PICTURE]),
        ([there, there, text], [PICTURE, PICTURE]),
    ):
        encoded = molmo2.encode([user(content)], images)
        assert encoded.input_ids.tolist() == beside.input_ids.tolist()
        assert (encoded.pixel_values == beside.pixel_values).all()
    for content, images in (([item, text], [PICTURE]), ([there, text], None)):
        with pytest.raises(ValueError, match="image items without a picture"):
            molmo2.encode([user(content)], images)
    for one in ("dog.png", PICTURE, Image.fromarray(PICTURE), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match="images must be a list"):
            molmo2.encode([user("dog")], one)
        with pytest.raises(ValueError, match="images must be a list"):
            molmo2.encode_tree(one, BRANCHES)


def test_pictures_of_every_kind_become_the_same_pixels(molmo2):
    """Arrays of the right size skip PIL; normalised ones skip everything."""
    from_pil = molmo2.encode([user("x")], [Image.fromarray(PICTURE)]).pixel_values
    from_array = molmo2.encode([user("x")], [PICTURE]).pixel_values
    assert (from_array == from_pil).all()
    for ready in (
        from_pil[0],
        torch.from_numpy(from_pil[0]),
        torch.from_numpy(from_pil[0]).double(),
    ):
        pixels = molmo2.encode([user("x")], [ready]).pixel_values
        assert pixels.dtype == np.float32 and (pixels == from_pil).all()
    with pytest.raises(ValueError, match=r"tensor of shape \(3, 16, 16\)"):
        molmo2.encode([user("x")], [torch.zeros(3, 16, 16)])
    large = Image.new("RGB", (200, 100), "red")
    encoded = molmo2.encode([user("x")], [large])
    assert encoded.image_sizes == ((200, 100),)
    assert encoded.pixel_values[0, :, 0, 0].tolist() == [1, -1, -1]


def test_joint_encoding_at_the_text_border(qwen3_tokenizer, qwen3_reference):
    """A text that begins with newlines: Qwen has one token for two of them."""
    processor = Processor(ProcessorConfig(), qwen3_tokenizer)
    for text in ("Describe it.", "\nDescribe", "\n\n  x", "  x", " \n x", "", "é 日本 \n"):
        system = {"role": "system", "content": text}
        messages = [system, user(text), assistant("2"), user(text)]
        expected = qwen3_reference.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert processor.encode(messages).input_ids.tolist() == expected


MOLMO2_GOLDEN = [  # made with transformers' Molmo2Processor; image tokens taken out
    ([user("Describe this image.")], 1, [74785, 419, 2168, 13]),
    ([user("What is the capital of France?")], 0, [3838, 374, 279, 6722, 315, 9625, 30]),
    ([user("Which image has more boats?")], 2, [23085, 2168, 702, 803, 31631, 30]),
]
MOLMO2_BEFORE = {
    0: [151645, 151644, 872, 198],
    1: [151645, 151644, 872, 198],
    2: [151645, 1906, 220, 16, 1906, 220, 17, 151644, 872, 198],
}
MOLMO2_AFTER = [151645, 198, 151644, 77091, 198]


@pytest.mark.parametrize(("messages", "num_pictures", "expected"), MOLMO2_GOLDEN)
def test_molmo2_text_ids_against_the_reference(molmo2_tokenizer, messages, num_pictures, expected):
    processor = Processor(ProcessorConfig.molmo2(image_size=32, image_tokens=4), molmo2_tokenizer)
    ids = processor.encode(messages, [PICTURE] * num_pictures).input_ids.tolist()
    picture = [151940, *[151938] * 4, 151937]
    text = [*MOLMO2_BEFORE[num_pictures], *expected, *MOLMO2_AFTER]
    assert [i for i in ids if i < 151936] == text
    assert [i for i in ids if i >= 151936] == picture * num_pictures
    assert processor.image_token_id == 151938
    assert processor.stop_token_ids == (151645, 151643)


# ---- the Molmo2 design: crops, video, released prompts ----

WIDE = np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)
CLIP = Video((WIDE, WIDE, WIDE[::-1].copy()), (0.0, 0.5, 0.8))
OVERVIEW = ["<low_res_im_start>", *["<im_patch>"] * 4, "<im_end>"]


def details(rows, cols):
    return ["<im_start>", *[*["<im_patch>"] * cols, "<im_col>"] * rows, "<im_end>"]


def text_tokens(processor, text):
    return tokens(processor, processor.tokenizer.encode_text(text))


@pytest.mark.parametrize("number", range(len(golden()["prompts"])))
def test_golden_prompts(released, number):
    """Ids and types of transformers' Molmo2Processor; see tests/data/README.md."""
    expected = golden()["prompts"][number]
    pictures = [golden_picture(width, height) for width, height in expected["image_sizes"]]
    applied = released.apply(expected["messages"], images=pictures)
    assert applied["input_ids"].tolist() == runs(expected["input_ids_rle"])
    assert applied["token_type_ids"].tolist() == runs(expected["token_type_rle"])
    assert len(applied["input_ids"]) == expected["length"]
    image_tokens = (applied["input_ids"] == released.image_token_id).sum()
    assert image_tokens == len(applied.get("image_token_pooling", ()))
    assert ("pixel_values" in applied) == bool(pictures)


def test_the_released_settings(released):
    config = released.config
    assert config.multicrop == MultiCrop(8) and config.video == VideoConfig(384, 2.0, 3, False)
    assert (config.image_size, config.resample) == (378, "bilinear")
    assert (released.image_token_id, released.pad_token_id) == (151938, 151643)


def test_trap_08_rows_end_in_the_detailed_view_only_and_starts_differ(crops):
    encoded = crops.encode([user("x")], [WIDE])
    rows, cols = encoded.image_grids[0, 2:]
    assert encoded.image_grids.tolist() == [[2, 2, 2, 4]]
    expected = ["<|im_end|>", *OVERVIEW, *details(rows, cols), "<|im_start|>"]
    assert tokens(crops, encoded.input_ids)[: len(expected)] == expected
    frames = crops.encode([user("x")], video=CLIP)
    shown = tokens(crops, frames.input_ids)
    assert "<im_col>" not in shown and "<low_res_im_start>" not in shown
    assert shown.count("<im_start>") == shown.count("<im_end>") == 3


def test_trap_09_pictures_and_their_marks_are_typed_and_times_and_numbers_are_not(crops):
    def typed(applied):
        assert set(applied["token_type_ids"].tolist()) == {0, 1}
        return tokens(crops, applied["input_ids"][applied["token_type_ids"] == 1])

    picture = [*OVERVIEW, *details(2, 4)]
    assert typed(crops.apply([user("Image 1")], [WIDE, WIDE])) == picture * 2
    frame = ["<im_start>", *["<im_patch>"] * 4, "<im_end>"]
    assert typed(crops.apply([user("0.5")], video=CLIP)) == frame * 3
    assert not crops.apply([user("<im_patch>")])["token_type_ids"].any()


def test_trap_10_the_beginning_is_the_end_of_turn_once_and_past_answers_follow_a_space(crops):
    conversation = [user("a"), assistant("b"), user("a")]
    ids = crops.encode(conversation, [WIDE]).input_ids
    shown = tokens(crops, ids)
    assert shown[0] == "<|im_end|>" and shown[1] == "<low_res_im_start>"
    answer = [*text_tokens(crops, "\n "), "<|im_start|>", *text_tokens(crops, "assistant\n"), "b"]
    place = shown.index("b")
    assert shown[place + 1 - len(answer) : place + 1] == answer
    assert shown.count("<|im_end|>") == 1 + 3
    # Trees have the layout of training.
    tree = tokens(crops, crops.encode_tree([WIDE], [conversation[:2]]).input_ids)
    assert " " not in tree and " " in shown
    assert tree == [
        token
        for token in tokens(crops, crops.encode(conversation[:2], [WIDE]).input_ids)
        if token != " "
    ]


def test_several_pictures_are_numbered_and_their_patches_run_on(crops):
    encoded = crops.encode([user("x")], [WIDE, PICTURE, WIDE])
    expected = ["<|im_end|>"]
    for number, grid in enumerate([(2, 4), (2, 2), (2, 4)], start=1):
        expected += [*text_tokens(crops, f"Image {number}"), *OVERVIEW, *details(*grid)]
    assert tokens(crops, encoded.input_ids)[: len(expected)] == expected
    assert encoded.image_num_crops.tolist() == [4, 2, 4]
    assert encoded.image_sizes == ((120, 60), (32, 32), (120, 60))
    alone = [crops.config.multicrop(picture) for picture in (WIDE, PICTURE, WIDE)]
    assert (encoded.pixel_values == np.concatenate([a["pixel_values"] for a in alone])).all()
    shifted = [
        np.where(a["image_token_pooling"] < 0, -1, a["image_token_pooling"] + 16 * before)
        for a, before in zip(alone, (0, 4, 6), strict=True)
    ]
    assert (encoded.image_token_pooling == np.concatenate(shifted)).all()
    assert encoded.image_grids.tolist() == [a["image_grid"].tolist() for a in alone]
    pixels, sizes = crops.load_images([WIDE, PICTURE, WIDE])
    assert (pixels == encoded.pixel_values).all() and sizes == encoded.image_sizes
    assert crops.load_images([]) == (None, ())


def test_layout_of_a_video(crops):
    encoded = crops.encode([user("x")], video=CLIP)
    frame = ["<im_start>", *["<im_patch>"] * 4, "<im_end>"]
    expected = ["<|im_end|>", *text_tokens(crops, "0.0 "), *frame]
    expected += [*text_tokens(crops, " 0.5 "), *frame, *text_tokens(crops, " 0.8 "), *frame]
    expected += ["<|im_start|>"]
    assert tokens(crops, encoded.input_ids)[: len(expected)] == expected
    assert encoded.video_grids.tolist() == [[3, 2, 2]]
    assert encoded.frame_times == CLIP.times and encoded.video_size == (120, 60)
    assert encoded.image_sizes == () and encoded.image_grids is None
    one = crops.config.multicrop.frame
    assert (encoded.pixel_values == np.stack([one(frame) for frame in CLIP.frames])).all()
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    expected_index = np.concatenate([np.array(windows) + 16 * frame for frame in range(3)])
    assert (encoded.image_token_pooling == expected_index).all()
    applied = crops.apply([user("x")], video=CLIP)
    assert set(applied) == {
        *("input_ids", "token_type_ids", "labels"),
        *("pixel_values", "image_token_pooling", "video_grids"),
    }


def test_a_frame_of_the_released_size_is_81_tokens(released):
    applied = released.apply([user("What happens?")], video=([WIDE, WIDE], [0.0, 1.25]))
    assert applied["video_grids"].tolist() == [[2, 9, 9]]
    assert applied["image_token_pooling"].shape == (162, 9)
    assert applied["image_token_pooling"].min() == 0
    frame = [151936, *[151938] * 81, 151937]
    space, zero, one, two, dot = (
        released.tokenizer.encode_text(text)[0] for text in (" ", "0", "1", "2", ".")
    )
    expected = [151645, zero, dot, zero, space, *frame, space, one, dot, two, space, *frame]
    assert applied["input_ids"][: len(expected)].tolist() == expected


def test_frame_marks_of_their_own(crops):
    config = ProcessorConfig.molmo2(
        multicrop=crops.config.multicrop,
        video=VideoConfig(pooling_size=2, use_frame_special_tokens=True),
    )
    marked = Processor(config, crops.tokenizer).apply([user("x")], video=CLIP)
    plain = crops.apply([user("x")], video=CLIP)
    swap = {"<im_start>": "<frame_start>", "<im_end>": "<frame_end>"}
    expected = [swap.get(token, token) for token in tokens(crops, plain["input_ids"])]
    assert tokens(crops, marked["input_ids"]) == expected
    assert (marked["token_type_ids"] == plain["token_type_ids"]).all()


def test_videos_in_the_messages_and_beside_them(crops):
    beside = crops.encode([user("x")], video=CLIP)
    text = {"type": "text", "text": "x"}
    for item, video in (
        ({"type": "video", "video": CLIP}, None),
        ({"type": "video"}, CLIP),
        ({"type": "video", "video": (CLIP.frames, CLIP.times)}, None),
    ):
        encoded = crops.encode([user([text, item])], video=video)
        assert encoded.input_ids.tolist() == beside.input_ids.tolist()
        assert (encoded.pixel_values == beside.pixel_values).all()
    item = {"type": "video", "video": CLIP}
    with pytest.raises(ValueError, match="hold 2 videos: a conversation shows one at most"):
        crops.encode([user([item]), assistant("y"), user([item])])
    with pytest.raises(ValueError, match="give it once"):
        crops.encode([user([item])], video=CLIP)
    with pytest.raises(ValueError, match="a video item without a video"):
        crops.encode([user([{"type": "video"}])])
    for call in (
        lambda: crops.encode([user([item])], [WIDE]),
        lambda: crops.encode([user([item, {"type": "image", "image": WIDE}])]),
        lambda: crops.encode_tree([WIDE], BRANCHES, video=CLIP),
    ):
        with pytest.raises(ValueError, match="found 1 pictures beside a video"):
            call()


def test_frames_without_crops_are_pictures_with_times(molmo2):
    """Token by token the pictures of the processor, and before each the time of the frame."""
    config = replace(molmo2.config, video=VideoConfig(max_frames=2))
    frames = Processor(config, molmo2.tokenizer)
    encoded = frames.encode([user("x")], video=CLIP)
    assert encoded.frame_times == CLIP.times and encoded.video_size == (120, 60)
    pictures = frames.encode([user("x")], list(CLIP.frames))
    assert np.array_equal(encoded.pixel_values, pictures.pixel_values)
    assert encoded.image_token_pooling is None and encoded.image_sizes == ()
    num_tokens = [int((e.input_ids == frames.image_token_id).sum()) for e in (encoded, pictures)]
    assert num_tokens[0] == num_tokens[1] == len(CLIP.frames) * config.image_tokens
    text = frames.decode(encoded.input_ids, skip_special_tokens=False)
    assert re.findall(r"\d\.\d", text) == [f"{time:.1f}" for time in CLIP.times]
    thinned = frames.encode([user("x")], video=(list(CLIP.frames), list(CLIP.times)))
    assert thinned.frame_times == (CLIP.times[0], CLIP.times[-1])


def test_processors_of_pictures_refuse_videos(molmo2):
    with pytest.raises(ValueError, match="takes pictures only"):
        molmo2.encode([user("x")], video=CLIP)


def test_apply_masks_all_but_the_answers(crops):
    messages = [user("dog"), assistant("yes"), user("Sure?"), assistant("yes yes")]
    applied = crops.apply(messages, [WIDE])
    kept = applied["labels"] != -100
    assert crops.decode(applied["labels"][kept], False) == "yes<|im_end|>yes yes<|im_end|>"
    assert (applied["labels"][kept] == applied["input_ids"][kept]).all()
    prompt = crops.apply(messages[:1], [WIDE])
    assert (prompt["labels"] == -100).all() and prompt["labels"].dtype == np.int64
    assert tokens(crops, prompt["input_ids"])[-1:] == text_tokens(crops, "\n")
    closed = crops.apply(messages[:1], [WIDE], False)
    assert len(closed["input_ids"]) < len(prompt["input_ids"])


def test_apply_without_crops(molmo2):
    applied = molmo2.apply([user("x")], [PICTURE])
    assert set(applied) == {"input_ids", "token_type_ids", "labels", "pixel_values"}
    assert applied["token_type_ids"].sum() == 6  # four image tokens, start and end


def test_trees_share_crops_and_videos(crops):
    answered = [user("dogs"), assistant("2")]
    for images, video in (([WIDE, PICTURE], None), ([], CLIP)):
        tree = crops.encode_tree(images, [answered, answered], video=video)
        alone = crops.encode(answered[:1], images, video=video)
        length = (tree.subsegment_ids == 10000).sum()
        assert (tree.input_ids[:length] == alone.input_ids[:length]).all()
        assert crops.tokenizer.backend.id_to_token(int(alone.input_ids[length])) == "<|im_start|>"
        for name in ("pixel_values", "image_token_pooling"):
            assert (getattr(tree, name) == getattr(alone, name)).all()
        assert (tree.frame_times, tree.video_size) == (alone.frame_times, alone.video_size)


def test_save_and_load_with_crops(crops, tmp_path):
    crops.save(tmp_path)
    again = Processor.load(tmp_path)
    assert again.config == crops.config
    one, two = (p.encode([user("x")], [WIDE]) for p in (crops, again))
    assert one.input_ids.tolist() == two.input_ids.tolist()


# ---- message trees ----


@pytest.mark.parametrize("processor", ["qwen3", "molmo2"])
@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_a_branch_reads_like_its_conversation_alone(processor, num_pictures, request):
    """Prefix + branch k has the ids, labels and positions of that conversation by itself."""
    processor = request.getfixturevalue(processor)
    pictures = [PICTURE] * num_pictures
    tree = processor.encode_tree(pictures, BRANCHES)
    prefix = tree.subsegment_ids == 10000
    assert prefix[: prefix.sum()].all()
    assert (tree.labels[prefix] == -100).all() and (tree.loss_weights[prefix] == 0).all()
    for number, messages in enumerate(BRANCHES):
        alone = processor.encode(messages, pictures)
        seen = prefix | (tree.subsegment_ids == number)
        length = seen.sum()  # qwen3 ends a finished conversation with a newline, a branch does not
        assert len(alone.input_ids) - length == (
            1 if processor.config.chat_format == "qwen3" else 0
        )
        for name in ("input_ids", "labels", "position_ids"):
            assert (getattr(tree, name)[seen] == getattr(alone, name)[:length]).all()
        end = np.flatnonzero(tree.subsegment_ids == number)[-1]
        assert tree.input_ids[end] == tree.labels[end] == processor.stop_token_ids[0]
    if num_pictures:
        assert tree.pixel_values.shape == (num_pictures, 3, 32, 32)
    else:
        assert tree.pixel_values is None


def test_layout_of_a_small_tree(molmo2):
    """Positions restart at P = 1 (no pictures: the prefix is only the beginning)."""
    tree = molmo2.encode_tree([], [[user("a"), assistant("b")], [user("yes"), assistant("")]])
    ids = molmo2.tokenizer.special_ids
    start, turn = ids["<|im_start|>user\n"], ids["<|im_end|>\n<|im_start|>assistant\n"]
    end = ids["<|im_end|>"]
    a, b, yes = (molmo2.tokenizer.encode_text(t)[0] for t in ("a", "b", "yes"))
    assert tree.input_ids.tolist() == [end, start, a, turn, b, end, start, yes, turn, end]
    assert tree.labels.tolist() == [-100] * 4 + [b, end] + [-100] * 3 + [end]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert tree.subsegment_ids.tolist() == [10000] + [0] * 5 + [1] * 4
    assert tree.loss_weights.tolist() == [0] * 4 + [1, 1] + [0] * 3 + [1]


def test_trap_17_weights_of_molmo2(molmo2):
    """2/sqrt(n) over sqrt(branches), n without the branch's last end; alone it counts."""
    first = [user("a b"), assistant("c d")]  # c, d, end
    second = [user("a e"), assistant("f"), user("a g"), assistant("h")]  # f, end, h, end

    def weight_of(branches, number):
        tree = molmo2.encode_tree([], branches, loss_weighting="molmo2")
        (weight,) = set(tree.loss_weights[(tree.subsegment_ids == number) & (tree.labels != -100)])
        return weight

    for number, branch in enumerate((first, second)):
        labels = molmo2.encode_tree([], [branch]).labels
        n = int((labels != -100).sum())
        assert weight_of([branch], 0) == pytest.approx(2 / n**0.5)
        expected = 2 / (n - 1) ** 0.5 / 2**0.5
        assert weight_of([first, second], number) == pytest.approx(expected)


def test_loss_weights(molmo2):
    tree = molmo2.encode_tree(
        [PICTURE], BRANCHES, loss_weighting="sqrt", branch_weights=[1.0, 0.5, 2.0]
    )
    assert ((tree.loss_weights > 0) == (tree.labels != -100)).all()
    for number, factor in enumerate([1.0, 0.5, 2.0]):
        weights = tree.loss_weights[(tree.subsegment_ids == number) & (tree.labels != -100)]
        assert weights == pytest.approx(factor / len(weights) ** 0.5)
    with pytest.raises(ValueError, match="found 1 branch_weights for 3 branches"):
        molmo2.encode_tree([], BRANCHES, branch_weights=[1.0])
    with pytest.raises(ValueError, match="loss_weighting is 'mean'"):
        molmo2.encode_tree([], BRANCHES, loss_weighting="mean")


@pytest.mark.parametrize(
    ("branch", "error"),
    [
        ([user("x")], "branch 1 ends with a question"),
        ([assistant("x")], "branch 1: message 0 is by 'assistant'"),
        ([user([{"type": "image", "image": PICTURE}]), assistant("x")], "branch 1 holds a picture"),
        ([{"role": "system", "content": "x"}, user("x"), assistant("x")], "a system message"),
        ([{"role": "subtitle", "content": "x"}, user("x"), assistant("x")], "a subtitle"),
        ([user([{"type": "video", "video": CLIP}]), assistant("x")], "a video"),
    ],
)
def test_branches_that_are_refused(qwen3, branch, error):
    with pytest.raises(ValueError, match=error):
        qwen3.encode_tree([], [BRANCHES[0], branch])
    with pytest.raises(ValueError, match="at least one branch"):
        qwen3.encode_tree([], [])


def test_trees_are_encoded_fast_enough_for_training(tokenizer):
    """18 branches in under 2 ms is the aim; the bound is loose for busy machines."""
    processor = Processor(ProcessorConfig.molmo2(image_size=192, image_tokens=36), tokenizer)
    picture = np.zeros((192, 192, 3), dtype=np.uint8)
    branches = [[user(f"Is there a dog {i}?"), assistant("yes")] for i in range(18)]
    best = min(_timed(lambda: processor.encode_tree([picture], branches)) for _ in range(20))
    assert best < 0.01


def _timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---- text back, files, configs ----


def test_decode_takes_lists_arrays_and_tensors(molmo2):
    ids = [*molmo2.tokenizer.encode_text("yes dogs"), molmo2.stop_token_ids[0]]
    for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        assert molmo2.decode(form) == "yes dogs"
        assert molmo2.decode(form, skip_special_tokens=False) == "yes dogs<|im_end|>"


def test_save_and_load(molmo2, tmp_path):
    molmo2.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "processor_config.json",
        "tokenizer.json",
    ]
    again = Processor.load(tmp_path / "model")
    assert again.config == molmo2.config
    one, two = (p.encode_tree([PICTURE], BRANCHES) for p in (molmo2, again))
    assert one.input_ids.tolist() == two.input_ids.tolist()
    assert (one.pixel_values == two.pixel_values).all()


def test_a_processor_goes_to_worker_processes(molmo2):
    molmo2.encode_tree([PICTURE], BRANCHES)  # fills the caches, which do not travel
    again = pickle.loads(pickle.dumps(molmo2))
    one, two = (p.encode_tree([PICTURE], BRANCHES) for p in (molmo2, again))
    assert one.input_ids.tolist() == two.input_ids.tolist()
    assert again.tokenizer.special_ids == molmo2.tokenizer.special_ids


def test_load_from_folders_that_are_not_right(molmo2, tmp_path):
    with pytest.raises(FileNotFoundError, match="processor_config"):
        Processor.load(tmp_path)
    molmo2.save(tmp_path)
    config = tmp_path / "processor_config.json"
    config.write_text('{"image_size": 32, "patch": 14}')
    with pytest.raises(ValueError, match=r"processor_config\.json: .*field\(s\) patch"):
        Processor.load(tmp_path)
    config.write_text('{"image_size": "large"}')
    with pytest.raises(ValueError, match="image_size: expected int, found 'large'"):
        Processor.load(tmp_path)


def test_a_tokenizer_without_the_tokens_of_the_config():
    tokenizer = Tokenizer(small_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    with pytest.raises(ValueError, match=r"no special token '<\|image_pad\|>'"):
        Processor(ProcessorConfig(), tokenizer)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"chat_format": "llama"}, "chat_format is 'llama', expected one of qwen3, molmo2"),
        ({"resample": "nearest"}, "resample is 'nearest', expected one of bicubic, bilinear"),
        ({"image_size": 0}, "image_size"),
        ({"image_tokens": 0}, "image_tokens"),
        ({"image_std": (1.0, 0.0, 1.0)}, "image_std"),
        ({"rescale_factor": 0.0}, "rescale_factor"),
        ({"stop_tokens": ()}, "stop_tokens is empty"),
        ({"video": VideoConfig()}, "video is set, and neither multicrop nor image_tokens"),
        ({"multicrop": MultiCrop()}, "image_size is 384, but multicrop says 378"),
        ({"multicrop": MultiCrop(), "image_size": 378}, "resample is 'bicubic', but multicrop"),
    ],
)
def test_configs_that_are_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        ProcessorConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_frames": 0}, "max_frames must be at least 1"),
        ({"pooling_size": 0}, "pooling_size must be at least 1"),
        ({"max_fps": 0.0}, "max_fps"),
    ],
)
def test_video_configs_that_are_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        VideoConfig(**fields)


def test_one_picture_that_comes_several_times_is_prepared_once(monkeypatch) -> None:
    """A record that named one large picture sixty times took sixty times as long."""
    calls = []
    image = Image.new("RGB", (40, 30), "red")
    other = Image.new("RGB", (40, 30), "blue")
    monkeypatch.setattr(
        visual,
        "preprocess",
        lambda image, **options: calls.append(image) or preprocess(image, **options),
    )
    loader = visual.VisualLoader(ProcessorConfig(image_size=16))
    pixels = loader.load([image, other, image, image]).fields["pixel_values"]
    assert calls == [image, other]
    assert np.array_equal(pixels[0], pixels[3]) and not np.array_equal(pixels[0], pixels[1])
    stacked = np.stack([np.asarray(image), np.asarray(other)])
    assert np.array_equal(loader.load(stacked).fields["pixel_values"], pixels[:2])


# ---- parts as servers take them ----


def png_bytes(colour="red"):
    Image.new("RGB", (8, 6), colour).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    "part",
    [
        lambda path: {"type": "image_url", "image_url": {"url": data_url(path.read_bytes())}},
        lambda path: {"type": "image_url", "image_url": data_url(path.read_bytes(), "")},
        lambda path: {"type": "input_image", "image_url": data_url(path.read_bytes())},
        lambda path: {"type": "image_url", "image_url": {"url": path.as_uri(), "detail": "low"}},
        lambda path: {"type": "image", "image": path.as_uri()},
        lambda path: {"type": "image", "image": data_url(path.read_bytes())},
        lambda path: {"type": "image", "url": data_url(path.read_bytes())},
        lambda path: {"type": "image", "url": path.as_uri()},
        lambda path: {"type": "image", "image": io.BytesIO(path.read_bytes())},
        lambda path: {"type": "image", "image": path.open("rb")},
    ],
)
def test_pictures_of_parts(molmo2, crops, tmp_path, part):
    path = tmp_path / "a b.png"
    path.write_bytes(png_bytes())
    for processor in (molmo2, crops):
        expected = processor.encode([user("What?")], [path])
        text = {"type": "input_text", "text": "What?"}
        given = processor.encode([{"role": "user", "content": [part(path), text]}])
        assert (given.input_ids == expected.input_ids).all()
        assert (given.pixel_values == expected.pixel_values).all()
        assert given.image_sizes == ((8, 6),)


def test_a_video_of_a_part(crops):
    images = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    images[0].save(stream := io.BytesIO(), "GIF", save_all=True, append_images=images[1:])
    part = {"type": "video_url", "video_url": {"url": data_url(stream.getvalue(), "image/gif")}}
    text = {"type": "text", "text": "What?"}
    given = crops.encode([{"role": "user", "content": [part, text]}])
    expected = crops.encode([user("What?")], video=stream.getvalue())
    assert (given.input_ids == expected.input_ids).all()
    assert given.frame_times == expected.frame_times and given.video_size == (8, 6)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://example.com/a.png", r"the address 'https://.*nothing is downloaded here"),
        ("a.png", "the address 'a.png'"),
        ("data:image/png;base64,!!", "a data URL that cannot be read"),
        ("data:image/png,abc", "a data URL that cannot be read"),
        ("", "without an address"),
        (None, "without an address"),
        (7, "without an address"),
    ],
)
def test_addresses_of_parts_that_are_refused(molmo2, url, error):
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(ValueError, match=f"message 0 holds .*{error}") as caught:
        molmo2.encode([{"role": "user", "content": [part]}])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_one_open_file_is_no_list(molmo2):
    with pytest.raises(ValueError, match="images must be a list, found one BytesIO"):
        molmo2.encode([user("What?")], io.BytesIO(png_bytes()))


def test_one_large_picture_is_held_at_a_time(crops, monkeypatch):
    """A record with sixty pictures held sixty of them."""
    held, most = [], []

    def load(source):
        image = load_image(source).copy()
        held.append(weakref.ref(image))
        most.append(sum(ref() is not None for ref in held))
        return image

    monkeypatch.setattr("nanomolmo2.processor.visual.load_image", load)
    crops.encode([user("What?")], [png_bytes() for _ in range(5)])
    assert len(most) == 5 and max(most) == 1


def test_frames_of_a_file_are_cut_as_they_come(crops, monkeypatch):
    """And give the pixels that frames in their own size give."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (90, 70, 3), np.uint8)) for _ in range(4)]
    images[0].save(
        stream := io.BytesIO(), "WEBP", save_all=True, append_images=images[1:], duration=500
    )
    expected = crops.encode([user("What?")], video=load_video(stream.getvalue(), max_frames=8))
    monkeypatch.setattr("nanomolmo2.processor.video.MAX_VIDEO_BYTES", 1)  # not asked
    given = crops.encode([user("What?")], video=stream.getvalue())
    assert (given.pixel_values == expected.pixel_values).all() and given.video_size == (70, 90)
