"""How a model points by selecting visual tokens (MolmoPoint): its tokens, sizes and rule."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from nanomolmo2.config import Config


@dataclass(frozen=True)
class PointConfig(Config):
    """Tokens and rule of pointing; the defaults of the rule are those of the released models.

    patch_token_id, ...: in place of a row (visual token), slot (patch of it), cell (ninth of that).
    image_non_indexable_patch_id: of an overview's visual tokens, which cannot be selected.
    overview_embedding: they read a row of their own in the embedding, or share the image token's.
    row_divisor: scores of rows are divided by the root of the number of keys, or of their width.
    subpatch_embedding: the ViT patch replaces the token's embedding, or is added to it.
    location_input: cells read the state or its norm. loss_masks_empty_slots: they are no classes.
    mask_before_argmax: forbidden rows are masked; else a point is ruled out if one is likeliest.
    first_may_be_none: a list may be empty. several_lists: more lists may follow the first.
    points_in_prompt: questions hold points as tokens, and an answer's first token may be PATCH.

    Training always adds at ``subpatch_token_id`` and reads cells from the normed state.
    Source: allenai/MolmoPoint-8B, config.json and code; olmo/models/molmo_point, which differs.
    """

    patch_token_id: int
    subpatch_token_id: int
    location_token_id: int
    image_non_indexable_patch_id: int | None = None
    patch_embed_dim: int = 512
    token_prediction_rotary_theta: float = 50000.0
    overview_embedding: Literal["own", "shared"] = "own"
    row_divisor: Literal["keys", "width"] = "keys"
    subpatch_embedding: Literal["replace", "add"] = "replace"
    location_input: Literal["state", "norm"] = "state"
    mask_before_argmax: bool = False
    first_may_be_none: bool = True
    several_lists: bool = False
    loss_masks_empty_slots: bool = False
    points_in_prompt: bool = False

    def __post_init__(self) -> None:
        self.check_positive(but=tuple(f.name for f in fields(self) if f.name.endswith("_id")))
        if self.patch_embed_dim % 2 or len(set(self.marker_ids)) < 3:
            raise ValueError(
                f"patch_embed_dim ({self.patch_embed_dim}) must be even, and the three markers "
                f"{self.marker_ids} different"
            )

    def check(self, num_logits: int, connector_type: str) -> None:
        """Raises: ValueError where the model cannot write the markers, or has no windows."""
        if connector_type != "pooling" or not all(0 <= i < num_logits for i in self.marker_ids):
            raise ValueError(
                f"points need the pooling connector (it is {connector_type!r}), and markers "
                f"{self.marker_ids} below {num_logits}: is predict_additional_vocab missing?"
            )

    @classmethod
    def consistent(cls, **values: Any) -> Self:
        """One rule in training and use."""
        return cls(**{**CONSISTENT, **values})

    @property
    def marker_ids(self) -> tuple[int, int, int]:
        """PATCH, SUBPATCH, LOCATION."""
        return self.patch_token_id, self.subpatch_token_id, self.location_token_id

    @property
    def rule(self) -> Literal["released", "consistent", "own"]:
        """The name of the rule, ``own`` for any other mixture."""
        found = {name: getattr(self, name) for name in CONSISTENT}
        released = {f.name: f.default for f in fields(self) if f.name in CONSISTENT}
        return "consistent" if found == CONSISTENT else "released" if found == released else "own"


CONSISTENT: dict[str, Any] = {
    "row_divisor": "width",
    "subpatch_embedding": "add",
    "location_input": "norm",
    "mask_before_argmax": True,
    "first_may_be_none": False,
    "several_lists": True,
    "loss_masks_empty_slots": True,
    "points_in_prompt": True,
}
