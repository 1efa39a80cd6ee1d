"""The base of every configuration: a frozen dataclass that goes to JSON and back, strictly."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Self

from nanomolmo2.files import atomic_path, read_regular

_LARGEST = 4_000_000  # bytes of a JSON file: as Python objects they are twenty times as much


class Config:
    """Base for ``@dataclass(frozen=True)`` configurations.

    Fields are stored values only; what follows from them is a property. Checks that involve more
    than one field belong into the subclass's ``__post_init__``.

    Attributes:
        RENAMED: keys of older files, and what the fields are called now.
    """

    RENAMED: ClassVar[dict[str, str]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: nested configs become dicts, tuples become lists."""
        return {f.name: _to_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain JSON types.

        Raises: ValueError for an unknown key or a value of the wrong type, naming both sides.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: expected an object, found {describe(values)}")
        values = {cls.RENAMED.get(k, k): v for k, v in values.items()}
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(
                f"{cls.__name__} does not know the field(s) {', '.join(unknown)[:200]}; it has "
                f"{', '.join(names)}: remove or rename them, or use a newer nanomolmo2"
            )
        missing = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise ValueError(f"{cls.__name__} lacks the field(s) {', '.join(missing)}: add them")
        hints = typing.get_type_hints(cls)
        return cls(
            **{k: _from_plain(v, hints[k], f"{cls.__name__}.{k}") for k, v in values.items()}
        )

    def check_positive(self, *, but: tuple[str, ...] = ()) -> None:
        """Sizes and counts are at least 1: every int field whose name is not in ``but``."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if type(value) is int and value < 1 and f.name not in but:
                raise ValueError(f"{f.name} must be at least 1, found {value}")

    def save(self, path: str | Path, **extra: Any) -> None:
        """Write as JSON; ``extra`` keys (such as ``model_type``) come first."""
        with atomic_path(path) as temporary:
            text = json.dumps({**extra, **self.to_dict()}, indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, ignore: tuple[str, ...] = ()) -> Self:
        """Read what ``save`` wrote; keys in ``ignore`` are dropped first.

        Raises: ValueError naming the file for anything that is not a valid configuration.
        """
        values = read_json_object(path)
        try:
            return cls.from_dict({k: v for k, v in values.items() if k not in ignore})
        except ValueError as error:
            text = str(error) if len(str(error)) <= 400 else f"{str(error)[:390]} ..."
            raise ValueError(f"{path}: {text}") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Parse a JSON file that must hold one object. Raises: OSError; ValueError naming the file."""
    content = read_regular(path, _LARGEST)
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits too
        raise ValueError(f"{path} is not valid JSON ({error}): copy the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {describe(values)}")
    return values


def _to_plain(value: object) -> object:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_to_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _to_plain(v) for k, v in value.items()}
    return value


def _from_plain(value: Any, hint: Any, where: str) -> object:
    """Check one JSON value against a type hint and return it in the field's own type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _from_plain(value, option, where)
            except ValueError:
                continue
        # A nested config or tuple gives the more telling message on its own.
        options = [a for a in arguments if a is not type(None)]
        if len(options) == 1:
            return _from_plain(value, options[0], where)
    elif origin is typing.Literal:
        if any(type(value) is type(a) and value == a for a in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return tuple(_from_plain(v, arguments[0], where) for v in value)
            if len(arguments) == len(value):
                pairs = zip(value, arguments, strict=True)
                return tuple(_from_plain(v, a, where) for v, a in pairs)
    elif origin is dict:
        if isinstance(value, dict):
            return {k: _from_plain(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    elif isinstance(hint, type) and issubclass(hint, Config):
        try:
            return value if isinstance(value, hint) else hint.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{where.rpartition('.')[2]}: {error}") from None
    elif hint is float:
        # Not below 1e300: infinite, no number, or a whole number that no float can be.
        if isinstance(value, (int, float)) and type(value) is not bool and abs(value) < 1e300:
            return float(value)
    elif hint is type(None) and value is None:
        return None
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {_hint_name(hint)}, found {describe(value)}")


def describe(value: object) -> str:
    """A value and its type, for an error; cut if it is long."""
    text = reprlib.repr(value)  # which ends, however long or deep the value is
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
