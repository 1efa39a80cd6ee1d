"""Collate: padding on either side, and what is left out."""

import numpy as np
import pytest

from nanomolmo2.processor import collate
from tests.processor.helpers import assistant, user

PICTURE = np.zeros((32, 32, 3), dtype=np.uint8)
LONG = [[user("Is there a dog?"), assistant("yes")], [user("x"), assistant("No, there is not.")]]
SHORT = [[user("x"), assistant("y")]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_row_comes_back_from_under_its_mask(molmo2, side):
    trees = [molmo2.encode_tree([PICTURE], LONG), molmo2.encode_tree([PICTURE] * 2, SHORT)]
    batch = collate(trees, molmo2.pad_token_id, side)
    length = max(len(t.input_ids) for t in trees)
    assert batch.input_ids.shape == (2, length)
    values = {"input_ids": molmo2.pad_token_id, "labels": -100, "position_ids": 0}
    values |= {"loss_weights": 0, "subsegment_ids": -1}
    for row, tree in enumerate(trees):
        mask = batch.attention_mask[row].numpy()
        assert mask.sum() == len(tree.input_ids)
        assert mask[0 if side == "right" else -1]
        for name, pad in values.items():
            padded = getattr(batch, name)[row].numpy()
            assert (padded[mask] == getattr(tree, name)).all()
            assert (padded[~mask] == pad).all()
    assert not batch.attention_mask.all()  # else nothing was padded
    assert batch.pixel_values.shape == (3, 3, 32, 32)
    assert str(batch.attention_mask.dtype) == "torch.bool"
    assert {str(getattr(batch, n).dtype) for n in ("input_ids", "labels", "position_ids")} == {
        "torch.int64"
    }
    assert str(batch.loss_weights.dtype) == "torch.float32"


def test_prompts_have_no_labels_positions_or_subsegments(qwen3):
    batch = collate([qwen3.encode([user("a")]), qwen3.encode([user("abc")])], 0, "left")
    assert set(batch.tensors()) == {"input_ids", "attention_mask"}


def test_rows_of_different_kinds(qwen3):
    """What one row has, the others get in its neutral form."""
    tree = qwen3.encode_tree([PICTURE], LONG)
    answered = qwen3.encode(SHORT[0])
    prompt = qwen3.encode([user("x")])
    batch = collate([tree, answered, prompt], qwen3.pad_token_id)
    assert (batch.loss_weights[1] == (batch.labels[1] != -100)).all()
    assert batch.loss_weights[1].sum() == 2
    assert (batch.labels[2] == -100).all() and (batch.loss_weights[2] == 0).all()
    length = len(prompt.input_ids)
    assert (batch.subsegment_ids[2, :length] == 0).all()
    assert batch.position_ids[2, :length].tolist() == list(range(length))
    assert batch.pixel_values.shape == (1, 3, 32, 32)


def test_pooling_windows_go_on_behind_the_crops_before(crops):
    """Two rows of pictures, a row without, and a video with wider windows."""
    pictures = crops.encode([user("x")], [np.zeros((90, 60, 3), np.uint8), PICTURE])
    video = crops.encode([user("x")], video=([PICTURE, PICTURE], [0.0, 0.5]))
    video.image_token_pooling = np.pad(  # as wide as windows of 3 x 3
        video.image_token_pooling, ((0, 0), (0, 5)), constant_values=-1
    )
    rows = [pictures, crops.encode([user("x")]), pictures, video]
    batch = collate(rows, crops.pad_token_id)
    n, patches = len(pictures.image_token_pooling), 16 * len(pictures.pixel_values)
    assert batch.pixel_values.shape == (2 * patches // 16 + 2, 16, 588)
    pooling = batch.image_token_pooling.numpy()
    assert pooling.shape == (2 * n + len(video.image_token_pooling), 9)
    assert (pooling[: 2 * n, 4:] == -1).all()
    for start, example, before in (
        (0, pictures, 0),
        (n, pictures, patches),
        (2 * n, video, 2 * patches),
    ):
        own = example.image_token_pooling
        there = pooling[start : start + len(own), : own.shape[1]]
        assert ((there == -1) == (own == -1)).all()
        assert (there[own >= 0] == own[own >= 0] + before).all()
    image_tokens = (batch.input_ids == crops.image_token_id).sum()
    assert image_tokens == len(pooling)
    used = pooling[pooling >= 0]
    assert len(set(used.tolist())) == len(used) and used.max() < 16 * len(batch.pixel_values)
    assert collate([rows[1]], 0).image_token_pooling is None


def test_refused(qwen3):
    with pytest.raises(ValueError, match="nothing to collate"):
        collate([], 0)
    with pytest.raises(ValueError, match="padding_side is 'both'"):
        collate([qwen3.encode([user("x")])], 0, "both")
