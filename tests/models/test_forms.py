"""Pictures in any form, and the places of their tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomolmo2.batch import Batch
from nanomolmo2.models.forms import check_batch, list_images, place
from tests.nets import IMAGE, pictures, small_config, text_ids

N = 4  # visual tokens of a picture


def is_image(*rows: str) -> Tensor:
    """``.`` text, ``i`` an image token."""
    return torch.tensor([[c == "i" for c in row] for row in rows])


def mask(*rows: str) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def padded(*counts: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """The pictures in reading order, and as (B, M, 3, H, W) with zeros behind a row's own."""
    images = pictures(sum(counts))
    rows = torch.zeros(len(counts), width or max(counts), *images.shape[1:])
    for row, own in zip(rows, images.split(list(counts)), strict=True):
        row[: len(own)] = own
    return images, rows


def listed(pixel_values: Any, counts: list[int]) -> tuple[Tensor, list[int] | None]:
    found, by_row = list_images(pixel_values, counts, N)
    return torch.stack(found) if found else torch.empty(0, 3, 22, 22), by_row


def test_every_form_of_three_pictures_in_rows_of_two_none_and_one() -> None:
    images, rows = padded(2, 0, 1)
    counts = [2, 0, 1]
    forms: list[tuple[Any, list[int] | None]] = [
        (images, None),
        (list(images), None),
        (tuple(images), None),
        (rows, counts),
        ([images[:2], None, images[2:]], counts),
        ([images[:2], images[:0], images[2]], counts),
    ]
    for form, by_row in forms:
        found, found_by_row = listed(form, counts)
        assert torch.equal(found, images)
        assert found_by_row == by_row


@pytest.mark.parametrize("nothing", [None, [], [None, None], torch.zeros(0, 3, 22, 22)])
def test_no_pictures(nothing: Any) -> None:
    assert len(listed(nothing, [0, 0])[0]) == 0


def test_padding_is_told_from_pictures_in_either_form_of_prompt() -> None:
    """Where every visual token is written out, a row has more image tokens than pictures."""
    images, rows = padded(2, 1)
    for counts in ([2, 1], [2 * N, N]):
        found, by_row = listed(rows, counts)
        assert torch.equal(found, images)
        assert by_row == [2, 1]
    wide = padded(1, 1, width=N + 1)[1]
    assert listed(wide, [N, N])[1] == [1, 1]


def test_an_all_zero_picture_is_one_where_a_token_asks_for_it() -> None:
    rows = padded(1, 0, width=3)[1]
    assert listed(rows, [2, 1])[1] == [2, 1]
    assert listed(torch.zeros(2, 1, 3, 22, 22), [1, 1])[1] == [1, 1]
    assert listed(torch.zeros(2, 1, 3, 22, 22), [N, N])[1] == [1, 1]
    assert listed(torch.zeros(2, 3, 3, 22, 22), [0, 0])[1] == [0, 0]
    behind = torch.stack([torch.zeros(3, 22, 22), pictures(1)[0]])[None]
    assert listed(behind, [2])[1] == [2]


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(3, 22, 22), r"\(I, 3, H, W\) or \(B, M, 3, H, W\), found \(3, 22, 22\)"),
        (torch.zeros(3, 1, 3, 22, 22), r"holds 3 rows of pictures, input_ids has 2 rows"),
        ([torch.zeros(22, 22)], r"entry 0 of pixel_values must be None, .* found \(22, 22\)"),
        ([None, torch.zeros(1, 1, 3, 22, 22)], r"entry 1 .* found \(1, 1, 3, 22, 22\)"),
        ([None, None, torch.zeros(1, 3, 22, 22)], r"lists 3 rows of pictures, input_ids has 2"),
    ],
)
def test_other_forms(pixel_values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_images(pixel_values, [1, 1], N)


def laid_out(placement: Any) -> list[str]:
    """Rows as text: the index of the token, ``v`` a visual token, ``_`` padding."""
    rows = []
    for b in range(len(placement.source)):
        cells = []
        for t, source in enumerate(placement.source[b].tolist()):
            real = placement.real is None or bool(placement.real[b, t])
            cells.append("v" if placement.visual[b, t] else str(source) if real else "_")
        rows.append("".join(cells))
    return rows


def test_an_image_token_widens_to_its_visual_tokens() -> None:
    assert laid_out(place(is_image(".i.."), [3], None)) == ["0vvv23"]
    assert laid_out(place(is_image("ii"), [2, 3], None)) == ["vvvvv"]
    assert place(is_image(".i.."), [3], None).real is None
    assert laid_out(place(is_image("...", "..."), [], None)) == ["012", "012"]


def test_rows_with_different_counts_end_in_padding() -> None:
    found = place(is_image(".i.i", "....", "i..."), [3, 2, 2], None)
    assert laid_out(found) == ["0vvv2vv", "0123___", "vv123__"]


def test_padding_keeps_its_side() -> None:
    image = is_image(".i..", "i...")
    right = place(image, [3, 3], mask("1111", "1100"))
    assert laid_out(right) == ["0vvv23", "vvv1__"]
    left = place(is_image("..i.", ".i.."), [3, 2], mask("0111", "1111"))
    assert laid_out(left) == ["_1vvv3", "_0vv23"]  # a left-padded batch grows to the left
    text_only = place(is_image("...", "i.."), [3], mask("001", "111"))
    assert laid_out(text_only) == ["____2", "vvv12"]


def test_written_out_tokens_stay_where_they_are() -> None:
    found = place(is_image(".iii.ii", "......."), [3, 2], mask("1111111", "0001111"))
    assert laid_out(found) == ["0vvv4vv", "___3456"]
    single = place(is_image(".i.i"), [1, 1], None)  # one visual token a picture: both at once
    assert laid_out(single) == ["0v2v"]


def test_values_spread_with_their_tokens() -> None:
    found = place(is_image(".i.i", "..i."), [3, 2, 2], mask("1111", "1110"))
    values = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    assert found.expand(values).tolist()[0] == [10, 11, 11, 11, 12, 13, 13]
    assert found.expand(values, -100).tolist() == [
        [10, -100, -100, -100, 12, -100, -100],
        [20, 21, -100, -100, -100, -100, -100],
    ]


@pytest.mark.parametrize(
    ("image", "counts", "by_row", "message"),
    [
        (is_image(".i.", "..."), [], None, r"1 image tokens \(by row: 1, 0\), but 0 picture"),
        (is_image("...", "..."), [3], None, r"0 image tokens .* but 1 picture\(s\) with 3 visual"),
        (is_image("ii.", "..."), [3], None, r"2 image tokens \(by row: 2, 0\), but 1 picture"),
        (
            is_image("iii", "i.."),
            [3, 3],
            None,
            "4 image tokens .* 2 picture.* with 6 visual tokens",
        ),
        (is_image("i..", "i.."), [3, 3], [2, 0], r"row 0 holds 1 image tokens, .* 2 picture\(s\)"),
        (is_image("iii", "iii"), [3, 3], [0, 2], r"row 0 holds 3 image tokens, .* want 0"),
    ],
)
def test_tokens_and_pictures_that_do_not_agree(
    image: Tensor, counts: list[int], by_row: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        place(image, counts, None, by_row)


def test_a_batch_is_checked_before_it_moves() -> None:
    config = small_config()
    n = config.num_visual_tokens
    ids = text_ids(1, 20)
    ids[0, 2 : 2 + n] = IMAGE
    whole = Batch(ids, labels=ids.masked_fill(ids == IMAGE, -100), pixel_values=pictures(1))
    assert check_batch(whole, config) is whole
    assert check_batch(Batch(text_ids(2, 5)), config).pixel_values is None
    for wrong, message in (
        (
            replace(whole, pixel_values=pictures(2)),
            rf"{n} image tokens, .* make {2 * n} visual",
        ),
        (replace(whole, pixel_values=None), rf"{n} image tokens, but its images make 0 visual"),
        (
            Batch(text_ids(1, 5), pixel_values=pictures(1)),
            f"0 image tokens, .* make {n} visual",
        ),
        (replace(whole, input_ids=ids + 89), "but the vocabulary has 89"),
        (replace(whole, labels=ids + 89), "the model writes tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            check_batch(wrong, config)
