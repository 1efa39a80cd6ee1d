"""From images and ids to what the engine takes: all that generation asks of the whole model.

B rows, T positions, n visual tokens of all images, D width. Where anything goes is decided on the
host, from ids.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.batch import Batch
from nanomolmo2.generation.prefix_cache import Keys, PrefixCache, digest, visual_keys
from nanomolmo2.generation.request import Request
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.forms import Images
from nanomolmo2.processor import Encoded


@torch.no_grad()
def request_of(model: NanoMolmo2, encoded: Encoded, cache: PrefixCache | None = None) -> Request:
    """The prompt of one example as the processor made it. See `requests_of`."""
    pixels, windows = encoded.pixel_values, encoded.image_token_pooling
    (request,) = requests_of(
        model,
        torch.from_numpy(encoded.input_ids)[None],
        None if pixels is None else torch.from_numpy(pixels),
        image_token_pooling=None if windows is None else torch.from_numpy(windows),
        cache=cache,
    )
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
    cache: PrefixCache | None = None,
) -> list[Request]:
    """The prompts of a batch, without its padding; how to continue them is left to the caller.

    Args:
        input_ids, pixel_values, attention_mask, visual_tokens, image_token_pooling: as in
            :meth:`NanoMolmo2.forward`.
        cache: where to look for, and leave, visual tokens; gives the requests their keys.
    Raises: ValueError where ids, image tokens and images disagree.
    """
    batch = model.batch_of(
        input_ids.cpu(),
        pixel_values,
        attention_mask=None if attention_mask is None else attention_mask.cpu(),
        visual_tokens=visual_tokens,
        image_token_pooling=None if image_token_pooling is None else image_token_pooling.cpu(),
    )
    visual, visual_numbers = _visual_tokens(model, batch, cache)
    is_image = batch.input_ids == model.config.image_token_id
    number = is_image.flatten().cumsum(dim=0).view_as(is_image) - 1  # of a visual token
    bidirectional = model.mask_parts(batch)["image_tokens"]
    requests = []
    for b, ids in enumerate(batch.input_ids):
        real = slice(None) if batch.attention_mask is None else batch.attention_mask[b]
        own, at = ids[real], is_image[b][real]
        taken = number[b][real][at]
        keys = None
        if visual_numbers is not None:
            keys = own.numpy().astype(np.int64)
            keys[at.numpy()] = visual_numbers[taken.numpy()]
        requests.append(
            Request(
                input_ids=own,
                inputs_embeds=_embed(model, own, visual, taken),
                bidirectional=None if bidirectional is None else bidirectional[b][real].numpy(),
                prefix_keys=keys,
            )
        )
    return requests


def _embed(model: NanoMolmo2, ids: Tensor, visual: Tensor | None, taken: Tensor) -> Tensor:
    """(T,) ids -> (T, D), with those of the visual tokens (n, D) that are taken."""
    device = model.llm.embed_tokens.weight.device
    if visual is not None and len(taken) < len(visual):
        visual = visual.index_select(0, taken.to(device, non_blocking=True))
    batch = Batch(ids[None].to(device, non_blocking=True), visual_tokens=visual)
    return model.embed(batch)[0]


def _visual_tokens(
    model: NanoMolmo2, batch: Batch, cache: PrefixCache | None
) -> tuple[Tensor | None, Keys | None]:
    """Visual tokens (n, D) of all images, and with a cache their numbers (n,)."""
    device = model.llm.embed_tokens.weight.device
    pixels, windows = batch.pixel_values, batch.image_token_pooling

    def encode(images: Tensor) -> Tensor:
        index = None if windows is None else windows.to(device, non_blocking=True)
        return model.encode_images(images.to(device, non_blocking=True), index)

    if pixels is None or cache is None:
        tokens = batch.visual_tokens
        if pixels is not None:
            tokens = encode(pixels).flatten(0, -2)
        if cache is None:
            return tokens, None
        # Given as they are: each is an image of its own.
        digests = [] if tokens is None else [digest(token) for token in tokens.cpu()]
        images = np.arange(len(digests))[:, None]
        return tokens, visual_keys(digests, images, np.zeros_like(images))
    cache.check("vision", model.vision_encoder)
    cache.check("connector", model.connector)
    digests = [digest(image) for image in pixels.cpu()]
    if windows is None:
        tokens = torch.cat(
            cache.visual_tokens(digests, lambda new: encode(pixels[torch.tensor(new)]))
        )
        n = len(tokens) // len(digests)
        images, offsets = np.divmod(np.arange(len(tokens)), n)
        return tokens, visual_keys(digests, images[:, None], offsets[:, None])
    whole = digest(windows) + "".join(digests)
    (tokens,) = cache.visual_tokens([whole], lambda _: [encode(pixels)])
    patches, per_crop = windows.numpy(), pixels.shape[1]
    crops, places = (np.where(patches < 0, -1, x) for x in np.divmod(patches, per_crop))
    return tokens, visual_keys(digests, crops, places)
