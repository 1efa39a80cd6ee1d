"""A model that points by selecting what it sees, made from one that writes coordinates as text.

Everything is kept: vision encoder, connector, decoder, tokenizer. What is new starts at random: the
point modules, and the rows by which the head writes the three markers. So the first answers are no
use, and the model has to be trained.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import tokenizers
import torch
from torch import nn

from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.processor import PointTokens, Processor, Tokenizer
from nanomolmo2.processor.tokenizer import MOLMO2_TOKENS, MOLMO_POINT_TOKENS, POINT_MARKERS

INIT_STD = 0.02  # of rows and point modules that start at random
# Names of tokens that a vocabulary was filled up with.
_FILLER = re.compile(r"<\|(reserved|additional)_\d+\|>|\|?<EXTRA_TOKENS(_POINT)?_\d+>\|?")


def with_point_head(model: NanoMolmo2, processor: Processor) -> tuple[NanoMolmo2, Processor]:
    """The model with a point head, under the rule ``consistent``, and the processor that belongs to
    it. A model that has one stays as it is.

    The markers take the places that they have in MolmoPoint, behind Molmo2's tokens, which have to
    be free. Overviews, where pictures are cut into crops, are shown and cannot be selected.

    Args:
        model: of Molmo2's design, with a pooling connector; its weights are used, not copied.
    Raises: ValueError for another design, and a vocabulary that has no places for the markers.
    """
    if model.config.point_config is not None:
        return model, processor
    config = with_point_config(model.config, processor.config.multicrop is not None)
    return _rebuilt(model, config), point_processor(processor, model.config)


def with_point_config(config: NanoMolmo2Config, has_crops: bool = True) -> NanoMolmo2Config:
    """The same sizes with a point head, and a head that writes the tokens of its own too.

    Keys and queries are a quarter as wide as the decoder, at most 512.

    Args:
        has_crops: pictures have overviews.
    Raises: ValueError for another connector than ``pooling``.
    """
    if config.point_config is not None:
        return config
    if config.connector.connector_type != "pooling":
        raise ValueError(
            f"the connector is {config.connector.connector_type!r}, and only of windows of patches "
            f"(pooling, Molmo2's design) a point can select one: start from such a model"
        )
    llm = dataclasses.replace(config.llm_config, predict_additional_vocab=True)
    patch, subpatch, location, low = (
        llm.vocab_size + MOLMO_POINT_TOKENS.index(name) for name in (*POINT_MARKERS, "<im_low>")
    )
    points = PointConfig.consistent(
        patch_token_id=patch,
        subpatch_token_id=subpatch,
        location_token_id=location,
        image_non_indexable_patch_id=low if has_crops else None,
        patch_embed_dim=max(2, min(512, llm.hidden_size // 8 * 2)),
    )
    return dataclasses.replace(config, llm_config=llm, point_config=points)


def point_processor(processor: Processor, model: NanoMolmo2Config) -> Processor:
    """The processor that writes points as selections, for a model of these sizes; in questions too
    where the model's rule says so.

    Raises: ValueError as :func:`with_marker_tokens`, and for markers that are not the model's.
    """
    llm, has_crops = model.llm_config, processor.config.multicrop is not None
    rule = with_point_config(model, has_crops).point_config
    assert rule is not None
    if (given := processor.config.points) is not None:
        given = dataclasses.replace(given, points_in_prompt=rule.points_in_prompt)
        return processor.with_settings(points=given)
    points = PointTokens(
        overview_token="<im_low>" if has_crops else None,
        num_embeddings=llm.num_embeddings,
        points_in_prompt=rule.points_in_prompt,
        patch_size=model.vision_config.patch_size,
        pooling_size=model.connector.pooling_size,
    )
    tokenizer = with_marker_tokens(processor.tokenizer, llm.vocab_size, llm.additional_vocab_size)
    ids = tuple(map(tokenizer.special_id, points.markers))
    if ids != rule.marker_ids:
        raise ValueError(
            f"the model's point_config has the markers {rule.marker_ids}, and the tokenizer has "
            f"them at {ids}: use the tokenizer that belongs to the model"
        )
    return Processor(dataclasses.replace(processor.config, points=points), tokenizer)


def _rebuilt(model: NanoMolmo2, config: NanoMolmo2Config) -> NanoMolmo2:
    """A model of other sizes with all weights of one that lacks its point head."""
    state = dict(model.state_dict())
    with torch.device("meta"):
        made = NanoMolmo2(config)
    assert made.point_predictor is not None
    fresh = type(made.point_predictor)(config)
    state |= {f"point_predictor.{name}": x for name, x in fresh.state_dict().items()}
    name, table = "llm.lm_head.weight", state["llm.embed_tokens.weight"]
    image, low = config.visual_token_ids
    with torch.no_grad():
        table[low] = table[image]  # overviews read another row now, which starts as theirs
    if (head := state.get(name)) is not None:
        rows = table.new_empty(config.llm_config.num_logits, table.shape[1])
        rows[: len(head)] = head
        state[name] = rows
    made.load_state_dict(state, assign=True)
    init_head_rows(made)
    return made.train(model.training)


@torch.no_grad()
def init_head_rows(model: NanoMolmo2) -> None:
    """Let the rows by which a head of its own writes more than the base vocabulary start as those
    of the table do.
    """
    head, base = model.llm.lm_head, model.config.llm_config.vocab_size
    if head is not None and len(head.weight) > base:
        nn.init.normal_(head.weight[base:], std=INIT_STD)


def with_marker_tokens(tokenizer: Tokenizer, vocab_size: int, additional: int) -> Tokenizer:
    """A tokenizer with MolmoPoint's tokens at their places behind ``vocab_size``.

    Args:
        vocab_size: V of the base vocabulary; additional: ids behind it that have an embedding.
    Raises: ValueError where there is no place for them, or something else stands there.
    """
    wanted = {vocab_size + k: name for k, name in enumerate(MOLMO_POINT_TOKENS)}
    if all(tokenizer.special_ids.get(name) == id for id, name in wanted.items()):
        return tokenizer
    values: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    there = {token["id"]: token for token in values["added_tokens"]}
    for id, name in wanted.items():
        found = there.get(id, {}).get("content", "nothing")
        is_free = found == "nothing" and id >= tokenizer.vocab_size
        is_marker = id >= vocab_size + len(MOLMO2_TOKENS)
        fits = found == name or (is_marker and (is_free or _FILLER.fullmatch(found)))
        if not fits or id >= vocab_size + additional:
            has = f"{additional} ids behind {vocab_size}, and {found!r:.60} at {id}"
            raise ValueError(
                f"the vocabulary has no place for {name}, which belongs to id {id}: it has {has}; "
                f"start from a model with Molmo2's tokens and room for markers behind them"
            )
        like = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        there[id] = {**like, **there.get(id, {}), "id": id, "content": name, "special": True}
    values["added_tokens"] = [there[id] for id in sorted(there)]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)))
