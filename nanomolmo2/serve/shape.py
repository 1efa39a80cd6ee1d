"""An answer in the shape of a JSON schema: ``response_format`` of type ``json_schema``.

The model writes points, and what it wrote is brought into the form that is asked for. What can be
filled in: of an answer ``text``, ``count`` and ``points``; of a point ``x``, ``y`` (pixels),
``x_share``, ``y_share`` (0..1), ``image`` (from 1), ``time`` (seconds), ``id``, ``label`` and
``confidence``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_DEEPEST = 16
_POINT = ("x", "y", "x_share", "y_share", "image", "time", "id", "label", "confidence")
_ANSWER = ("text", "count", "points")


def values_of(text: str, count: int | None, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an answer has to fill a schema with; alone, it is the answer as ``json_object``."""
    return {
        "text": text,
        "count": count,
        "points": [{name: point[name] for name in _POINT if name in point} for point in points],
    }


def check(schema: Mapping[str, Any]) -> None:
    """Raises: ValueError if answers can not be brought into a schema."""
    point = {**dict.fromkeys(_POINT, 1), "label": "cup"}
    fill(schema, {"text": "one cup", "count": 1, "points": [point]})
    fill(schema, {"text": "none", "count": None, "points": []})


def fill(schema: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """The values in the form of a schema: nothing that it does not name, all that it requires.

    Raises: ValueError naming what can not be filled in.
    """
    return _fill(schema, values, schema, "the answer", 0)


def _fill(schema: Any, value: Any, root: Mapping[str, Any], what: str, depth: int) -> Any:
    if schema is True:
        return value
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        raise ValueError(f"response_format: the schema of {what} is no object, or has no end")
    if "$ref" in schema:
        return _fill(_referred(schema["$ref"], root), value, root, what, depth + 1)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return _first(schema[several], value, root, what, depth)
    kinds = schema.get("type", "object" if "properties" in schema else None)
    if isinstance(kinds, list):
        return _first([{**schema, "type": kind} for kind in kinds], value, root, what, depth)
    if kinds == "object":
        return _object(schema, value, root, what, depth)
    if kinds == "array":
        if not isinstance(value, list):
            raise ValueError(f"response_format: {what} is asked for as a list, and is none")
        items = schema.get("items", True)
        return [_fill(items, one, root, f"an item of {what}", depth + 1) for one in value]
    return _plain(kinds, value, what)


def _object(schema: Any, value: Any, root: Mapping[str, Any], what: str, depth: int) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"response_format: {what} is asked for as an object, and is none")
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return dict(value)
    required = schema.get("required", ())
    filled = {}
    for name, own in properties.items():
        known = name in value or name in (_POINT if "x" in value else _ANSWER)
        if known and (name in value or name in required):
            filled[name] = _fill(own, value.get(name), root, name, depth + 1)
        elif name in required:
            raise ValueError(
                f"response_format requires {name!r:.40}, which answers do not have: use "
                f"{', '.join(_ANSWER)}, and for points {', '.join(_POINT)}"
            )
    return filled


def _first(schemas: Any, value: Any, root: Mapping[str, Any], what: str, depth: int) -> Any:
    """As the first of several schemas that fits; of null first what says so."""
    error = ValueError(f"response_format: nothing is allowed for {what}")
    ordered = list(schemas) if isinstance(schemas, list) else []
    if value is None:
        ordered.sort(key=lambda one: not (isinstance(one, Mapping) and one.get("type") == "null"))
    for one in ordered:
        try:
            return _fill(one, value, root, what, depth + 1)
        except ValueError as found:
            error = found
    raise error


def _plain(kind: object, value: Any, what: str) -> Any:
    """A number or text as its type says; what is not known is an empty text, or 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is None:
        return value
    if kind == "null" and value is None:
        return None
    if kind == "string" and (is_number or value is None or isinstance(value, str)):
        return "" if value is None else str(value)
    if kind == "number" and (is_number or value is None):
        return 0 if value is None else value
    if kind == "integer" and (is_number or value is None):
        return round(value or 0)
    raise ValueError(f"response_format asks for {what} as {kind!r:.20}, which it is not")


def _referred(reference: object, root: Mapping[str, Any]) -> Any:
    found: Any = root
    if isinstance(reference, str) and reference.startswith("#"):
        for part in reference[1:].strip("/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) and part else found
        if found is not None:
            return found
    raise ValueError(f"response_format refers to {reference!r:.60}, which the schema does not have")
