"""What a client is told of what went wrong: one sentence, and no word of the inside of the server.

In OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``, see `refusal`.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from nanomolmo2.generation.scheduler import Cancelled
from nanomolmo2.serve.refusal import LOG, RETRY_AFTER, Refusal, describe_error, failed

log = logging.getLogger(LOG)


def refuse(error: Refusal, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that is refused."""
    extra = {"x-should-retry": "false"} if error.status == 408 else {}
    return JSONResponse(
        error.body(), error.status, headers={**(headers or {}), **error.headers, **extra}
    )


def install(app: FastAPI) -> None:
    """Let an app answer so whatever a route raises, and addresses that it does not have."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return refuse(as_refusal(error))

    async def no_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return refuse(_of_http(error, request), error.headers)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(ValueError, refused)
    app.add_exception_handler(TimeoutError, refused)
    app.add_exception_handler(Cancelled, refused)
    app.add_exception_handler(HTTPException, no_route)


def _of_http(error: HTTPException, request: Request) -> Refusal:
    messages = {
        404: f"there is no {request.url.path!r:.80}: /openapi.json lists what there is",
        405: f"{request.method} is not what {request.url.path!r:.80} takes: see /openapi.json",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    return Refusal(
        messages.get(error.status_code, sentence(str(error.detail))),
        status=error.status_code,
        code=codes.get(error.status_code, "invalid_request"),
    )


def as_refusal(error: BaseException) -> Refusal:
    """What a client is told of anything that was raised while its request was answered.

    A ValueError is about the request, and its text is written for people; of everything else the
    log tells the kind and the place, since its text may hold what nobody else should read.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValidationError):
        return invalid(error)
    if isinstance(error, ValueError):
        said = str(error).replace("the given bytes", "the file")
        return Refusal(sentence(said), code="invalid_value")
    if isinstance(error, TimeoutError):
        return Refusal(
            "the answer took longer than this server allows: ask for fewer tokens or show less",
            status=408,
            code="request_timeout",
        )
    if isinstance(error, Cancelled):
        return Refusal(
            "the model was closed before the answer ended: try again in a moment",
            status=503,
            code="model_closed",
            retry_after=RETRY_AFTER,
        )
    log.error("error: %s", describe_error(error))
    return failed()


def sentence(text: str) -> str:
    """A message in one line, of a length that people read."""
    line = " ".join(text.split())
    return line if len(line) <= 600 else f"{line[:597]}..."


def invalid(error: ValidationError) -> Refusal:
    """The one thing to say about a body that does not have the fields it should have.

    Of the alternatives that a field has, the one that the request went furthest into is meant.
    """
    found = error.errors(include_url=False)
    worst = max(found, key=lambda one: len(_real(one["loc"])))  # the first of equals
    param = _field(worst["loc"]) or None
    kinds = {one["type"] for one in found if _real(one["loc"]) == _real(worst["loc"])}
    expected = [text for kind, text in _EXPECTED.items() if kind in kinds]
    if (
        "list_type" not in kinds and "too_long" in kinds
    ):  # it was a list, and a text may stand there
        worst = next(one for one in found if one["type"] == "too_long")
        expected = []
    if len(set(expected)) > 1:
        *some, last = dict.fromkeys(expected)
        said = f"{param} must be {', '.join(some)} or {last}, found {_shown(worst['input'])}"
    else:
        said = _say(worst, param or "the body")
    return Refusal(sentence(said), param=param, code=_code(worst["type"]))


def _code(kind: str) -> str:
    return "missing_required_parameter" if kind == "missing" else "invalid_value"


def _real(loc: Sequence[int | str]) -> list[int | str]:
    """The place of an error without the names of the alternatives that pydantic tried."""
    return [
        part
        for part in loc
        if isinstance(part, int) or (part.isidentifier() and part not in _ALTERNATIVES)
    ]


def _field(loc: Sequence[int | str]) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``."""
    path = ""
    for part in _real(loc):
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


# Of a union, as pydantic names them in the place of an error.
_ALTERNATIVES = {
    *("str", "text_part", "image_part", "video_part", "point_part"),
    *("ImageUrl", "PlaceFields"),
}

_EXPECTED = {
    "string_type": "a text",
    "string_unicode": "a text of whole Unicode characters",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _say(error: Mapping[str, Any], field: str) -> str:
    kind, given, context = error["type"], error.get("input"), error.get("ctx") or {}
    if kind == "missing":
        return f"{field} is missing: the request needs it"
    if kind == "value_error":  # of our own validators
        return str(context.get("error", error["msg"]))
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("below", "lt"),
        "multiple_of": ("a multiple of", "multiple_of"),
    }
    if kind in bounds:
        word, name = bounds[kind]
        return f"{field} must be {word} {context[name]:g}, found {_shown(given)}"
    if kind in ("too_short", "too_long"):
        word, name = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        return f"{field} must have at {word} {context[name]} items, found {_shown(given)}"
    if kind in ("string_too_short", "string_too_long"):
        word, name = ("least", "min_length") if "short" in kind else ("most", "max_length")
        return f"{field} must have at {word} {context[name]} characters, found {len(given or '')}"
    if kind in ("literal_error", "union_tag_invalid", "enum"):
        expected = context.get("expected") or context.get("expected_tags")
        return f"{field} must be {expected}, found {_shown(given)}"
    if kind in _EXPECTED:
        return f"{field} must be {_EXPECTED[kind]}, found {_shown(given)}"
    if kind == "string_pattern_mismatch":  # of logit_bias alone
        return f"{field} names no token, expected its id, a whole number, as a text: '42'"
    return f"{field} is not as expected ({error['msg']}): see the schema at /openapi.json"


def _shown(value: object) -> str:
    """A value of a request that is short, and what it is where it is long."""
    if isinstance(value, list):
        return f"{len(value)} items" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > 40:
        return f"a text of {len(value):,} characters"
    return "null" if value is None else reprlib.repr(value)
