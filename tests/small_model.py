"""A whole model with random weights, and one that says what it is told; both take milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanomolmo2.data.emoji.vocabulary import ADDITIONAL_VOCAB_SIZE, build_tokenizer, vocab_size
from nanomolmo2.generation.engine import Result
from nanomolmo2.models import ConnectorConfig, LLMConfig, NanoMolmo2, NanoMolmo2Config, VisionConfig
from nanomolmo2.processor import Processor, ProcessorConfig, Tokenizer


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


class ScriptedModel(NanoMolmo2):
    """Says the given texts, one a call, whatever it is asked; keeps what it was called with."""

    def __init__(self, *texts: str) -> None:
        self.processor = small_processor()
        super().__init__(small_config(self.processor))
        self.texts = list(texts)
        self.calls: list[dict[str, Any]] = []

    def generate(  # type: ignore[override]
        self,
        prompt_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        on_token: Callable[[Tensor], None],
        on_result: Callable[[int, Result], None],
        stops: Callable[[int, int], bool],
        **options: Any,
    ) -> Tensor:
        self.calls.append({"prompt_ids": prompt_ids, "pixel_values": pixel_values, **options})
        ids = [*self.processor.tokenizer.encode_text(self.texts.pop(0))]
        ids.append(self.processor.tokenizer.special_id("<|im_end|>"))
        reason, end, said = "length", ids[-1], []
        for id in ids[: options["max_new_tokens"]]:
            said.append(id)
            stopped = stops(0, id)
            on_token(torch.tensor([id]))
            if stopped or id == end:
                reason = "stop"
                break
        on_result(0, Result(said, reason, prompt_ids.shape[1], 0))
        return torch.cat([prompt_ids, torch.tensor([ids])], dim=1)
