"""Finding by example: pictures and places in them, or a prompt, then `models.finder`, then places.

    see(picture), look_for(seen, like, unlike)    without words: what `VLM.find` does
    finding_request(prompt)                       with words: the lists that `VLM.ask` writes

Every patch of a picture says how likely it holds the middle of such a thing, where that is and how
large the thing. Several patches may speak of one thing; the surest is kept. Without words the
decoder is not asked: its states are nothing, and how far an example is meant is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nanomolmo2.batch import Batch
from nanomolmo2.generation.pointing import PointPrompt, Selected, given_points
from nanomolmo2.generation.prefix_cache import PrefixCache, digest
from nanomolmo2.generation.prompt import embed_points, request_of
from nanomolmo2.generation.request import Request
from nanomolmo2.generation.words import WordLook
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.finder import APART, CANDIDATES, Finder, Patches, Wanted
from nanomolmo2.processor import Encoded, Point
from nanomolmo2.processor.crops import MultiCrop, resize
from nanomolmo2.processor.point_space import PointSpace, Target, View

LEAST_CONFIDENCE = 0.05  # candidates below are not told
SUREST = 0.999
MEANT = math.tanh(2.0)  # how far an example is meant, where that is told; its negative: not
LIKELY = 0.5  # from here on it is listed
LEAST_CROPS, MOST_CROPS = 4, 16
LOOKS = 3  # at a picture, in sizes of their own
UNDERRATED = 0.3  # logit by which the mean of several looks is too low
NEAREST = 0.55  # of their size: two middles nearer to each other are of one thing
NEAREST_PATCHES = 0.75  # and by so many patches at least
_BAND = 1 << 22  # pixels of an image that are read at once


class Found(NamedTuple):
    """A thing that may be like the examples.

    x, y: pixels of the picture, its middle. size: its longer side, pixels, a guess. confidence: 0
    to 1; from .5 on it is more likely meant than not.
    """

    x: float
    y: float
    size: float
    confidence: float


def finding_request(
    model: NanoMolmo2, encoded: Encoded, cache: PrefixCache | None = None
) -> Request:
    """`prompt.request_of`, whose lists of points are found all at once where the model can.

    That is done for one picture; what is in which of several, or in a video, the decoder says point
    by point.
    """
    request = request_of(model, encoded, cache)
    space, points = encoded.point_space, request.points
    if model.finder is None or space is None or points is None or len(space.image_sizes) != 1:
        return request

    def find(answer: Sequence[int], targets: Sequence[Target]) -> list[Selected]:
        """See `PointPrompt.find`: one more pass over the prompt and the answer so far."""
        known = len(points.targets)
        whole = replace(points, targets=np.concatenate([points.targets, _array(targets)]))
        ids = np.concatenate([np.asarray(request.input_ids), np.array(answer, dtype=np.int64)])
        embeds = embed_points(model, ids, whole)
        chosen: dict[tuple[int, int], Selected] = {}
        for thing in _found(model, ids, embeds, whole, space, known):
            if thing.confidence >= LIKELY:
                target = space.target(Point(thing.x, thing.y))
                chosen.setdefault(target[:2], Selected(target, thing.confidence))
        return sorted(chosen.values())

    return replace(request, points=replace(points, find=find))


def _array(targets: Sequence[Target]) -> NDArray[np.int64]:
    return np.array(targets, dtype=np.int64).reshape(-1, 3)


def finder_of(model: NanoMolmo2) -> Finder:
    """Raises: ValueError for a model that has not learned to find."""
    if model.finder is None:
        raise ValueError(
            "this model cannot find by example (its config has no finder_dim): use one that "
            "has learned it, such as `nanomolmo2 train find` makes"
        )
    return model.finder


class Seen(NamedTuple):
    """A picture as the finder sees it, without words: n patches of m visual tokens."""

    features: Tensor  # (n, F), line by line
    tokens: Tensor  # (m, D)
    rows: Tensor  # (n,) the visual token of each patch
    view: View  # the grid of the patches
    size: tuple[int, int]  # (width, height) of the picture, pixels


@torch.no_grad()
def see(
    model: NanoMolmo2,
    crops: MultiCrop,
    picture: Image.Image | NDArray[np.uint8],
    cache: PrefixCache | None = None,
    seeing: AbstractContextManager[Any] | None = None,
    tiling: tuple[int, int] | None = None,
) -> Seen:
    """Encode a picture, or take it from the cache.

    Args:
        crops: how it is cut; there is no overview, in which nothing can be found.
        picture: RGB, as `load_image` gives it or (H, W, 3).
        seeing: held while the encoder sees it, and not where the cache knows it.
        tiling: rows and columns of tiles that it is enlarged or reduced to; None: as ``crops`` cut.
    """
    size = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
    width, height = size
    if tiling is not None:
        height, width = (n * crops.window_size + crops.margin_size for n in tiling)
        crops = replace(crops, max_crops=tiling[0] * tiling[1])
    view = View(0, *crops.patch_grid(width, height), crops.pooling_size)
    row, slot = (part.ravel() for part in view.row_and_slot(*np.indices((view.rows, view.cols))))
    device = model.llm.embed_tokens.weight.device

    def encode(pixels: NDArray[np.float32], windows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        layers = model.config.connector.vit_layers
        tiles = torch.from_numpy(pixels).split(MOST_CROPS)  # more at a time would fill the memory
        seen = [model.vision_encoder.features(some.to(device), layers) for some in tiles]
        features = torch.cat(seen)
        tokens = model.connector(features, torch.from_numpy(windows).to(device)).flatten(0, -2)
        return features.flatten(0, 1)[torch.from_numpy(windows[row, slot]).to(device)], tokens

    def encode_in_turn(_: list[int]) -> list[tuple[Tensor, ...]]:
        canvas = picture if tiling is None else resize(picture, (height, width))[0]
        pixels, windows, _grid = crops.tiles(canvas)
        with seeing or nullcontext():
            if cache is None:
                return [encode(pixels, windows)]
            # Another thread may have seen it meanwhile.
            return cache.visual_tokens([name], lambda _: [encode(pixels, windows)])

    if cache is None:
        ((features, tokens),) = encode_in_turn([0])
    else:
        cache.check("vision", model.vision_encoder)
        cache.check("connector", model.connector)
        # More crops than a picture needs change nothing.
        cut = f"{crops.tiling(width, height)} {replace(crops, max_crops=1)}"
        name = f"to find in {_digest(picture)} {cut}"
        ((features, tokens),) = cache.visual_tokens([name], encode_in_turn)
    return Seen(features, tokens, torch.from_numpy(row).to(device), view, size)


def looks_at(crops: MultiCrop, size: tuple[int, int], larger: int = 0) -> list[tuple[int, int]]:
    """Rows and columns of tiles of `LOOKS` looks at a picture: about as large as ``crops`` cut it,
    and with a tile less and a tile more along its longer side.

    Args: size: (width, height), pixels. larger: so many tiles more than that, in all of them.
    """
    rows, cols = crops.tiling(*size)
    longer = max(rows, cols)
    first = max(longer - LOOKS // 2, 1) + larger
    factors = [(first + i) / longer for i in range(LOOKS)]
    return [(max(1, round(rows * by)), max(1, round(cols * by))) for by in factors]


def _digest(picture: Image.Image | NDArray[np.uint8]) -> str:
    """Of the pixels. Those of an image are copied in bands: as a whole it may be large."""
    if not isinstance(picture, Image.Image):
        return digest(picture)
    width, height = picture.size
    tops = range(0, height, max(1, _BAND // width))
    bands = (picture.crop((0, y, width, min(y + tops.step, height))) for y in tops)
    return digest(*map(np.asarray, bands))


@torch.no_grad()
def look_for(
    model: NanoMolmo2,
    pictures: Sequence[Seen],
    like: Sequence[Point],
    unlike: Sequence[Point] = (),
    candidates: int = CANDIDATES,
) -> list[list[Found]]:
    """Of every picture what is like the examples, the likeliest first; no word is needed.

    Args:
        like, unlike: places in pixels of the pictures, which are counted from 1.
        candidates: patches of all pictures, the likeliest by themselves, that are judged beside
            each other; what is said of others is what each is by itself.
    Raises: ValueError for a model that has not learned to find.
    """
    finder, patches = finder_of(model), patches_of(model, pictures)
    starts = np.cumsum([0, *(len(seen.features) for seen in pictures)]).tolist()
    at = []
    for place in (*like, *unlike):
        seen = pictures[place.image - 1]
        number = patch_at(place.x, place.y, (seen.view.rows, seen.view.cols), seen.size)
        at.append(starts[place.image - 1] + number)
    examples = torch.tensor(at, device=patches.claim.device)
    gates = patches.claim.new_tensor([MEANT] * len(like) + [-MEANT] * len(unlike))
    nothing = patches.claim.new_zeros(1, pictures[0].tokens.shape[1])
    wanted = finder.wanted(patches, nothing, None, examples, torch.zeros_like(examples), gates)
    return _things_in(finder, wanted, patches, pictures, candidates)


@torch.no_grad()
def look_for_words(
    model: NanoMolmo2, picture: Seen, looks: Sequence[WordLook]
) -> list[list[Found]]:
    """For every word that was learned from annotated pictures what it stands for in a picture, the
    likeliest first.

    Raises: ValueError for a model that has not learned to find, and looks of another one.
    """
    finder, patches = finder_of(model), patches_of(model, [picture])
    size, found = patches.look.shape[1], {len(look.patch) for look in looks}
    if found - {size}:
        raise ValueError(
            f"a word was learned as {min(found - {size})} numbers, and this model knows looks of "
            f"{size}: its words.json is that of another model"
        )
    device, dtype = patches.look.device, patches.look.dtype
    look, token_look, sizes = (
        torch.tensor(part, device=device, dtype=dtype) for part in zip(*looks, strict=True)
    )
    wanted = wanted_words(finder, patches, look, token_look, sizes)
    return [
        _things_in(finder, Wanted(*(part[i : i + 1] for part in wanted)), patches, [picture])[0]
        for i in range(len(looks))
    ]


def wanted_words(
    finder: Finder, patches: Patches, look: Tensor, token_look: Tensor, size: Tensor
) -> Wanted:
    """What words ask for that are known by a look: W of them.

    Args: look, token_look: (W, E) of any length. size: (W,) of a thing, its logarithm, in patches.
    """
    nothing = look.new_zeros(len(look), finder.context_q.in_features)
    return Wanted(
        F.normalize(look, dim=-1),
        F.normalize(token_look, dim=-1),
        finder.context_q(nothing),
        size,
        look.new_zeros(len(look), len(patches.claim)),
        nothing,
    )


def patches_of(model: NanoMolmo2, pictures: Sequence[Seen]) -> Patches:
    """What the finder knows of the patches of some pictures, one picture after the other."""
    tokens = torch.cat([seen.tokens for seen in pictures])
    firsts = np.cumsum([0, *(len(seen.tokens) for seen in pictures)]).tolist()
    rows = torch.cat([seen.rows + first for seen, first in zip(pictures, firsts, strict=False)])
    features = torch.cat([seen.features for seen in pictures])
    grids = [grid_places(seen.view.rows, seen.view.cols, i) for i, seen in enumerate(pictures)]
    grid = torch.from_numpy(np.concatenate(grids)).to(tokens.device)
    return finder_of(model).patches(features, tokens, torch.zeros_like(tokens), rows, grid)


def _things_in(
    finder: Finder,
    wanted: Wanted,
    patches: Patches,
    pictures: Sequence[Seen],
    candidates: int = CANDIDATES,
) -> list[list[Found]]:
    """What one question asks for, in each picture."""
    mine = torch.ones(1, len(patches.claim), dtype=torch.bool, device=patches.claim.device)
    scores = finder(wanted, patches, mine, candidates).final[0].float().sigmoid().cpu().numpy()
    ways = patches.way.float().cpu().numpy()
    starts = np.cumsum([0, *(len(seen.features) for seen in pictures)]).tolist()
    return [
        things_of(scores[a:b], ways[a:b], (seen.view.rows, seen.view.cols), seen.size)
        for seen, a, b in zip(pictures, starts, starts[1:], strict=False)
    ]


def patch_at(x: float, y: float, grid: tuple[int, int], size: tuple[int, int]) -> int:
    """The number, line by line, of the patch that a place lies in.

    Args: grid: rows and columns of patches. size: (width, height), as x and y in pixels.
    """
    (rows, cols), (width, height) = grid, size
    return min(int(y * rows / height), rows - 1) * cols + min(int(x * cols / width), cols - 1)


def grid_places(rows: int, cols: int, number: int = 0) -> NDArray[np.float32]:
    """(n, 2) column and row of a picture's patches, line by line.

    Args: number: of the picture among those that a question is about.
    """
    r, c = np.indices((rows, cols)).reshape(2, -1)
    return np.stack([c + number * APART, r], axis=1).astype(np.float32)


@torch.no_grad()
def _found(
    model: NanoMolmo2,
    ids: NDArray[np.int64],
    embeds: Tensor,
    points: PointPrompt,
    space: PointSpace,
    given: int,
) -> list[Found]:
    """What is asked for at the last position, in the one picture of a prompt.

    Args:
        ids: (T,) with markers. embeds: (T, D). given: so many targets are the question's.
    """
    device = embeds.device

    def on_device(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    finder, batch = finder_of(model), Batch(on_device(ids)[None])
    T = torch.arange(len(ids), device=device)[None]
    states = model.llm.states(embeds[None], T, model.attention_mask(batch), None)[0]
    rows, patches = (part.ravel() for part in grid_of(space, 0))
    of_tokens = points.tokens, states[on_device(points.places)]
    view = space.views[0]
    grid = torch.from_numpy(grid_places(view.rows, view.cols)).to(device)
    features = points.features[on_device(patches)]
    seen = finder.patches(features, *of_tokens, on_device(rows), grid)
    is_question = given_points(ids, points)[:given]
    like_rows, slots, _ = points.targets[:given][is_question].T
    like = points.index[like_rows, slots]
    examples = on_device(np.flatnonzero(like[:, None] == patches) % len(patches))
    at = np.flatnonzero(ids == points.rule.patch_token_id)[:given][is_question] + 2
    question = torch.zeros(len(at), dtype=torch.long, device=device)
    wanted = finder.wanted(seen, states[-1:], states[on_device(at)], examples, question)
    mine = torch.ones(1, len(patches), dtype=torch.bool, device=device)
    scores = finder(wanted, seen, mine).final[0].float().sigmoid().cpu().numpy()
    ways = seen.way.float().cpu().numpy()
    return things_of(scores, ways, (view.rows, view.cols), space.image_sizes[0])


def grid_of(space: PointSpace, view: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, columns) of a picture's patches: the visual token of each, and its own number."""
    grid = space.views[view]
    row, slot = grid.row_and_slot(*np.indices((grid.rows, grid.cols)))
    return row, space.token_pooling[row, slot]


def things_of(
    scores: NDArray[np.float32],
    ways: NDArray[np.float32],
    grid: tuple[int, ...],
    size: tuple[int, int],
) -> list[Found]:
    """The candidates of one picture, without doubles.

    Args: scores: (n,) probabilities, line by line. ways: (n, 3). size: of the picture, pixels.
    """
    (lines, across), (width, height) = grid, size
    some = np.flatnonzero(scores >= LEAST_CONFIDENCE / 2)
    some = some[np.argsort(-scores[some], kind="stable")]
    y, x = np.divmod(some, across)
    step = np.clip(ways[some, :2], -1, 1)  # a middle lies in its patch, or just beside
    middles = np.stack([x + 0.5 + step[:, 0], y + 0.5 + step[:, 1]], axis=1)
    sides = np.exp(np.clip(ways[some, 2], -2, math.log(max(grid))))  # in patches
    kept: list[int] = []
    sure: list[float] = []
    for i in range(len(some)):
        near = np.maximum(NEAREST_PATCHES, NEAREST * np.minimum(sides[i], sides[kept]))
        closeness = near - np.hypot(*(middles[kept] - middles[i]).T)
        chance = float(scores[some[i]])
        if (closeness > 0).any():
            # Patches that speak of one thing share its chance: one of them holds its middle.
            best = int(closeness.argmax())
            sure[best] = min(sure[best] + chance, SUREST)
        else:
            kept.append(i)
            sure.append(chance)
    pixels = width / across, height / lines
    return [
        Found(
            float(np.clip(middles[i, 0] * pixels[0], 0, width)),
            float(np.clip(middles[i, 1] * pixels[1], 0, height)),
            float(sides[i] * max(pixels)),
            chance,
        )
        for i, chance in sorted(zip(kept, sure, strict=True), key=lambda one: -one[1])
    ]


def vote(looks: Sequence[Sequence[Found]], least: float) -> list[Found]:
    """What several looks at one picture found together, the likeliest first.

    A thing's confidence is the mean of what the looks say, of those that missed it 0; it lies where
    the surest saw it. What is large in tiles is seen best in a smaller picture, what is small in a
    larger one, and the mistakes of one are not those of the others.

    Args: least: pixels; things nearer to each other are one, and those of half their size.
    """
    things: list[list[Found]] = []
    for found in looks:
        free = list(range(len(things)))  # a look names each thing once
        for one in sorted(found, key=_sure, reverse=True):
            surest = np.array([max(things[i], key=_sure)[:3] for i in free]).reshape(-1, 3)
            away = np.hypot(surest[:, 0] - one.x, surest[:, 1] - one.y)
            reach = np.maximum(least, NEAREST * np.minimum(surest[:, 2], one.size))
            if (away <= reach).any():
                chosen = free.pop(int(np.where(away <= reach, away, np.inf).argmin()))
                things[chosen].append(one)
            else:
                things.append([one])
    means = [
        max(seen, key=_sure)._replace(
            confidence=math.fsum(one.confidence for one in seen) / len(looks)
        )
        for seen in things
    ]
    likely = [one for one in means if one.confidence >= LEAST_CONFIDENCE / 2]
    return sorted(likely, key=_sure, reverse=True)


def calibrated(one: Found, underrated: float) -> Found:
    """With the mean confidence of several looks as a probability: looks that miss a thing pull it
    down too far.

    Args: underrated: logit that is added.
    """
    odds = math.exp(underrated) * one.confidence
    return one._replace(confidence=odds / (odds + 1 - one.confidence))


def _sure(one: Found) -> float:
    return one.confidence


def crops_for(sizes: Sequence[tuple[int, int]], crop: int) -> int:
    """How many tiles show the largest of some pictures in its own size, or larger.

    Args: sizes: (width, height), pixels. crop: side of a tile without its margins.
    Returns: `LEAST_CROPS` to `MOST_CROPS`.
    """
    most = max(math.ceil(width / crop) * math.ceil(height / crop) for width, height in sizes)
    return min(max(most, LEAST_CROPS), MOST_CROPS)
