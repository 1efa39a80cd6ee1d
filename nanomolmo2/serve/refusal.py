"""A request that gets no answer, in the shape that OpenAI's clients read, and errors for logs."""

from __future__ import annotations

import traceback
from typing import Any

LOG = "nanomolmo2.serve"  # name of the server's logger
RETRY_AFTER = 2  # seconds; an answer of some hundred tokens takes about as long


class Refusal(Exception):
    """Why a request is refused; the server answers with it.

    Attributes:
        message: for people: what was found, what was expected, what to do.
        status: of HTTP. code: for programs, such as ``model_not_found``.
        param: the field of the request that it is about.
        retry_after: seconds after which it may work.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP says beside the body."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def closed() -> Refusal:
    """The server ends."""
    return Refusal(
        "the server is shutting down and takes no new requests: try again in a moment",
        status=503,
        code="shutting_down",
        retry_after=RETRY_AFTER,
    )


def failed() -> Refusal:
    """The server made a mistake, of which only its log tells more."""
    return Refusal(
        "the server failed at this request, which says nothing about the request itself: try again",
        status=500,
        code="internal_error",
    )


def describe_error(error: BaseException) -> str:
    """The kind of an error, or of what it was made of, and the line of ours that raised it.

    Its text may hold a question, a path or a key.
    """
    error = error.__cause__ or error
    place = "?"
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", "?"))
        if module.startswith("nanomolmo2"):
            place = f"{module}:{line}"
    return f"{type(error).__name__} in {place}"
