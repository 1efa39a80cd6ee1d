"""Answers in the shape of a schema."""

from __future__ import annotations

from typing import Any

import pytest

from nanomolmo2.serve import shape

POINT = {
    "x": 96.0,
    "y": 67.25,
    "x_share": 0.5,
    "y_share": 0.35,
    "image": 1,
    "id": 1,
    "label": None,
    "x_thousandths": 500,
}
VALUES = shape.values_of("text", None, [POINT])
PLACE = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
    "required": ["x", "y"],
}


def test_an_answer_as_json_has_what_is_known() -> None:
    assert VALUES["points"] == [{k: v for k, v in POINT.items() if k != "x_thousandths"}]
    assert VALUES["count"] is None


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "object"}, VALUES),
        ({"type": "object", "properties": {"text": {"type": "string"}}}, {"text": "text"}),
        (
            {"properties": {"points": {"type": "array", "items": PLACE}}},
            {"points": [{"x": 96, "y": 67.25}]},
        ),
        (
            {
                "$defs": {"P": PLACE},
                "properties": {"points": {"type": "array", "items": {"$ref": "#/$defs/P"}}},
            },
            {"points": [{"x": 96, "y": 67.25}]},
        ),
        ({"properties": {"count": {"type": ["integer", "null"]}}}, {"count": None}),
        (
            {"properties": {"count": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}},
            {"count": None},
        ),
        ({"properties": {"count": {"type": "integer"}}, "required": ["count"]}, {"count": 0}),
        ({"properties": {"mood": {"type": "string"}}}, {}),
        (
            {
                "properties": {
                    "points": {
                        "type": "array",
                        "items": {
                            "properties": {"label": {"type": "string"}, "time": {"type": "number"}},
                            "required": ["label"],
                        },
                    }
                }
            },
            {"points": [{"label": ""}]},
        ),
    ],
)
def test_fill(schema: dict[str, Any], expected: Any) -> None:
    shape.check(schema)
    assert shape.fill(schema, VALUES) == expected


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"mood": {}}, "required": ["mood"]}, "requires 'mood'"),
        ({"type": "array"}, "as a list"),
        ({"type": "string"}, "the answer as 'string'"),
        ({"properties": {"points": {"type": "object"}}}, "points is asked for as an object"),
        ({"properties": {"points": {"type": "array", "items": {"type": "array"}}}}, "as a list"),
        ({"properties": {"text": {"type": "boolean"}}}, "text as 'boolean'"),
        ({"$ref": "#/$defs/A"}, "refers to"),
        ({"$ref": "#"}, "has no end"),
        ({"anyOf": []}, "nothing is allowed"),
    ],
)
def test_what_answers_do_not_have_is_refused_at_once(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shape.check(schema)
