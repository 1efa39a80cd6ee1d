"""Collate: encoded examples of different lengths -> one padded Batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nanomolmo2.batch import IGNORED_LABEL, NO_MORE_POINTS, Batch
from nanomolmo2.processor.crops import shift_windows
from nanomolmo2.processor.processor import Encoded


def collate(
    encoded: Sequence[Encoded],
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> Batch:
    """Pad examples to the longest and stack them; images are joined in reading order.

    Crops are counted through the batch, and so are the patches in ``image_token_pooling``; windows
    of images and of videos (4 and 9 patches) are filled up with -1 to the widest.

    Padding is ``pad_token_id``, mask False, label -100, weight 0, position 0, subsegment -1.
    What no example has is None: labels without any answer, weights, and for rows without message
    trees also subsegments and positions, which then follow from the mask. If only some rows have
    it, the others get labels -100, weight 1 a label, subsegment 0.

    Rows of point targets are counted through the batch too, and so are lists of points.

    Args:
        padding_side: ``right`` for training, ``left`` or ``right`` for generation.
    """
    if not encoded:
        raise ValueError("there is nothing to collate: give at least one encoded example")
    for example in encoded:
        check_targets(example)
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side is {padding_side!r}, expected 'right' or 'left'")
    has_labels = any(e.labels is not None for e in encoded)
    has_weights = any(e.loss_weights is not None for e in encoded)
    has_trees = any(e.subsegment_ids is not None for e in encoded)

    def pad(rows: Sequence[NDArray[Any]], value: float) -> torch.Tensor:  # (B, T)
        length = max(len(row) for row in rows)
        padded = np.full((len(rows), length), value, dtype=rows[0].dtype)
        for out, row in zip(padded, rows, strict=True):
            if padding_side == "right":
                out[: len(row)] = row
            else:
                out[length - len(row) :] = row
        return torch.from_numpy(padded)

    images = [e.pixel_values for e in encoded if e.pixel_values is not None]
    windows = join_windows(encoded)
    targets, lists = join_targets(encoded)
    return Batch(
        input_ids=pad([e.input_ids for e in encoded], pad_token_id),
        attention_mask=pad([np.ones(len(e.input_ids), dtype=bool) for e in encoded], False),
        position_ids=pad([e.position_ids for e in encoded], 0) if has_trees else None,
        labels=pad([labels_of(e) for e in encoded], IGNORED_LABEL) if has_labels else None,
        loss_weights=pad([weights_of(e) for e in encoded], 0) if has_weights else None,
        subsegment_ids=pad([subsegments_of(e) for e in encoded], -1) if has_trees else None,
        pixel_values=torch.from_numpy(np.concatenate(images)) if images else None,
        image_token_pooling=None if windows is None else torch.from_numpy(windows),
        point_targets=None if targets is None else torch.from_numpy(targets),
        point_lists=None if lists is None else torch.from_numpy(lists),
    )


def join_windows(encoded: Sequence[Encoded]) -> NDArray[np.int64] | None:  # (n, K)
    """The pooling windows of all examples, each example's moved behind the crops before it."""
    windows, num_before = [], 0  # patches
    for example in encoded:
        index, crops = example.image_token_pooling, example.pixel_values
        if index is None or crops is None:
            continue
        windows.append(shift_windows(index, num_before))
        # Of an image that is not cut every patch is in one window; its pixels are not patches yet.
        is_cropped = crops.ndim == 3
        num_before += crops.shape[0] * crops.shape[1] if is_cropped else int((index >= 0).sum())
    if not windows:
        return None
    width = max(index.shape[1] for index in windows)
    return np.concatenate(
        [
            np.pad(index, ((0, 0), (0, width - index.shape[1])), constant_values=-1)
            for index in windows
        ]
    )


def join_targets(
    encoded: Sequence[Encoded],
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """(``point_targets``, ``point_lists``) of all examples; None if no example has any.

    Rows are moved behind the rows of the examples before, the end of a list stays what it is.
    """
    targets, lists = [], []
    rows_before = lists_before = 0
    for example in encoded:
        if example.point_targets is not None:
            moved = example.point_targets.copy()
            moved[moved[:, 0] != NO_MORE_POINTS, 0] += rows_before
            targets.append(moved)
            lists.append(lists_of(example) + lists_before)
            lists_before = int(lists[-1].max(initial=lists_before - 1)) + 1
        if example.image_token_pooling is not None:
            rows_before += int((example.image_token_pooling >= 0).any(axis=1).sum())
    if not targets:
        return None, None
    return np.concatenate(targets), np.concatenate(lists)


def lists_of(example: Encoded) -> NDArray[np.int64]:
    """(P,); a new list after every end of one, if nothing else is said."""
    if example.point_lists is not None:
        return example.point_lists
    assert example.point_targets is not None
    ends = example.point_targets[:, 0] == NO_MORE_POINTS
    numbers: NDArray[np.int64] = np.cumsum(ends) - ends
    return numbers


def check_targets(example: Encoded) -> None:
    """Check that the markers of an example and its ``point_targets`` go together.

    An example that is cut may end inside a point; then its targets are cut in step, with -1 for the
    slot and the cell whose marker is gone.

    Raises: ValueError saying what does not.
    """
    if (space := example.point_space) is None:
        return
    found = example.point_targets
    targets = np.zeros((0, 3), dtype=np.int64) if found is None else found
    ids = example.input_ids
    places = np.flatnonzero(ids == space.markers[0])
    if len(places) != len(targets):
        raise ValueError(
            f"an example holds {len(places)} markers of rows and {len(targets)} point_targets: it "
            f"needs one for each; an example that was cut needs its targets cut in step"
        )
    ends = targets[:, 0] == NO_MORE_POINTS
    if ((targets[:, 0] < 0) | (targets[:, 0] >= space.num_rows))[~ends].any():
        raise ValueError(
            f"point_targets select row {targets[~ends, 0].max()}, but the prompt has "
            f"{space.num_rows} rows: they belong to another prompt"
        )
    following = np.append(ids, [-1, -1])
    for step, name in ((1, "slot"), (2, "cell")):
        has_marker = following[places + step] == space.markers[step]
        if step == 2:
            has_marker &= following[places + 1] == space.markers[1]
        total = int((ids == space.markers[step]).sum())
        if (has_marker != (targets[:, step] >= 0)).any() or total != int(has_marker.sum()):
            raise ValueError(
                f"an example holds a point without its {name}, or a {name} without its point: a "
                f"point is three markers one after the other; where it is cut off, its "
                f"point_targets have -1"
            )


def labels_of(example: Encoded) -> NDArray[np.int64]:
    """(T,); -100 everywhere if there are none."""
    if example.labels is not None:
        return example.labels
    return np.full(len(example.input_ids), IGNORED_LABEL, dtype=np.int64)


def weights_of(example: Encoded) -> NDArray[np.float32]:
    """(T,); 1 a label if there are none."""
    if example.loss_weights is not None:
        return example.loss_weights
    weights: NDArray[np.float32] = (labels_of(example) != IGNORED_LABEL).astype(np.float32)
    return weights


def subsegments_of(example: Encoded) -> NDArray[np.int64]:
    """(T,); 0 everywhere if there are none."""
    if example.subsegment_ids is not None:
        return example.subsegment_ids
    return np.zeros(len(example.input_ids), dtype=np.int64)
