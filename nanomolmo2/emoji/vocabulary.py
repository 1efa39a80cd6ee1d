"""The vocabulary of `tiny`: made by hand so that a noun is one and the same token everywhere.

A Unigram model whose pieces all have the same score, so the split into the fewest pieces wins.
Words carry the space before them (" there"), except where a noun follows: there the space belongs
to the word (" a ", "How| many "), so that "dog" in "Is there a dog?", "How many dogs?" and
``<points ...>dog</points>`` is the same piece. Everything else is spelled out in characters or
bytes: any text comes back unchanged.

Ids: 0 unknown (never used), 1-256 bytes, then the pieces, then the special tokens that a model may
write, filled up to a multiple of 32 (`vocab_size` of the language model); then 16 ids that are only
ever read (`additional_vocab_size`), in Molmo2's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models

from nanomolmo2.emoji.clips import APPEARS_ANSWER, NEVER_ANSWER
from nanomolmo2.emoji.pairs import SAME_ANSWER
from nanomolmo2.emoji.questions import (
    EVERYTHING,
    NONE_ANSWER,
    NOTHING_ANSWER,
    NUMBER_WORDS,
    UNKNOWN_ANSWER,
)
from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS
from nanomolmo2.emoji.wordings import (
    AMOUNTS,
    DIRECTIONS,
    EXTREMES,
    ORDERS,
    PICTURES,
    QUESTIONS,
)
from nanomolmo2.processor.points import NO_TRACKS
from nanomolmo2.processor.tokenizer import MOLMO2_TOKENS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    # The chat format's fixed pieces, one token each instead of about eight.
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
# Offsets from vocab_size are Molmo2's; the rest of the rows is free.
ADDITIONAL_VOCAB_SIZE = 16
VOCAB_MULTIPLE = 32

POINT_PIECES = (
    '<points coords="1',
    '<points coords="',
    '">',
    "</points>",
    '<tracks coords="0.0',
    '<tracks coords="',
    "</tracks>",
    ";1",
    ";2",
)
COUNTING_START, COUNTING_END = "Counting the ", " shows a total of"  # one decision each, not three
# Words that no template has: small talk of people who try the model. No word may tear up a noun:
# with " be" the bees were " be|es".
FURTHER_WORDS = (
    "third last differs between them missing move moves to up down top bottom middle corner big "
    "small large little red green blue yellow black white orange purple pink brown gray side near "
    "far next behind front animal animals food fruit vehicle who why not with on was think thank "
    "you Hello"
)

_SCORE = -1.0
_BAD_SCORE = -1000.0  # only taken where nothing else fits: "<0x41>" in a text stays six characters
_SLOT = re.compile(r"\{\w+\}")
_WORD = re.compile(r" ?[A-Za-z]+")


def pieces() -> list[str]:
    """The ordinary pieces, nouns first (in the order of `CATEGORIES`)."""
    irregular = [
        plural
        for noun, plural in zip(CATEGORIES, PLURALS, strict=True)
        if plural not in (noun, f"{noun}s", f"{noun}es")
    ]
    found = [*CATEGORIES, *irregular, "s", "es"]
    for wordings in QUESTIONS.values():
        for wording in wordings:
            for direction in DIRECTIONS.values():
                text = wording.replace("{where}", direction)
                found += words_around_slots(text)
                found += words_around_slots(text[0].lower() + text[1:])
    for words in (*ORDERS.values(), *EXTREMES.values(), PICTURES):
        found += [f" {word}" for phrase in words for word in phrase.split()]
    found += [f" {word} " for words in AMOUNTS.values() for word in words]
    found += [COUNTING_START, COUNTING_END]
    answers = ("Yes.", "No.", NONE_ANSWER, NOTHING_ANSWER, SAME_ANSWER, APPEARS_ANSWER, NO_TRACKS)
    for text in (*answers, NEVER_ANSWER, "The first picture.", "The second picture."):
        found += _WORD.findall(text)
    found += [EVERYTHING, UNKNOWN_ANSWER.split(":")[0] + ": "]
    # "A |dog|, |two |cat|s| and| an |apple|."
    for word in ("a", "an", *NUMBER_WORDS):
        found += [f"{word} ", f" {word} ", f"{word.capitalize()} "]
    found += [" and", " and ", " the ", "the ", "The ", ", ", *POINT_PIECES]
    for word in FURTHER_WORDS.split():
        found.append(f" {word.strip('.?')}")
    found += ["Image", "image", "\n", "\t"]
    found += [f" {digit}" for digit in range(10)]
    found += [chr(code) for code in range(32, 127)]
    return list(dict.fromkeys(found))


def build_tokenizer(further: Iterable[str] = ()) -> tokenizers.Tokenizer:
    """The tokenizer of `tiny`, and of models with further pieces; see the head of this file for
    its ids.
    """
    vocabulary = [("<unk>", _BAD_SCORE)]
    vocabulary += [(f"<0x{byte:02X}>", _BAD_SCORE) for byte in range(256)]
    vocabulary += [(piece, _SCORE) for piece in dict.fromkeys([*pieces(), *further])]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def add(names: list[str]) -> None:
        tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])

    add(list(SPECIAL_TOKENS))
    add([f"<|reserved_{i}|>" for i in range(-tokenizer.get_vocab_size() % VOCAB_MULTIPLE)])
    free = ADDITIONAL_VOCAB_SIZE - len(MOLMO2_TOKENS)
    add([*MOLMO2_TOKENS, *(f"<|additional_{i}|>" for i in range(free))])
    return tokenizer


def vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    """``vocab_size`` of the language model's config: ids from here on are only read."""
    return int(tokenizer.get_vocab_size()) - ADDITIONAL_VOCAB_SIZE


def noun_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Id of each noun, in the order of `CATEGORIES`; its row stands for the category."""
    return [_id_of(tokenizer, noun) for noun in CATEGORIES]


def plural_ids(tokenizer: tokenizers.Tokenizer) -> dict[int, int]:
    """Category index -> id of its plural, for the few plurals that are tokens of their own."""
    return {
        i: _id_of(tokenizer, plural)
        for i, (noun, plural) in enumerate(zip(CATEGORIES, PLURALS, strict=True))
        if plural != noun and tokenizer.token_to_id(plural) is not None
    }


def _id_of(tokenizer: tokenizers.Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    if found is None:
        raise ValueError(
            f"the tokenizer has no piece {piece!r}; use the one that build_tokenizer() makes"
        )
    return int(found)


def words_around_slots(wording: str) -> list[str]:
    """Words of a template; the last one before a slot takes the space that follows it."""
    found: list[str] = []
    parts = _SLOT.split(wording)
    for i, part in enumerate(parts):
        words = _WORD.findall(part)
        if words and i + 1 < len(parts) and part.endswith(" "):
            words[-1] += " "
        found += words
    return found
