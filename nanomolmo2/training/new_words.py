"""Words that a model with a small vocabulary cannot write as tokens: they become tokens.

Such a vocabulary (`tiny`'s) has whole words and, for everything else, letters and bytes. A word
that it has to spell can be read, but the model has hardly learned to, nor to write it. So before
a fine-tuning the words of its data that would be spelled get tokens of their own:

    find_new_words      data -> words, the most frequent first
    add_new_words       model, processor, words -> the same with a token for each

The tokens take the places of the reserved special tokens that the vocabulary was filled up with;
no other id moves. Where those are used up the base rows of the embedding grow, and what lies behind
them, tokens that are read and never written, moves up. A plural is the singular and "s" or "es",
if the data has both: question and answer then share a token, as for the words that `tiny` knows.

Large vocabularies are left as they are: they write any word in a few pieces that were learned.
"""

from __future__ import annotations

import dataclasses
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tokenizers
import torch
from torch import Tensor

from nanomolmo2.data.example import Source
from nanomolmo2.data.fields import texts_of
from nanomolmo2.data.preflight import some_rows
from nanomolmo2.data.sources import RecordSource
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Processor
from nanomolmo2.processor.tokenizer import Tokenizer
from nanomolmo2.training.recipe import NEW_WORD, Recipe

CLOSED = 8192  # pieces; a Unigram vocabulary of fewer has no pieces for words in general
MOST_WORDS = 512
PAIR = 2  # letters: of so many are the pieces in which words are spelled
FEWEST_TIMES = 2  # that a word is found; what is said once is not learned as a word

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # of letters that a vocabulary does not have
_RESERVED = re.compile(r"<\|reserved_\d+\|>")
# Of the pieces, as logarithms of probabilities. The split of the highest sum is taken, so in a tie
# the old pieces win: texts without the new words are read as before.
_SCORE, _NEVER = -1.001, -1000.0


# ---- which words ----


def has_closed_vocabulary(tokenizer: Tokenizer) -> bool:
    """Whether words that it lacks are spelled, in a vocabulary that can be added to."""
    backend = tokenizer.backend
    special = sorted(backend.get_added_tokens_decoder())
    behind = range(backend.get_vocab_size(with_added_tokens=False), tokenizer.vocab_size)
    return (
        isinstance(backend.model, tokenizers.models.Unigram)
        and tokenizer.vocab_size <= CLOSED
        and [id for id in special if id >= behind.start] == list(behind)
    )


def find_new_words(sources: Iterable[Source], tokenizer: Tokenizer) -> list[str]:
    """The words of some data that a closed vocabulary has to spell, the most frequent first.

    Only files of records are looked at, and of large ones a part, see `preflight.some_rows`.
    """
    if not has_closed_vocabulary(tokenizer):
        return []
    counts: Counter[str] = Counter()
    for source in sources:
        if isinstance(source, RecordSource):
            for row in some_rows(source):
                for text in texts_of(row.values, source.layout(row)):
                    counts.update(spelled_words(text, tokenizer))
    counts = _singular(counts, tokenizer)
    found = [word for word, times in counts.items() if times >= FEWEST_TIMES]
    return sorted(found, key=lambda word: (-counts[word], word))[:MOST_WORDS]


def spelled_words(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The words of a text that are not whole tokens: bytes, or one or two of their letters, are
    tokens of their own, other than a final "s" or "es".
    """
    try:
        encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    except TypeError:  # half a surrogate pair: a bad record
        return
    offsets, tokens = encoded.offsets, encoded.tokens
    begins = [start for start, _ in offsets]
    for match in NEW_WORD.finditer(text):
        first, end = match.span()
        for i in range(max(0, bisect_right(begins, first) - 1), len(offsets)):
            start, stop = offsets[i]
            if start >= end:
                break
            part = text[max(start, first) : min(stop, end)]
            is_plural = stop >= end and part in ("s", "es")
            is_short = len(part) <= PAIR and part != match[0] and not is_plural
            if part and (is_short or _BYTE.fullmatch(tokens[i])):
                yield match[0]
                break


def _singular(counts: Counter[str], tokenizer: Tokenizer) -> Counter[str]:
    """Counts in which a plural counts as its singular, where that is among them."""
    merged: Counter[str] = Counter()
    for word, times in counts.items():
        stems = [
            word.removesuffix(ending)
            for ending in ("s", "es")
            if word.endswith(ending) and tokenizer.backend.token_to_id(ending) is not None
        ]
        merged[next((stem for stem in stems if stem in counts), word)] += times
    return merged


def settle_words(
    recipe: Recipe,
    sources: Iterable[Source],
    tokenizer: Tokenizer,
    info: Callable[[str], None],
) -> Recipe:
    """The recipe with the words of its data written into it, if it leaves them open.

    Args:
        sources: the run's own data.
        info: told which they are, or why they stay spelled.
    """
    if recipe.new_words is not None:
        return recipe
    words = [] if recipe.architecture is not None else find_new_words(sources, tokenizer)
    if words and "embeddings" not in recipe.train:
        info(
            f"{listed(words)} {'is no token' if len(words) == 1 else 'are no tokens'} of the "
            f"model's, and embeddings do not learn: spelled in letters, as far as that is learned "
            f"(--train ... embeddings makes tokens of new words)"
        )
        words = []
    elif words:
        s = "" if len(words) == 1 else "s"
        apart = "" if recipe.lora is None else "; an adapter cannot hold them and is not written"
        info(f"{len(words)} new word{s}: {listed(words)}; each becomes a token that learns{apart}")
    return dataclasses.replace(recipe, new_words=tuple(words))


def listed(words: Sequence[str], most: int = 8) -> str:
    """The first words, for people."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


# ---- their tokens ----


def add_new_words(
    model: NanoMolmo2, processor: Processor, words: Sequence[str], seed: int = 0
) -> tuple[NanoMolmo2, Processor]:
    """A token for each word, for a model whose processor has a closed vocabulary.

    The row of a word starts as that of the same word with another capital or with a space, if the
    vocabulary has one; else at random, as long as the rows of words are in the mean.

    Args:
        words: see `find_new_words`; those that are tokens already change nothing.
        seed: of the rows.
    Returns: the model with its rows written, or a larger one; the processor that belongs to it.
    Raises: ValueError for another vocabulary.
    """
    words = [word for word in words if processor.tokenizer.backend.token_to_id(word) is None]
    if not words:
        return model, processor
    if not has_closed_vocabulary(processor.tokenizer):
        raise ValueError(
            f"the recipe has new_words ({', '.join(words[:3])}), which are for models with a small "
            f"closed vocabulary, and this tokenizer has another: leave them out"
        )
    old, base = processor.tokenizer, model.config.llm_config.vocab_size
    tokenizer, added = _with_pieces(old, words, base)
    rows = _first_rows(model, old, words, seed)
    vocabulary = tokenizer.backend.get_vocab()
    ids = [vocabulary[word] for word in words]
    settings = processor.config
    if added:
        model = _with_more_rows(model, added)
        if settings.points is not None and settings.points.num_embeddings is not None:
            behind = settings.points.num_embeddings + added  # where classes of points begin
            points = dataclasses.replace(settings.points, num_embeddings=behind)
            settings = dataclasses.replace(settings, points=points)
    with torch.no_grad():
        for table in _tables(model.state_dict()).values():
            table[ids] = rows.to(table)
    return model, Processor(settings, tokenizer)


def _with_pieces(old: Tokenizer, words: Sequence[str], base: int) -> tuple[Tokenizer, int]:
    """The tokenizer with a piece for each word, and by how many ids those from ``base`` on move.

    Pieces have the ids 0, 1, ... without a gap. So special tokens between the last piece and the
    first word are also listed as pieces, with a score by which no text is ever split into them.
    """
    values: dict[str, Any] = json.loads(old.backend.to_str())
    pieces: list[list[Any]] = values["model"]["vocab"]
    special = sorted(values["added_tokens"], key=lambda token: token["id"])
    names = [token["content"] for token in special if token["id"] >= len(pieces)]
    behind = len(names) - max(0, old.vocab_size - base)  # the first that is read and never written
    places = [i for i, name in enumerate(names[:behind]) if _RESERVED.fullmatch(name)]
    for place, word in zip(places, words, strict=False):
        names[place] = word
    more = list(words[len(places) :])
    names[behind:behind] = more
    last = max(i for i, name in enumerate(names) if name in set(words))
    start = len(pieces)
    pieces += [[name, _SCORE if name in set(words) else _NEVER] for name in names[: last + 1]]
    by_name = {token["content"]: token for token in special}
    ids = {name: start + i for i, name in enumerate(names)}
    kept = [{**by_name[name], "id": i} for name, i in ids.items() if name in by_name]
    values["added_tokens"] = [t for t in special if t["id"] < start and t["content"] not in ids]
    values["added_tokens"] += kept
    unused = max(0, base - old.vocab_size)  # rows that had no token
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values))), max(0, len(more) - unused)


def _first_rows(model: NanoMolmo2, old: Tokenizer, words: Sequence[str], seed: int) -> Tensor:
    """(words, D) float32: where their rows of the embedding start."""
    table = model.llm.embed_tokens.weight.detach().float().cpu()
    vocabulary = old.backend.get_vocab(with_added_tokens=False)
    known = [i for piece, i in vocabulary.items() if NEW_WORD.fullmatch(piece.strip())]
    # In float64, whose last bits, which depend on where a tensor lies in memory, are rounded off.
    length = (table[known] if known else table).double().norm(dim=1).mean()
    random = torch.Generator().manual_seed(seed)
    rows = []
    for word in words:
        row = torch.randn(table.shape[1], generator=random).double()
        like = [
            vocabulary[piece]
            for form in dict.fromkeys((word, word.lower(), word.capitalize()))
            for piece in (form, f" {form}", f"{form} ", f" {form} ")
            if piece in vocabulary
        ]
        rows.append(table[like[0]] if like else (row / row.norm() * length).to(table.dtype))
    return torch.stack(rows)


def _tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What has a row for every token of the base vocabulary."""
    names = ("llm.embed_tokens.weight", "llm.lm_head.weight")
    return {name: state[name] for name in names if name in state}


def _with_more_rows(model: NanoMolmo2, added: int) -> NanoMolmo2:
    """A model with more base rows, of zeros; the ids behind them move up."""
    config, state = model.config, dict(model.state_dict())
    base = config.llm_config.vocab_size
    for name, table in _tables(state).items():
        fresh = table.new_zeros(added, table.shape[1])
        state[name] = torch.cat([table[:base], fresh, table[base:]])

    def moved(id: int) -> int:
        return id + added if id >= base else id

    ends, points = config.eos_token_id, config.point_config
    if points is not None:
        low = points.image_non_indexable_patch_id
        points = dataclasses.replace(
            points,
            patch_token_id=moved(points.patch_token_id),
            subpatch_token_id=moved(points.subpatch_token_id),
            location_token_id=moved(points.location_token_id),
            image_non_indexable_patch_id=None if low is None else moved(low),
        )
    grown_config = dataclasses.replace(
        config,
        llm_config=dataclasses.replace(config.llm_config, vocab_size=base + added),
        image_token_id=moved(config.image_token_id),
        image_special_token_ids=tuple(map(moved, config.image_special_token_ids)),
        eos_token_id=None if ends is None else tuple(map(moved, config.eos_token_ids)),
        pad_token_id=moved(config.pad_token_id),
        point_config=points,
    )
    with torch.device("meta"):
        grown = NanoMolmo2(grown_config)
    grown.load_state_dict(state, assign=True)
    return grown
