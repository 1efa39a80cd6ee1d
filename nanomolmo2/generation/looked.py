"""Why there? Where a model looked when it chose a token of its answer.

A second pass over prompt and answer, away from the engine: a `Cache` of the decoder that keeps
nothing, and adds up the attention of a few positions. H heads, T positions, Dh head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanomolmo2.generation.answer import SELECTED, Answer
from nanomolmo2.generation.pointing import Classes, read_classes
from nanomolmo2.generation.request import Request
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.attention import attend, sequence_mask
from nanomolmo2.processor import Encoded, Processor
from nanomolmo2.processor.point_space import View

NOTE = (
    "Weak evidence: attention, averaged over all layers and heads, says which parts of the picture "
    "were read, not what they did to the answer."
)

Token = int | str | tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Looked:
    """Where a token of an answer looked, or several.

    Attributes:
        images: one (rows, cols) float32 for every image, or frame of a video, which sums to 1. The
            cells are of one size and cover the whole image, the first at its top left: the image's
            visual tokens where they are of one size, else its patches. With crops it is the grid of
            the detailed view, on which the overview's tokens lie too.
        shares: how the attention to all images divides between them; they sum to 1.
        times: seconds of a video's frames; empty for images.
        to_images: the share of all attention that went to images; the rest went to text.
        tokens: of the answer, as text.
        chosen: numbers of those that are meant, from 0; one behind the last has yet to come.
        note: what this can tell and what not.
    """

    images: tuple[NDArray[np.float32], ...]
    shares: tuple[float, ...]
    times: tuple[float, ...]
    to_images: float
    tokens: tuple[str, ...]
    chosen: tuple[int, ...]
    note: str = NOTE

    def to_dict(self) -> dict[str, Any]:
        """As `json.dumps` takes it: ``weights`` of each image row by row; ``token`` is the first
        that is meant."""
        images: list[dict[str, Any]] = [
            {
                "rows": len(weights),
                "cols": len(weights[0]),
                "weights": weights.astype(float).round(9).tolist(),
                "share": round(share, 6),
            }
            for weights, share in zip(self.images, self.shares, strict=True)
        ]
        for image, time in zip(images, self.times, strict=False):  # pictures have none
            image["time"] = time
        return {
            "images": images,
            "to_images": round(self.to_images, 6),
            "token": self.chosen[0],
            "tokens": list(self.tokens),
            "note": self.note,
        }


@torch.no_grad()
def looked(
    model: NanoMolmo2,
    processor: Processor,
    encoded: Encoded,
    answer: str | Answer,
    token: Token,
    see: Callable[[Encoded], Request],
) -> Looked:
    """See `VLM.looked`.

    Args:
        encoded: the question.
        see: makes embeddings of a prompt and its images.
    """
    views = _views(model, processor, encoded)
    if not views:
        raise ValueError("nothing is shown, so nothing was looked at: give a picture or a video")
    ids = _ids_of(answer, processor)
    chosen = _chosen(ids, token, processor)
    prompt, last = len(encoded.input_ids), chosen[-1]
    if prompt + last > model.config.llm_config.max_position_embeddings:
        raise ValueError(
            f"the question has {prompt} positions and the answer {last} until there, which the "
            f"model's context cannot hold: ask about a token that comes earlier"
        )
    request = see(_longer(model, encoded, ids[:last]))
    # A token is chosen at the position before its own; what stands behind is not seen.
    weights = _attention(model, request, [prompt - 1 + number for number in chosen])
    is_visual = model.config.is_visual(torch.as_tensor(request.input_ids).cpu())
    grids = _laid_out(weights[is_visual].numpy(), views)
    sums = [float(grid.sum()) for grid in grids]
    return Looked(
        images=tuple((g / s).astype(np.float32) for g, s in zip(grids, sums, strict=True)),
        shares=tuple(s / math.fsum(sums) for s in sums),
        times=tuple(encoded.frame_times),
        to_images=math.fsum(sums),
        tokens=tuple(processor.decode([id], skip_special_tokens=False) for id in ids),
        chosen=tuple(chosen),
    )


def _attention(model: NanoMolmo2, request: Request, queries: Sequence[int]) -> Tensor:
    """(T,) float32 on the CPU: where these positions attend to, the mean of layers and heads."""
    embeds, both = request.inputs_embeds, request.bidirectional
    assert embeds is not None
    T, device, mask = len(embeds), embeds.device, None
    if both is not None:
        tokens = torch.from_numpy(both).to(device)
        mask = sequence_mask(T, image_tokens=tokens[None], device=device)
    watched = Watched(queries, mask)
    model.llm.states(embeds[None], torch.arange(T, device=device)[None], cache=watched)
    return watched.mean().mean(dim=0).cpu()


class Watched:
    """Attends as the decoder does, and adds up where some positions attend to.

    A `nanomolmo2.models.attention.Cache` that holds nothing of the past.
    """

    def __init__(self, queries: Sequence[int], mask: Tensor | None) -> None:
        """
        Args:
            queries: the positions that are watched.
            mask: (1, 1, T, T) bool, True = see; None = causal.
        """
        self.queries, self.mask = list(queries), mask
        self._sum: Tensor | None = None  # (queries, T), over layers
        self._layers = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, T, Dh) attends to k, v (1, K, T, Dh) -> (1, H, T, Dh)."""
        own = q[0, :, self.queries].float()  # (H, queries, Dh)
        keys = k[0].float().repeat_interleave(q.shape[1] // k.shape[1], dim=0)  # (H, T, Dh)
        scores = own @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
        if self.mask is not None:
            allowed = self.mask[0, 0, self.queries]
        else:
            places = torch.arange(k.shape[2], device=k.device)
            allowed = places <= torch.tensor(self.queries, device=k.device)[:, None]
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).mean(dim=0)
        self._sum = weights if self._sum is None else self._sum + weights
        self._layers += 1
        return attend(q, k, v, self.mask, causal=self.mask is None)

    def mean(self) -> Tensor:
        """(queries, T): the mean over layers and heads; each row sums to 1."""
        assert self._sum is not None
        return self._sum / self._layers


# ---- the answer's tokens ----


def _ids_of(answer: str | Answer, processor: Processor) -> list[int]:
    """Ids of an answer; parts of points stand behind the vocabulary."""
    if isinstance(answer, Answer) and answer.token_ids:
        return list(answer.token_ids)
    text = answer.text if isinstance(answer, Answer) else answer
    points = processor.config.points
    if points is None:
        return list(processor.tokenizer.encode_text(text))
    first = points.num_embeddings or processor.tokenizer.vocab_size
    ids: list[int] = []
    for number, part in enumerate(SELECTED.split(text)):
        if number % 2:
            ids.append(first + int(part.strip("<>").removeprefix("POINT_")))
        elif part:
            ids += processor.tokenizer.encode_text(part)
    return ids


def _chosen(ids: Sequence[int], token: Token, processor: Processor) -> list[int]:
    """The numbers of the tokens that are meant, in order.

    Raises: ValueError where the answer has no such token or text.
    """
    if token is None:
        return [max(len(ids) - 1, 0)]
    if isinstance(token, int):
        if token == len(ids):
            return [token]
        if not -len(ids) <= token < len(ids):
            raise ValueError(
                f"the answer has {len(ids)} tokens, and token {token} is asked for: from 0 on, and "
                f"{len(ids)} is the one that comes next"
            )
        return [token % len(ids)]
    ends = [len(processor.decode(ids[: i + 1])) for i in range(len(ids))]
    if isinstance(token, str):
        text = processor.decode(ids)
        start = text.find(token) if token else -1
        if start < 0:
            raise ValueError(f"the answer has no {token!r}: name a part of its text {text[:80]!r}")
        token = (start, start + len(token))
    start, end = token
    begins = [0, *ends[:-1]]
    chosen = [i for i in range(len(ids)) if begins[i] < end and ends[i] > start]
    if not chosen:
        raise ValueError(
            f"found the characters {start} to {end}, but the answer has {ends[-1] if ends else 0}: "
            f"give the first and the one behind the last"
        )
    return chosen


def _longer(model: NanoMolmo2, encoded: Encoded, ids: Sequence[int]) -> Encoded:
    """A prompt with the beginning of its answer behind it."""
    new, targets = np.array(ids, dtype=np.int64), encoded.point_targets
    rule, space = model.config.point_config, encoded.point_space
    if rule is not None and space is not None:
        classes = Classes(space.first_class, space.num_rows, space.num_slots)
        new, own = read_classes(new, classes, rule)
        targets = own if targets is None else np.concatenate([targets, own])
    ids_of_both = np.concatenate([encoded.input_ids, new])
    positions = np.arange(len(ids_of_both))
    return replace(
        encoded, input_ids=ids_of_both, position_ids=positions, point_targets=targets, labels=None
    )


# ---- the image ----


def _views(model: NanoMolmo2, processor: Processor, encoded: Encoded) -> list[list[View]]:
    """Of each image or frame its grids of patches: the overview, if there is one, then details."""
    config, multicrop = model.config, processor.config.multicrop
    if encoded.pixel_values is None:
        return []
    if multicrop is None:
        connector = config.connector
        if connector.connector_type == "resampler":
            raise ValueError(
                "the visual tokens of this model are mixed from the whole picture (a resampler), "
                "so where they were looked at says nothing of places"
            )
        side = math.isqrt(config.vision_config.num_patches)
        window = connector.pooling_size if connector.connector_type == "pooling" else 1
        return [[View(0, side, side, window)]] * len(encoded.pixel_values)
    side = multicrop.patches_per_side
    if encoded.video_grids is not None:
        video = processor.config.video
        assert video is not None
        return [[View(0, side, side, video.pooling_size)]] * int(encoded.video_grids[0, 0])
    window = multicrop.pooling_size
    overview = View(0, side, side, window)
    return [
        [overview, View(0, *multicrop.patch_grid(*size), window)] for size in encoded.image_sizes
    ]


def _laid_out(
    weights: NDArray[np.float32], views: Sequence[Sequence[View]]
) -> list[NDArray[np.float64]]:
    """Weights (n,) of visual tokens on one grid for each image: (rows, cols)."""
    grids, at = [], 0
    for of_image in views:
        details = of_image[-1]
        rows, cols = _cells(details.rows, details.window), _cells(details.cols, details.window)
        grid = np.zeros((rows, cols))
        for view in of_image:
            down, across = view.windows
            own = weights[at:][: down * across].reshape(down, across).astype(np.float64)
            at += down * across
            by_rows = _spread(down, view.rows, view.window, rows)
            by_cols = _spread(across, view.cols, view.window, cols)
            grid += by_rows @ own @ by_cols.T
        grids.append(grid)
    assert at == len(weights), f"{len(weights)} visual tokens, laid out {at}"
    return grids


def _cells(patches: int, window: int) -> int:
    """Cells of one size along a side: whole windows, or patches where they do not fit."""
    return patches if patches % window else patches // window


def _spread(windows: int, patches: int, window: int, cells: int) -> NDArray[np.float64]:
    """(cells, windows): which share of each window of patches lies in each cell along a side.

    Patches and cells divide the same side evenly. Padding is as of `crops.pool_windows`.
    """
    before = (windows * window - patches) // 2
    edges = (np.arange(windows + 1) * window - before).clip(0, patches) / patches
    low, high = edges[:-1], edges[1:]
    begins = np.arange(cells)[:, None] / cells
    overlap = np.minimum(high, begins + 1 / cells) - np.maximum(low, begins)
    return overlap.clip(min=0) / (high - low)
