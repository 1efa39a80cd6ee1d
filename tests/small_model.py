"""A whole model with random weights, and one that says what it is told; both take milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanomolmo2.emoji.vocabulary import ADDITIONAL_VOCAB_SIZE, build_tokenizer, vocab_size
from nanomolmo2.generation.engine import Engine, Request
from nanomolmo2.generation.options import GenerateOptions
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import (
    ConnectorConfig,
    LanguageModel,
    LLMConfig,
    NanoMolmo2,
    NanoMolmo2Config,
    VisionConfig,
)
from nanomolmo2.processor import Encoded, Processor, ProcessorConfig, Tokenizer


def small_processor() -> Processor:
    """64 px pictures, 4 image tokens each, `tiny`'s vocabulary."""
    return Processor(
        ProcessorConfig.molmo2(image_size=64, image_tokens=4), Tokenizer(build_tokenizer())
    )


def small_config(processor: Processor) -> NanoMolmo2Config:
    """The shape of `tiny` at width 32."""
    vision = VisionConfig(
        image_size=64,
        patch_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    connector = ConnectorConfig(
        vision_dim=32,
        llm_dim=32,
        connector_type="pooling",
        num_attention_heads=2,
        intermediate_size=64,
        vit_layers=(-1,),
    )
    llm = LLMConfig(
        vocab_size=vocab_size(build_tokenizer()),
        additional_vocab_size=ADDITIONAL_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    return NanoMolmo2Config(
        vision_config=vision,
        connector_config=connector,
        llm_config=llm,
        image_token_id=processor.image_token_id,
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.pad_token_id,
        bidirectional_image_attention=True,
    )


def small_model(seed: int = 0) -> NanoMolmo2:
    """Random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return NanoMolmo2(small_config(small_processor())).eval()


class ScriptedLanguageModel(LanguageModel):
    """Its states are positions alone, and its head gives the token that a text has there."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__(config)
        self.tokenizer = small_processor().tokenizer
        self.texts: list[str] = []
        self._ids: list[int] = []
        self._last = 0  # position of the prompt's last token
        self.norm = torch.nn.Identity()  # type: ignore[assignment]

    def start(self, position: int) -> None:
        """The next text stands behind this position."""
        self._last = position
        self._ids = list(self.tokenizer.encode_text(self.texts.pop(0)))

    def head(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        end = self.tokenizer.special_id("<|im_end|>")
        for row, position in zip(logits, hidden.tolist(), strict=True):
            at = position - self._last
            row[self._ids[at] if at < len(self._ids) else end] = 1e4
        return logits


class ScriptedModel(NanoMolmo2):
    """Says the given texts, one a call of the Pipeline, whatever it is asked; drafts are judged.

    ``calls`` keeps what the Pipeline was asked for.
    """

    llm_class = ScriptedLanguageModel

    def __init__(self, *texts: str) -> None:
        self.processor = small_processor()
        super().__init__(small_config(self.processor))
        assert isinstance(self.llm, ScriptedLanguageModel)
        self.llm.texts = list(texts)
        self.calls: list[dict[str, Any]] = []


_transform = Engine._transform


def _positions(
    engine: Engine, rows: Any, counts: list[int], positions: Tensor, *rest: Any, **named: Any
) -> Tensor:
    if not isinstance(engine.llm, ScriptedLanguageModel):
        return _transform(engine, rows, counts, positions, *rest, **named)
    for row, count in zip(rows, counts, strict=True):
        row.cache.length += count
        if not row.tokens:
            engine.llm.start(row.T - 1)
            positions = positions[-1:]
    return positions


Engine._transform = _positions  # type: ignore[method-assign]
_request = Pipeline._request


def _recorded(
    pipeline: Pipeline, encoded: Encoded, options: GenerateOptions, *rest: Any
) -> Request:
    request = _request(pipeline, encoded, options, *rest)
    if isinstance(pipeline.model, ScriptedModel):
        pixels, windows = encoded.pixel_values, encoded.image_token_pooling
        pipeline.model.calls.append(
            {
                "prompt_ids": torch.from_numpy(encoded.input_ids)[None],
                "pixel_values": None if pixels is None else torch.from_numpy(pixels),
                "image_token_pooling": None if windows is None else torch.from_numpy(windows),
                "max_new_tokens": request.max_new_tokens,
                "sampling": request.sampling,
                "eos_token_id": request.eos_token_ids,
                "proposer": request.proposer,
                "lookup": options.lookup,
                "batch_invariant": options.batch_invariant,
            }
        )
    return request


Pipeline._request = _recorded  # type: ignore[method-assign]
