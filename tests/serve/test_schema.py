"""The server does what its OpenAPI schema says, for inputs that nobody thought of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from nanomolmo2.generation.vlm import VLM
from nanomolmo2.serve.app import make_app
from nanomolmo2.serve.settings import ServeSettings
from nanomolmo2.serve.store import ModelStore

# JSON Schema can not say which pictures open, or who speaks after whom: what it allows may be
# refused, but not with a status or a shape that it does not have.
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
SHORT = ServeSettings(max_new_tokens=2, max_choices=2)

schema = schemathesis.openapi.from_asgi(
    "/openapi.json", make_app(ModelStore({"tiny": lambda: VLM("tiny", device="cpu")}), SHORT)
)
OPERATIONS = {found.ok().label: found.ok() for found in schema.get_all_operations()}


@pytest.fixture(autouse=True)
def quietly(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """And nothing is logged as an error."""
    yield
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_the_schema_has_all_routes() -> None:
    assert set(OPERATIONS) == {
        "GET /health",
        "GET /metrics",
        "GET /v1/examples",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "POST /v1/attention",
        "POST /v1/caption",
        "POST /v1/chat/completions",
        "POST /v1/count",
        "POST /v1/find",
        "POST /v1/point",
        "POST /v1/query",
        "POST /v1/responses",
    }


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        *((label, "positive") for label in OPERATIONS),
        *((label, "negative") for label in OPERATIONS if label.startswith("POST")),
    ],
)
def test_every_route(label: str, mode: str) -> None:
    operation: Any = OPERATIONS[label]

    @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    @settings(
        max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    def check(case: Any) -> None:
        named = isinstance(case.body, dict) and case.body.get("model")
        if named and isinstance(named, str):
            case.body["model"] = "tiny"  # a random name would only ever be refused
        case.call_and_validate(checks=CHECKS)

    check()
