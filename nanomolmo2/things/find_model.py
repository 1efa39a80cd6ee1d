"""The model that finds by example, as it starts: all that `tiny` knows.

Its vocabulary has more words, so rows of the embedding are taken over piece by piece. Keys and
queries of points later start as the looks in which things of one kind are near to each other: a
point begins as a search for what looks the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate import bf16_matmul, fuse_projections, lean_norms, onednn
from nanomolmo2.convert.pretrained import load
from nanomolmo2.emoji.model import MAX_FRAMES, SCENES
from nanomolmo2.emoji.scenes import SceneConfig
from nanomolmo2.emoji.vocabulary import build_tokenizer
from nanomolmo2.generation.find import FIND_MARGINS
from nanomolmo2.models import NanoMolmo2, preset
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.processor import Processor, ProcessorConfig, VideoConfig
from nanomolmo2.processor.tokenizer import Tokenizer
from nanomolmo2.things.vocabulary import build_find_tokenizer
from nanomolmo2.training.point_head import point_processor

CONFIG = preset("tiny-find")
CROPS = MultiCrop(
    max_crops=4,
    image_size=CONFIG.vision_config.image_size,
    patch_size=CONFIG.vision_config.patch_size,
    overlap_margins=FIND_MARGINS,
    pooling_size=CONFIG.connector.pooling_size,
)
EMBEDDING_STD = 0.1  # of new rows, as of `tiny`'s at its start


def find_processor() -> Processor:
    """An overview and up to four tiles, points as selections, also in questions."""
    config = ProcessorConfig.molmo2(
        multicrop=CROPS,
        video=VideoConfig(max_frames=MAX_FRAMES, pooling_size=CROPS.pooling_size),
        trained_on=("emoji", "things"),
    )
    return point_processor(Processor(config, Tokenizer(build_find_tokenizer())), CONFIG)


class FindModel(nn.Module):
    """The model and what its stages need beside it.

    Attributes:
        scenes: how scenes of emoji look.
        start: a `tiny` whose knowledge it starts with: the bundled one, or a folder.
    """

    def __init__(self, seed: int, scenes: SceneConfig = SCENES, start: str | Path = "tiny") -> None:
        super().__init__()
        self.scenes, self.start = scenes, start
        self.processor = find_processor()
        torch.manual_seed(seed)
        self.model = NanoMolmo2(CONFIG)
        with torch.no_grad():
            nn.init.normal_(self.model.llm.embed_tokens.weight, std=EMBEDDING_STD)
        self.clear_placeholders()

    @torch.no_grad()
    def start_from_tiny(self) -> None:
        """Take what that `tiny` has.

        Raises: ValueError for a model of other sizes.
        """
        tiny, _ = self._load_tiny()
        self._take_words(tiny)
        for name, value in tiny.llm.state_dict().items():
            if not name.startswith("embed_tokens."):
                self.model.llm.state_dict()[name].copy_(value)
        self.model.vision_encoder.load_state_dict(tiny.vision_encoder.state_dict())
        self.model.connector.load_state_dict(tiny.connector.state_dict())
        if tiny.finder is not None and self.model.finder is not None:
            self.model.finder.load_state_dict(tiny.finder.state_dict())
        self.clear_placeholders()

    @torch.no_grad()
    def put_into_tiny(self) -> tuple[NanoMolmo2, Processor]:
        """That `tiny` with this encoder, connector and finder: it finds, and its decoder, which is
        as it was, reads visual tokens that are nearly as they were.
        """
        tiny, processor = self._load_tiny()
        made = NanoMolmo2(replace(tiny.config, finder_dim=CONFIG.finder_dim))
        made.llm.load_state_dict(tiny.llm.state_dict())
        made.vision_encoder.load_state_dict(self.model.vision_encoder.state_dict())
        made.connector.load_state_dict(self.model.connector.state_dict())
        assert made.finder is not None and self.model.finder is not None
        made.finder.load_state_dict(self.model.finder.state_dict())
        return made, processor

    def tokens_at_start(self) -> Callable[[Tensor], Tensor]:
        """What that `tiny` makes of pictures: patches (B, N, 3*P*P) -> tokens (B, n, D)."""
        tiny, _ = self._load_tiny()
        return torch.no_grad()(tiny.encode_images)

    def _load_tiny(self) -> tuple[NanoMolmo2, Processor]:
        tiny, processor = load(self.start, dtype=torch.float32, device="cpu")
        mine, theirs = CONFIG.vision_config, tiny.config.vision_config
        if (mine, CONFIG.llm_config.hidden_size) != (theirs, tiny.config.llm_config.hidden_size):
            raise ValueError(
                f"{self.start} is a model of other sizes than `tiny`, with which finding starts: "
                f"give the folder of one that `nanomolmo2 train tiny` made, or leave --model out"
            )
        return tiny, processor

    @torch.no_grad()
    def point_by_looks(self) -> None:
        """Keys and queries of points as the finder's looks: a search for what looks the same."""
        points, finder = self.model.point_predictor, self.model.finder
        assert points is not None and finder is not None
        for projection in (points.patch_q, points.patch_k):
            projection.load_state_dict(finder.token.embed.state_dict())

    def _take_words(self, tiny: NanoMolmo2) -> None:
        """Rows of the pieces and special tokens that `tiny` has, by what they say."""
        table, known = self.model.llm.embed_tokens.weight, tiny.llm.embed_tokens.weight
        before = build_tokenizer().get_vocab(with_added_tokens=True)
        for piece, id in build_find_tokenizer().get_vocab(with_added_tokens=True).items():
            if piece in before and not piece.startswith(("<|reserved", "<|additional")):
                table[id] = known[before[piece]]

    def accelerate(self) -> None:
        """What makes steps faster; without checkpointed activations, for which a model of this size
        has no need: they take 30 % off.
        """
        for apply in (onednn, fuse_projections, lean_norms, bf16_matmul):
            apply(self.model)

    @torch.no_grad()
    def clear_placeholders(self) -> None:
        """Hold the image tokens' embeddings at zero: adding to them and replacing them are one."""
        for id in CONFIG.visual_token_ids:
            self.model.llm.embed_tokens.weight[id] = 0
