"""``generate`` of the nets: a batch of padded prompts in, (B, L + new) ids out.

A short way to the engine, in the form of transformers' ``generate``: B rows, L tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from nanomolmo2.generation.engine import Engine, Request, Result
from nanomolmo2.generation.finding import finding_request
from nanomolmo2.generation.options import GenerateKeywords, GenerateOptions
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.prompt import requests_of
from nanomolmo2.generation.speculative import DraftProposer
from nanomolmo2.models import LanguageModel, NanoMolmo2
from nanomolmo2.models.forms import Images, check_ids
from nanomolmo2.processor import Encoded

DEFAULTS = GenerateOptions(max_new_tokens=512)


class RowKeywords(GenerateKeywords, total=False):
    """What ``generate`` takes by name: the options, and the fields of `Rows`."""

    pad_token_id: int | None
    on_token: Callable[[Tensor], None] | None
    on_result: Callable[[int, Result], None] | None
    stops: Callable[[int, int], bool] | None
    proposer: Callable[[], DraftProposer] | None
    prefix_cache: PrefixCache | None


class ImageKeywords(RowKeywords, total=False):
    """What ``generate`` of the whole model takes besides."""

    visual_tokens: Tensor | None
    image_token_pooling: Tensor | None
    point_targets: Tensor | None


@dataclass(frozen=True)
class Rows:
    """What a caller of ``generate`` wants of its rows, beside the options.

    Attributes:
        pad_token_id: fills rows that ended before the others.
        on_token: called with the new ids (B,) as soon as every row has its next one.
        on_result: called with (row, its result) as soon as a row ends.
        stops: called with (row, new id); True ends the row there.
        proposer: makes for each row what knows likely continuations, see `Request`.
        prefix_cache: see `Engine`.
    """

    pad_token_id: int | None = None
    on_token: Callable[[Tensor], None] | None = None
    on_result: Callable[[int, Result], None] | None = None
    stops: Callable[[int, int], bool] | None = None
    proposer: Callable[[], DraftProposer] | None = None
    prefix_cache: PrefixCache | None = None


def generate(
    model: NanoMolmo2,
    prompt_ids: Tensor,
    pixel_values: Images = None,
    attention_mask: Tensor | None = None,
    *,
    visual_tokens: Tensor | None = None,
    image_token_pooling: Tensor | None = None,
    point_targets: Tensor | None = None,
    **keywords: Unpack[RowKeywords],
) -> Tensor:
    """See :meth:`NanoMolmo2.generate`."""
    options, rows = _split(keywords)
    requests = requests_of(
        model,
        prompt_ids,
        pixel_values,
        attention_mask,
        visual_tokens=visual_tokens,
        image_token_pooling=image_token_pooling,
        point_targets=point_targets,
        cache=rows.prefix_cache,
    )
    config = model.config
    requests = _continued(requests, options, config.eos_token_ids, rows)
    pad = config.pad_token_id if rows.pad_token_id is None else rows.pad_token_id
    return _run(_engine(model.llm, len(requests), options, rows), prompt_ids, requests, rows, pad)


def generate_encoded(
    model: NanoMolmo2, prompts: Sequence[Encoded], **keywords: Unpack[RowKeywords]
) -> list[list[int]]:
    """The new ids for each of several prompts as the processor made them, points included; lists of
    points are found all at once where the model can.
    """
    options, rows = _split(keywords)
    requests = [finding_request(model, prompt) for prompt in prompts]
    requests = _continued(requests, options, model.config.eos_token_ids, rows)
    answers: list[list[int]] = [[] for _ in requests]
    for event in _engine(model.llm, len(requests), options, rows).stream(requests):
        if event.token is not None:
            answers[event.request_id].append(event.token)
    return answers


def generate_text(
    llm: LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **keywords: Unpack[RowKeywords],
) -> Tensor:
    """See :meth:`LanguageModel.generate`."""
    options, rows = _split(keywords)
    check_ids(input_ids.cpu(), llm.config.num_embeddings)
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids "
            f"{tuple(input_ids.shape)}: one value for every token"
        )
    prompts = list(input_ids.cpu())
    if attention_mask is not None:
        real = attention_mask.cpu().bool()
        prompts = [row[own] for row, own in zip(prompts, real, strict=True)]
    requests = _continued([Request(ids) for ids in prompts], options, (), rows)
    pad = rows.pad_token_id
    if pad is None:
        pad = next(iter((*options.end_ids(), *options.sampling.stop_token_ids)), 0)
    return _run(_engine(llm, len(requests), options, rows), input_ids, requests, rows, pad)


def _continued(
    prompts: Sequence[Request], options: GenerateOptions, config_ends: tuple[int, ...], rows: Rows
) -> list[Request]:
    """The prompts, and how to continue each."""
    seeds = options.sampling.seeds(len(prompts))
    return [
        replace(
            prompt,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling.with_seed(seed),
            eos_token_ids=options.end_ids(config_ends),
            stops=None if rows.stops is None else partial(rows.stops, b),
            proposer=None if rows.proposer is None else rows.proposer(),
        )
        for b, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def _engine(llm: LanguageModel, B: int, options: GenerateOptions, rows: Rows) -> Engine:
    return Engine(
        llm,
        max_rows=max(B, 1),
        batch_invariant=options.batch_invariant,
        prefix_cache=rows.prefix_cache,
        lookup=options.lookup,
    )


def _run(
    engine: Engine, prompt_ids: Tensor, requests: Sequence[Request], rows: Rows, pad: int
) -> Tensor:
    """(B, L + new): prompts and what follows them, rows that ended filled up."""
    answers: list[list[int]] = [[] for _ in requests]
    ended = [False] * len(requests)
    shown = 0
    for event in engine.stream(requests):
        if event.token is not None:
            answers[event.request_id].append(event.token)
        if event.result is not None:
            ended[event.request_id] = True
            if rows.on_result is not None:
                rows.on_result(event.request_id, event.result)
        # A column is whole once every row has its token, or has ended before.
        while rows.on_token is not None and shown < _whole_columns(answers, ended):
            column = [row[shown] if shown < len(row) else pad for row in answers]
            shown += 1
            rows.on_token(torch.tensor(column).to(prompt_ids.device, non_blocking=True))
    length = max(map(len, answers), default=0)
    new = [row + [pad] * (length - len(row)) for row in answers]
    filled = torch.tensor(new, dtype=torch.long).view(len(answers), length)
    return torch.cat([prompt_ids, filled.to(prompt_ids.device)], dim=1)


def _whole_columns(answers: list[list[int]], ended: list[bool]) -> int:
    running = [len(row) for row, end in zip(answers, ended, strict=True) if not end]
    return min(running) if running else max(map(len, answers))


def _split(keywords: RowKeywords) -> tuple[GenerateOptions, Rows]:
    options: dict[str, Any] = {**keywords}
    rows = {f.name: options.pop(f.name) for f in fields(Rows) if f.name in options}
    return DEFAULTS.updated(**options), Rows(**rows)
