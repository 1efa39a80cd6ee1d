"""Words that a model was taught beside what its language model knows, as they lie in its folder.

    words.json          the words, where in which picture each was shown or what it looks like, and
                        digests of the pictures
    word-3f9a....png    the pictures, byte by byte as they were given

`nanomolmo2 teach` and `train` write them beside the files of a model, and `VLM` reads them with it.
How a question about a word is answered is in `taught`.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from PIL import Image

from nanomolmo2.checks import read_with_digest, with_digest, written
from nanomolmo2.convert.folder import write_json
from nanomolmo2.files import read_regular
from nanomolmo2.processor import load_image

WORDS_FILE = "words.json"
PICTURE_FILES = "word-*"  # what their names are like
MOST_BYTES = 64 * 2**20  # of a picture
LONGEST_NAME = 64  # characters

Way = Literal["find", "prompt"]
WAY: Way = "find"  # the one that `teach` writes; `benchmarks.teaching` measures both


class Sample(NamedTuple):
    """Where a thing was shown: the name of a picture's file, and a place in it, pixels."""

    picture: str
    x: float
    y: float


class WordLook(NamedTuple):
    """What a word looks like that was learned from annotated pictures, see `training.word_looks`.

    patch, token: numbers, as many as the finder's looks have, of the patch and of the visual token.
    size: the logarithm of how long a thing's longer side is, in patches.
    """

    patch: tuple[float, ...]
    token: tuple[float, ...]
    size: float


@dataclass(frozen=True)
class Word:
    """A word and what it stands for: by samples, or by a look that was learned.

    Attributes:
        name: as it is written in answers, such as ``walnut`` or ``hex nut``.
        plural: as people ask for several of them.
        samples: things that were shown when the word was taught; none of one that has a look.
        look: learned from annotated pictures; None where it was shown.
    """

    name: str
    plural: str
    samples: tuple[Sample, ...] = ()
    look: WordLook | None = None

    @property
    def known_by(self) -> str:
        """How it was taught, for people."""
        if self.look is not None:
            return "from annotated pictures"
        return f"by {len(self.samples)} example{'s' * (len(self.samples) != 1)}"

    @property
    def forms(self) -> tuple[str, ...]:
        """How the word may stand in a question, the longest first."""
        singular = self.name[:-1] if self.plural == self.name and self.name.endswith("s") else ""
        found = {key_of(form) for form in (self.name, self.plural, singular) if form}
        return tuple(sorted(found, key=lambda form: (-len(form), form)))


@dataclass(frozen=True)
class Words:
    """All words that a model was taught.

    Attributes:
        words: by their names.
        files: the bytes of their pictures, by the names of the files.
        others: nouns that the model knew before, so that a question about both is noticed.
        way: how questions about them are answered: by finding what is like the samples, or by
            telling the model before the question what it was shown.
    """

    words: Mapping[str, Word]
    files: Mapping[str, bytes]
    others: tuple[str, ...] = ()
    way: Way = WAY

    @cached_property
    def pictures(self) -> dict[str, Image.Image]:
        """The pictures, upright; each is decoded once."""
        return {name: load_image(data) for name, data in self.files.items()}

    @cached_property
    def _mentions(self) -> list[tuple[re.Pattern[str], Word | None]]:
        """What to look for in a question, the longest first; None: a noun of `others`."""
        forms = [(form, word) for word in self.words.values() for form in word.forms]
        taught = {form for form, _ in forms}
        others = {key_of(form) for form in self.others} - taught
        every: list[tuple[str, Word | None]] = [*forms, *((form, None) for form in others)]
        every.sort(key=lambda item: (-len(item[0]), item[0]))
        return [(pattern_of(form), word) for form, word in every]

    def rest(self, text: str) -> str:
        """What a text says beside its words and the nouns of ``others``."""
        return self._read(text)[2]

    def mentioned(self, text: str) -> tuple[list[Word], list[str]]:
        """The words of a text in their order, and the nouns of ``others`` in it."""
        return self._read(text)[:2]

    def _read(self, text: str) -> tuple[list[Word], list[str], str]:
        left, words, others = key_of(text), dict[int, Word](), dict[int, str]()
        for pattern, word in self._mentions:
            for match in pattern.finditer(left):
                if word is None:
                    others[match.start()] = match[0]
                else:
                    words[match.start()] = word
            # A part of what was found is no other word: "hex nut" holds no "nut".
            left = pattern.sub(lambda match: "\0" * len(match[0]), left)
        named = dict.fromkeys(words[at].name for at in sorted(words))
        rest = left.replace("\0", " ")
        return [self.words[name] for name in named], [others[at] for at in sorted(others)], rest

    def with_word(self, word: Word, files: Mapping[str, bytes]) -> Self:
        """The same and one word more, in place of those that are written in the same way."""
        words = dict(self.without(word).words)
        words[word.name] = word
        used = {sample.picture for each in words.values() for sample in each.samples}
        every = {**self.files, **files}
        kept = {name: data for name, data in every.items() if name in used}
        return type(self)(words, kept, self.others, self.way)

    def without(self, word: Word) -> Self:
        """The same but for what is written like a word."""
        forms = set(word.forms)
        words = {name: each for name, each in self.words.items() if not forms & set(each.forms)}
        return type(self)(words, self.files, self.others, self.way)

    def knows(self, name: str) -> str | None:
        """The word that a name, or its plural, already stands for."""
        key = key_of(name)
        return next((word.name for word in self.words.values() if key in word.forms), None)

    def save(self, folder: Path) -> None:
        """Write them beside the files of a model."""
        values = {
            "way": self.way,
            "words": [
                {
                    "name": word.name,
                    "plural": word.plural,
                    "samples": [list(sample) for sample in word.samples],
                    **({} if word.look is None else {"look": _look_values(word.look)}),
                }
                for word in self.words.values()
            ],
            "pictures": {name: _sha256(data) for name, data in self.files.items()},
            "others": list(self.others),
        }
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        with written(folder / WORDS_FILE) as temporary:
            write_json(temporary, with_digest(values))


# ---- files ----


def words_of(model: object) -> Words | None:
    """The words of a model by its name or folder; None where none were taught.

    Raises: ValueError for files that are not as they were written.
    """
    if not isinstance(model, (str, Path)) or str(model) == "tiny":
        return None
    folder = Path(model).expanduser()
    return read_words(folder) if (folder / WORDS_FILE).is_file() else None


def read_words(folder: Path) -> Words:
    """The words of a folder, every picture checked by its digest.

    Raises: OSError; ValueError, in one sentence, for anything that is not as `Words.save` wrote it.
    """
    path = folder / WORDS_FILE
    try:
        values = read_with_digest(path, since="words")
        way, others = values["way"], tuple(map(_text, values["others"]))
        if way not in get_args(Way):
            raise ValueError(f"its way is {way!r:.40}, expected one of {', '.join(get_args(Way))}")
        words = [_word(value) for value in values["words"]]
        files = {
            name: _picture(folder, name, expected) for name, expected in values["pictures"].items()
        }
        for word in words:
            for sample in word.samples:
                if sample.picture not in files:
                    raise ValueError(f"it names the picture {sample.picture!r:.80}, without digest")
        return Words({word.name: word for word in words}, files, others, way)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        reason = str(error) if isinstance(error, (ValueError, OSError)) else "its fields are others"
        raise ValueError(
            f"the taught words in {path} cannot be read ({reason}): teach them again, or remove "
            f"the file, and the model knows none"
        ) from None


def _word(value: Mapping[str, Any]) -> Word:
    samples = tuple(Sample(_text(p), float(x), float(y)) for p, x, y in value["samples"])
    look = None if value.get("look") is None else _look(value["look"])
    if not samples and look is None:
        raise ValueError("a word has no sample, and no look")
    return Word(checked_name(_text(value["name"])), _text(value["plural"]), samples, look)


def _look_values(look: WordLook) -> dict[str, Any]:
    """A line for each part."""
    patch, token = (" ".join(map(str, part)) for part in look[:2])
    return {"patch": patch, "token": token, "size": look.size}


def _look(value: Mapping[str, Any]) -> WordLook:
    patch, token = (tuple(map(float, value[part].split())) for part in ("patch", "token"))
    look = WordLook(patch, token, float(value["size"]))
    if len(patch) != len(token) or not all(map(math.isfinite, (*patch, *token, look.size))):
        raise ValueError("a word's look is not as it was learned")
    return look


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _picture(folder: Path, name: str, expected: str) -> bytes:
    if not re.fullmatch(r"word-[0-9a-f]{16}\.\w{1,8}", name):
        raise ValueError(f"{name!r:.80} is no name of a picture of a word")
    data = read_regular(folder / name, MOST_BYTES)
    if _sha256(data) != expected:
        raise ValueError(f"the picture {name} is not as it was written")
    return data


def picture_name(data: bytes, suffix: str) -> str:
    """The name under which a picture lies beside a model; the same bytes have the same one."""
    ending = suffix.lstrip(".").lower()
    return (
        f"word-{_sha256(data)[:16]}.{ending if re.fullmatch(r'[a-z0-9]{1,8}', ending) else 'png'}"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- names ----


def checked_name(name: str) -> str:
    """A name in one form: composed letters, single spaces.

    Raises: ValueError for what is no word or several of them.
    """
    text = unicodedata.normalize("NFC", " ".join(name.split()))
    bare = re.sub(r"(?<=\S)[-' \u2019](?=\S)", "", text)  # between letters
    if not bare or len(text) > LONGEST_NAME or not all(_is_letter(letter) for letter in bare):
        raise ValueError(
            f"the name is {name[:LONGEST_NAME]!r}, expected one or several words of letters, at "
            f"most {LONGEST_NAME} characters, such as walnut or 'hex nut'"
        )
    return text


def key_of(text: str) -> str:
    """A text as it is compared: composed letters, no capitals, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def pattern_of(form: str) -> re.Pattern[str]:
    """A form as a whole word."""
    return re.compile(rf"(?<!\w){re.escape(form)}(?!\w)")


def with_article(name: str) -> str:
    """``a walnut``, ``an almond``; by the first letter."""
    return f"{'an' if key_of(name)[0] in 'aeiou' else 'a'} {name}"


def listed(names: Iterable[str]) -> str:
    """``walnut, pecan and hex nut``."""
    given: Sequence[str] = list(names)
    return " and ".join([", ".join(given[:-1]), given[-1]]) if given[1:] else "".join(given)


def _is_letter(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "LM"
