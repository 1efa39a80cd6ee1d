"""Whether a processor belongs to a model: both were made apart and meet here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

if TYPE_CHECKING:
    from nanomolmo2.processor import Processor

PROCESSOR_NAME = "processor_config.json"
TOKENIZER_NAME = "tokenizer.json"


def check_agreement(config: NanoMolmo2Config, processor: Processor) -> None:
    """Check that a processor makes what a model reads.

    Raises: ValueError naming what differs.
    """
    vision, settings, connector = config.vision_config, processor.config, config.connector
    vocabulary, rows = processor.tokenizer.vocab_size, config.llm_config.num_embeddings
    pairs: list[tuple[str, object, object]]
    if (crops := settings.multicrop) is not None:
        pairs = [
            ("pixels a side of a crop", crops.image_size, vision.image_size),
            ("pixels a side of a patch", crops.patch_size, vision.patch_size),
            ("patches a side of a window", crops.pooling_size, connector.pooling_size),
        ]
        if connector.connector_type != "pooling":
            raise ValueError(
                f"the processor cuts pictures into crops and names the patches that are pooled, "
                f"but the model has the {connector.connector_type!r} connector, expected 'pooling'"
            )
    else:
        side, tokens = settings.image_size // vision.patch_size, settings.image_tokens
        count = config.num_visual_tokens
        pairs = [
            ("patches a side", side, vision.patches_per_side),
            ("image_tokens", tokens or count, count),
        ]
    pairs += [
        ("the id of its image token", processor.image_token_id, config.image_token_id),
        ("tokens", vocabulary, min(vocabulary, rows)),  # rows that no token uses are fine
        *_point_pairs(config, processor),
    ]
    for what, found, expected in pairs:
        if found != expected:
            raise ValueError(
                f"the processor does not belong to the model: {what}: {found}, the model expects "
                f"{expected}; use the {PROCESSOR_NAME} and {TOKENIZER_NAME} that were saved with "
                f"the weights"
            )


def _point_pairs(
    config: NanoMolmo2Config, processor: Processor
) -> list[tuple[str, object, object]]:
    """(what, as the processor has it, as the model has it) of everything about points."""
    tokens, point = processor.config.points, config.point_config
    written, expected_way = ("text" if x is None else "selections" for x in (tokens, point))
    pairs: list[tuple[str, object, object]] = [("points are", written, expected_way)]
    if tokens is None or point is None:
        return pairs
    id_of = processor.tokenizer.special_ids.get
    for name, marker, expected in zip(
        ("row", "slot", "cell"), tokens.markers, point.marker_ids, strict=True
    ):
        pairs.append((f"the id of the marker of a point's {name}", id_of(marker), expected))
    pairs += [
        (
            "the id of the first class of a point",
            tokens.num_embeddings or processor.tokenizer.vocab_size,
            config.llm_config.num_embeddings,
        ),
        ("points in questions are selections", tokens.points_in_prompt, point.points_in_prompt),
    ]
    if processor.config.multicrop is not None:
        overview = None if tokens.overview_token is None else id_of(tokens.overview_token)
        low = point.image_non_indexable_patch_id
        return [*pairs, ("the id of an overview's tokens", overview, low)]
    return [
        *pairs,
        ("pixels a side of a patch", tokens.patch_size, config.vision_config.patch_size),
        ("patches a side of a window", tokens.pooling_size, config.connector.pooling_size),
    ]
