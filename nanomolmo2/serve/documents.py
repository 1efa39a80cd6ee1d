"""What the OpenAPI schema says of a route: bodies are read by hand, so it is told here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse

import nanomolmo2
from nanomolmo2.serve.replies import ErrorBody
from nanomolmo2.serve.schemas import REQUESTS

_REFERENCE = "#/components/schemas/{model}"
_EVENT = {  # each of the server-sent events; their data is JSON
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def documented(
    body: type[BaseModel] | None,
    answer: type[BaseModel],
    *,
    streams: bool = False,
    forms: bool = False,
) -> dict[str, Any]:
    """Keywords of a route.

    Args:
        streams: the answer may be server-sent events. forms: the body may be a form with files.
    """
    success: dict[str, Any] = {"model": answer, "description": "The answer"}
    if streams:
        success["content"] = {"text/event-stream": {"schema": _EVENT}}
    errors = {"model": ErrorBody, "description": "What is wrong, in one sentence"}
    found: dict[str, Any] = {
        "response_class": JSONResponse,
        "response_model": None,
        "responses": {200: success, "4XX": errors, "5XX": errors},
    }
    if body is not None:
        reference = {"$ref": _REFERENCE.format(model=body.__name__)}
        content: dict[str, Any] = {"application/json": {"schema": reference}}
        if forms:
            of_places = "like" in body.model_fields
            form = _form_of_places() if of_places else _form(body)
            content["multipart/form-data"] = {"schema": form}
        found["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return found


def _form(body: type[BaseModel]) -> dict[str, Any]:
    """The fields of a form that people fill in; the others have the names of JSON's."""
    file = {"type": "string", "format": "binary"}
    fields: dict[str, Any] = {
        "model": {"type": "string"},
        "image": file,
        "images": {"type": "array", "items": file},
        "video": file,
        "max_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    }
    asked = {"question": "question", "what": "object"}  # by the names that people use
    required = [shown for name, shown in asked.items() if name in body.model_fields]
    fields |= {shown: {"type": "string", "minLength": 1} for shown in required}
    return {"type": "object", "properties": fields, "required": required}


def _form_of_places() -> dict[str, Any]:
    """As `_form`, of the route that finds by example."""
    file = {"type": "string", "format": "binary"}
    places = {"type": "string", "minLength": 1, "description": "as JSON: [[120, 80]]"}
    fields = {
        "model": {"type": "string"},
        **dict.fromkeys(("image", "reference"), file),
        **dict.fromkeys(("like", "unlike"), places),
        "min_confidence": {"type": "number", "minimum": 0, "maximum": 1},
    }
    return {"type": "object", "properties": fields, "required": ["like"]}


def describe(app: FastAPI, *, has_keys: bool) -> None:
    """Let ``/openapi.json`` tell of the bodies too, and of the keys if there are."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title="NanoMolmo2", version=nanomolmo2.__version__, routes=app.routes
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in REQUESTS], ref_template=_REFERENCE
            )
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            parts.update(definitions.get("$defs", {}))
            if has_keys:
                schema["components"]["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"}
                }
                schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
