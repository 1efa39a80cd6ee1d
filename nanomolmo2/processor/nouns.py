"""The plurals of English nouns, by the rule of most of them."""

from __future__ import annotations

_PLURALS = {
    "child": "children", "deer": "deer", "fish": "fish", "foot": "feet", "goose": "geese",
    "knife": "knives", "leaf": "leaves", "loaf": "loaves", "man": "men", "mouse": "mice",
    "ox": "oxen", "people": "people", "person": "people", "sheep": "sheep", "shelf": "shelves",
    "skis": "skis", "tooth": "teeth", "wife": "wives", "wolf": "wolves", "woman": "women",
}  # fmt: skip


def plural(label: str) -> str:
    """``traffic light`` -> ``traffic lights``, by the rule of most English nouns."""
    start, space, word = label.rpartition(" ")
    if word in _PLURALS:
        word = _PLURALS[word]
    elif word.endswith(("ss", "us", "is", "x", "z", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        word = word[:-1] + "ies"
    elif not word.endswith("s"):  # scissors, and labels that are plurals already
        word += "s"
    return start + space + word


def singular(label: str) -> str:
    """The other way round; of what is no plural the label itself."""
    start, space, word = label.rpartition(" ")
    irregular = [one for one, many in _PLURALS.items() if many == word]
    found = [*irregular, f"{word[:-3]}y", word[:-2], word[:-1]]
    return start + space + next((one for one in found if one and plural(one) == word), word)
