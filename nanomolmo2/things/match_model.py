"""What learns to match: encoder and connector of `tiny`, and heads that only training needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate import bf16_matmul, fuse_projections, lean_norms, onednn
from nanomolmo2.convert.pretrained import load
from nanomolmo2.emoji.heads import VisionHeads
from nanomolmo2.emoji.sprites import CATEGORIES
from nanomolmo2.emoji.vocabulary import build_tokenizer, noun_ids
from nanomolmo2.models import preset
from nanomolmo2.models.connector import MultimodalConnector
from nanomolmo2.models.vision_encoder import VisionEncoder
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.things.match_heads import MatchConfig, MatchHead

CONFIG = preset("tiny")
CROPS = MultiCrop(
    max_crops=4,
    image_size=CONFIG.vision_config.image_size,
    patch_size=CONFIG.vision_config.patch_size,
    overlap_margins=(1, 1),
    pooling_size=CONFIG.connector.pooling_size,
)


class MatchModel(nn.Module):
    """Patches and visual tokens, and what is read off them.

    Attributes:
        nouns: (C, D), the decoder's rows for the categories of emoji, which stay as they are.
        emoji: what `tiny` was taught about scenes of emoji.
        patches, tokens: the same two questions about things, see `match_heads`.
    """

    nouns: Tensor

    def __init__(self, seed: int, config: MatchConfig | None = None) -> None:
        super().__init__()
        config = config or MatchConfig()
        vision, connector, llm = CONFIG.vision_config, CONFIG.connector, CONFIG.llm_config
        torch.manual_seed(seed)
        self.vision_encoder = VisionEncoder(vision, post_layernorm=False)
        self.connector = MultimodalConnector(connector)
        self.emoji = VisionHeads(vision.hidden_size, llm.hidden_size)
        self.match_patches = MatchHead(vision.hidden_size, config)
        self.match_tokens = MatchHead(llm.hidden_size, config)
        self.register_buffer("nouns", torch.zeros(len(CATEGORIES), llm.hidden_size))

    def start_from_tiny(self) -> None:
        """Take the weights of the bundled `tiny`."""
        tiny, _ = load("tiny", dtype=torch.float32, device="cpu")
        self.vision_encoder.load_state_dict(tiny.vision_encoder.state_dict())
        self.connector.load_state_dict(tiny.connector.state_dict())
        self.nouns.copy_(tiny.llm.embed_tokens.weight.detach()[noun_ids(build_tokenizer())])

    def accelerate(self) -> None:
        """The layers as `training` has them; products in bfloat16 where the CPU can."""
        for apply in (onednn, fuse_projections, lean_norms, bf16_matmul):
            apply(self)

    def features(self, pixel_values: Tensor) -> Tensor:
        """(M, N, 3*P*P) -> (M, N, Dv)."""
        features: Tensor = self.vision_encoder(pixel_values, layers=(-1,))[0]
        return features
