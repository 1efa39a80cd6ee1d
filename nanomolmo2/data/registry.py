"""Sources that are no records of a file, by name.

``SourceConfig("emoji", options={"length": 1000})`` keeps the options as plain values, so a recipe
can be read, written and compared by whoever does not know the source. The entry of the name reads
them strictly when the source is opened.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

from nanomolmo2.config import Config
from nanomolmo2.data.example import Source
from nanomolmo2.registry import Registry


class SourceOptions(Config):
    """What a source of examples can be told: a frozen dataclass, whose defaults are all set."""

    def open(self, seed: int, name: str) -> Source:
        """The source; it can be pickled for worker processes.

        Args:
            seed: of what is drawn within an example.
            name: for reports.
        """
        raise NotImplementedError

    @classmethod
    def for_replay(cls) -> Self:
        """With which options a model that was trained on the source is reminded of it, while it
        learns something else: see `training/replay.py`.
        """
        return cls()

    @classmethod
    def nouns(cls) -> tuple[str, ...]:
        """What things are called in it, one and several, where these are few."""
        return ()


SOURCES: Registry[type[SourceOptions]] = Registry(
    emoji="nanomolmo2.emoji.source:EmojiConfig",
    things="nanomolmo2.things.source:ThingsConfig",
)


def known_nouns(trained_on: Collection[str]) -> tuple[str, ...]:
    """The nouns that a model knows by what its card says that it was trained on."""
    return tuple(noun for name in trained_on if name in SOURCES for noun in SOURCES[name].nouns())
