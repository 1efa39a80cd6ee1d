"""The vocabulary of the model that finds by example.

That of `tiny`, the words of more questions, and pieces of two letters, in which names that it has
never read are spelled.
"""

from __future__ import annotations

from collections import Counter

import tokenizers

from nanomolmo2.emoji.sprites import CATEGORIES
from nanomolmo2.emoji.vocabulary import build_tokenizer, words_around_slots
from nanomolmo2.things.wordings import NAMELESS, NAMES, PLACES, QUESTIONS, UNLIKE

END_OF_POINTS = "</point>"  # of models that select, see `processor.grounding`
NUM_PAIRS = 160  # of letters


def find_pieces() -> list[str]:
    """What `tiny` has no pieces for, and some that it has."""
    found = [NAMELESS, END_OF_POINTS]
    for wording in (*(w for wordings in QUESTIONS.values() for w in wordings), *UNLIKE, *PLACES):
        for text in (wording, wording[:1].lower() + wording[1:]):
            found += words_around_slots(text)
    return [*found, *letter_pairs()]


def letter_pairs() -> list[str]:
    """The two letters that names have most often side by side, in order of their number."""
    names = [*CATEGORIES, *NAMES]
    counts = Counter(name[i : i + 2] for name in names for i in range(len(name) - 1))
    pairs = [pair for pair in counts if pair.isalpha()]
    return sorted(pairs, key=lambda pair: (-counts[pair], pair))[:NUM_PAIRS]


def build_find_tokenizer() -> tokenizers.Tokenizer:
    """`tiny`'s tokenizer with `find_pieces`: its ids are others."""
    return build_tokenizer(find_pieces())
