"""From images and ids to what the engine takes: all that generation asks of the whole model.

B rows, T positions, n visual tokens of all images, D width, F of the vision encoder's features.
Where anything goes is decided on the host, from ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanomolmo2.batch import NO_MORE_POINTS, Batch
from nanomolmo2.generation.pointing import (
    Classes,
    PointPrompt,
    check_targets,
    content_of,
    num_slots,
    parts_of,
    read_classes,
)
from nanomolmo2.generation.prefix_cache import Keys, PrefixCache, digest, visual_keys
from nanomolmo2.generation.request import Request
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.connector import PoolingConnector
from nanomolmo2.models.forms import Images
from nanomolmo2.processor import Encoded


@torch.no_grad()
def request_of(model: NanoMolmo2, encoded: Encoded, cache: PrefixCache | None = None) -> Request:
    """The prompt of one example as the processor made it: it ends with a question, whose points may
    be its last words. See `requests_of`.
    """
    pixels, windows = encoded.pixel_values, encoded.image_token_pooling
    targets = encoded.point_targets
    (request,) = requests_of(
        model,
        torch.from_numpy(encoded.input_ids)[None],
        None if pixels is None else torch.from_numpy(pixels),
        image_token_pooling=None if windows is None else torch.from_numpy(windows),
        point_targets=None if targets is None else torch.from_numpy(targets),
        cache=cache,
    )
    if request.points is not None:
        request.points = replace(request.points, goes_on=False)
    return request


@torch.no_grad()
def requests_of(
    model: NanoMolmo2,
    input_ids: Tensor,
    pixel_values: Images = None,
    attention_mask: Tensor | None = None,
    *,
    visual_tokens: Tensor | None = None,
    image_token_pooling: Tensor | None = None,
    point_targets: Tensor | None = None,
    cache: PrefixCache | None = None,
) -> list[Request]:
    """The prompts of a batch, without its padding; how to continue them is left to the caller.

    Args:
        input_ids, pixel_values, attention_mask, visual_tokens, image_token_pooling, point_targets:
            as in :meth:`NanoMolmo2.forward`. In place of markers with ``point_targets`` the ids may
            hold the parts of points as answers have them, behind the vocabulary.
        cache: where to look for, and leave, visual tokens; gives the requests their keys.
    Raises: ValueError where ids, image tokens, points and images disagree.
    """
    ids, is_class = input_ids.cpu(), None
    if model.config.point_config is not None:
        is_class = ids >= model.config.llm_config.num_embeddings
        if point_targets is not None and bool(is_class.any()):
            raise ValueError(
                "found parts of points behind the vocabulary, and point_targets: pass one of them"
            )
        # Which class an id is shows only once images have taken their places.
        ids = ids.masked_fill(is_class, model.config.point_config.location_token_id)
    batch = model.batch_of(
        ids,
        pixel_values,
        attention_mask=None if attention_mask is None else attention_mask.cpu(),
        visual_tokens=visual_tokens,
        image_token_pooling=None if image_token_pooling is None else image_token_pooling.cpu(),
        **({} if point_targets is None else {"point_targets": point_targets.cpu()}),
    )
    seen = _see(model, batch, cache)
    is_visual = model.config.is_visual(batch.input_ids)
    number = is_visual.flatten().cumsum(dim=0).view_as(is_visual) - 1  # of a visual token
    bidirectional = model.mask_parts(batch)["image_tokens"]
    requests = []
    for b, ids_of_row in enumerate(batch.input_ids):
        real = slice(None) if batch.attention_mask is None else batch.attention_mask[b]
        own, at = ids_of_row[real], is_visual[b][real]
        taken = number[b][real][at]
        points = None
        if is_class is not None:
            classes = input_ids.cpu()[b][is_class[b]].numpy()
            own, points = _points(model, batch, b, own, taken, seen, classes)
        request = Request(
            input_ids=own,
            inputs_embeds=_embed(model, own, seen, taken, points),
            bidirectional=None if bidirectional is None else bidirectional[b][real].numpy(),
            points=points,
        )
        if seen.numbers is not None:
            request.prefix_keys = _prefix_keys(model, request, seen.numbers[taken.numpy()])
        requests.append(request)
    return requests


@dataclass(frozen=True)
class _Seen:
    """What was made of the images of a batch.

    Attributes:
        tokens: (n, D) visual tokens.
        features: (M, N, F) of the patches, where a model selects them to point.
        index: (n, W) patches of every visual token, over all M * N, on the host, likewise.
        numbers: (n,) of the visual tokens, for the prefix cache.
    """

    tokens: Tensor | None = None
    features: Tensor | None = None
    index: Tensor | None = None
    numbers: Keys | None = None


def _embed(
    model: NanoMolmo2, ids: Tensor, seen: _Seen, taken: Tensor, points: PointPrompt | None
) -> Tensor:
    """(T,) ids -> (T, D), with those of the visual tokens that are taken, and of points."""
    device = model.llm.embed_tokens.weight.device
    visual = seen.tokens
    if visual is not None and len(taken) < len(visual):
        visual = visual.index_select(0, taken.to(device, non_blocking=True))
    batch = Batch(ids[None].to(device, non_blocking=True), visual_tokens=visual)
    if points is not None and len(points.targets):
        targets = torch.from_numpy(points.targets).to(device, non_blocking=True)
        batch = replace(batch, point_targets=targets)
        if visual is not None:
            index = torch.from_numpy(points.index).to(device, non_blocking=True)
            batch = replace(batch, visual_features=points.features[None], image_token_pooling=index)
    return model.embed(batch)[0]


def embed_points(model: NanoMolmo2, ids: NDArray[np.int64], points: PointPrompt) -> Tensor:
    """(T,) ids with markers, of which a prompt's are the first -> (T, D)."""
    everything = torch.arange(len(points.tokens))
    return _embed(model, torch.from_numpy(ids), _Seen(points.tokens), everything, points)


def _points(
    model: NanoMolmo2,
    batch: Batch,
    b: int,
    ids: Tensor,
    taken: Tensor,
    seen: _Seen,
    classes: NDArray[np.int64],
) -> tuple[Tensor, PointPrompt]:
    """Row b's ids (T,) with the markers of points, and what can be pointed at in it.

    Args:
        ids: (T,), with the location's marker for every one of ``classes``.
        taken: (N,) numbers of its visual tokens in the batch.
        classes: the parts of points that were given as ids behind the vocabulary.
    """
    predictor = model.point_predictor
    assert predictor is not None
    rule, N, weight = predictor.config, len(taken), model.llm.embed_tokens.weight
    pooling_size = model.config.connector.pooling_size
    index = np.full((0, pooling_size**2), -1)
    tokens = weight.new_zeros(0, weight.shape[1])
    features = weight.new_zeros(0, model.config.connector.feature_dim)
    if N:
        assert seen.tokens is not None and seen.features is not None and seen.index is not None
        index = seen.index[taken].numpy()
        tokens = seen.tokens[int(taken[0]) :][:N]  # they follow each other
        features = seen.features.flatten(0, 1)
    S = num_slots(index, pooling_size)
    index = np.pad(index[:, :S], ((0, 0), (0, max(S - index.shape[1], 0))), constant_values=-1)
    known = Classes(model.config.llm_config.num_embeddings, N, S)
    if len(classes):
        given = ids.numpy().copy()
        at = np.flatnonzero(given == rule.location_token_id)
        if len(at) != len(classes):
            raise ValueError(
                f"row {b} holds points as ids behind the vocabulary and as markers "
                f"{rule.marker_ids}: write all of them in one way"
            )
        given[at] = classes
        given, targets = read_classes(given, known, rule)
        ids = torch.from_numpy(given)
    else:
        targets = _targets_of(batch, b, rule.patch_token_id)
        is_row = targets[:, 0] != NO_MORE_POINTS
        targets[is_row, 0] -= int(taken[0]) if N else 0
    is_visual = model.config.is_visual(ids)
    prompt = PointPrompt(
        predictor=predictor,
        classes=known,
        places=is_visual.nonzero()[:, 0].numpy(),
        selectable=(ids[is_visual] == model.config.image_token_id).numpy(),
        index=index,
        tokens=tokens,
        features=features,
        targets=targets,
    )
    return ids, check_targets(prompt)


def _targets_of(batch: Batch, b: int, patch: int) -> NDArray[np.int64]:
    """The lines of row b, a copy; rows are counted over the batch."""
    if batch.point_targets is None:
        return np.empty((0, 3), dtype=np.int64)
    counts = (batch.input_ids == patch).sum(dim=1).tolist()
    before = sum(counts[:b])
    return batch.point_targets[before : before + counts[b]].numpy().copy()


def _prefix_keys(model: NanoMolmo2, request: Request, numbers: Keys) -> Keys:
    """(T,) of a prompt's positions, by content. ``numbers``: (N,) of its visual tokens."""
    ids = np.asarray(request.input_ids, dtype=np.int64)
    keys, places = ids.copy(), model.config.is_visual(torch.from_numpy(ids)).numpy()
    # An overview's tokens read otherwise than the same patches' would as details.
    own = ids[places]
    keys[places] = numbers ^ np.where(own == model.config.image_token_id, 0, own)
    points = request.points
    if points is not None and len(points.targets):
        markers = np.flatnonzero(np.isin(ids, points.rule.marker_ids))
        for at, part in zip(markers, parts_of(points.targets), strict=True):
            keys[at] = content_of(part, keys[places], points.rule)
    return keys


def _see(model: NanoMolmo2, batch: Batch, cache: PrefixCache | None) -> _Seen:
    """Encode the images, as far as the cache does not know them."""
    device = model.llm.embed_tokens.weight.device
    pixels, windows = batch.pixel_values, batch.image_token_pooling
    selects = model.point_predictor is not None

    def encode(images: Tensor) -> tuple[Tensor, ...]:
        index = None if windows is None else windows.to(device, non_blocking=True)
        images = images.to(device, non_blocking=True)
        if not selects:
            return (model.encode_images(images, index),)
        features = model.vision_encoder.features(images, model.config.connector.vit_layers)
        return model.connector(features, index), features

    if pixels is None:
        return _given(model, batch, cache)
    if cache is None:
        tokens, *features = encode(pixels)
        return _seen(model, batch, tokens.flatten(0, -2), features)
    cache.check("vision", model.vision_encoder)
    cache.check("connector", model.connector)
    if model.point_predictor is not None:
        cache.check("points", model.point_predictor)
    digests = [digest(image) for image in pixels.cpu()]
    if windows is None:
        of_images = cache.visual_tokens(
            digests, lambda new: list(zip(*encode(pixels[torch.tensor(new)]), strict=True))
        )
        n = len(of_images[0][0])
        tokens, *features = (torch.stack(parts) for parts in zip(*of_images, strict=True))
        tokens = tokens.flatten(0, 1)
        images, offsets = np.divmod(np.arange(len(tokens)), n)
        numbers = visual_keys(digests, images[:, None], offsets[:, None])
    else:
        whole = digest(windows) + "".join(digests)
        ((tokens, *features),) = cache.visual_tokens([whole], lambda _: [encode(pixels)])
        patches, vision = windows.numpy(), model.config.vision_config
        per_crop = pixels.shape[1] if pixels.ndim == 3 else vision.num_patches  # (I, 3, H, W)
        crops, places = (np.where(patches < 0, -1, x) for x in np.divmod(patches, per_crop))
        numbers = visual_keys(digests, crops, places)
    return replace(_seen(model, batch, tokens, features), numbers=numbers)


def _given(model: NanoMolmo2, batch: Batch, cache: PrefixCache | None) -> _Seen:
    """Visual tokens in place of images, if any."""
    tokens = batch.visual_tokens
    if tokens is not None and model.point_predictor is not None:
        raise ValueError(
            "a model that selects visual tokens to point needs the features of their patches too: "
            "pass pixel_values, images of one size, in place of visual_tokens"
        )
    if cache is None:
        return _Seen(tokens)
    # Given as they are: each is an image of its own.
    digests = [] if tokens is None else [digest(token) for token in tokens.cpu()]
    images = np.arange(len(digests))[:, None]
    return _Seen(tokens, numbers=visual_keys(digests, images, np.zeros_like(images)))


def _seen(model: NanoMolmo2, batch: Batch, tokens: Tensor, features: list[Tensor]) -> _Seen:
    """Visual tokens (n, D) and, where a model selects them, their features [(M, N, F)]."""
    if not features:
        return _Seen(tokens)
    index = batch.image_token_pooling
    if index is None:
        connector = model.connector.layers
        assert isinstance(connector, PoolingConnector)
        index = connector.square_windows(torch.empty(*features[0].shape[:2], 0))
    return _Seen(tokens, features[0], index)
