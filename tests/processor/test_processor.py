"""Processor: ids, labels and pixels of conversations and message trees; text back."""

import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.processor import Processor, ProcessorConfig, Tokenizer
from tests.processor.helpers import SPECIAL, assistant, small_backend, user

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
    ],
)
def test_configs_that_are_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        ProcessorConfig(**fields)
