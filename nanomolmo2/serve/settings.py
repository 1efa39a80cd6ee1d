"""Limits and rights of a server."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

# What goes into a header as it is.
_KEY = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What a server allows. The defaults are for one computer and its user.

    Attributes:
        host, port: where it listens; port 0 = one that is free.
        api_keys: any of them opens the server; none = it is open.
        allowed_hosts: names by which it may be called, without ports; none = any. It keeps the
            pages of strangers, whose names can be made to lead here, from calling it.
        allow_remote_images: fetch pictures by http(s) addresses in requests, see `remote.fetch`.
        max_running: answers of a model that are continued together.
        max_waiting: requests beyond these; those that come then are refused with 429.
        max_body_bytes: of a request. All that are held together may have eight times as many.
        max_upload_seconds: until a request has arrived.
        max_seconds: until its answer is complete, from then on.
        max_images: pictures of a request.
        max_pixels: of a picture. All of a request may have four times as many.
        max_new_tokens: longest answer that may be asked for.
        max_choices: most answers to one question (``n``).
        batch_invariant: each answer is the same to the last bit, whatever runs beside it; slower.
        memory_bytes: of the weights of all models together; None = no limit.
        shutdown_seconds: how long running answers may go on after the server was told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allow_remote_images: bool = False
    max_running: int = 8
    max_waiting: int = 128
    max_body_bytes: int = 64 * 2**20
    max_upload_seconds: float = 60.0
    max_seconds: float = 300.0
    max_images: int = 16
    max_pixels: int = 64_000_000
    max_new_tokens: int = 2048
    max_choices: int = 8
    batch_invariant: bool = False
    memory_bytes: int | None = None
    shutdown_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in (each.name for each in dataclasses.fields(self)):
            value, least = getattr(self, name), 0 if name == "max_waiting" else 1
            if name.endswith("_seconds"):
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name} must be 0 or more, found {value}")
            elif name.startswith(("max_", "memory_")) and value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, found {value}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be 0 (any that is free) to 65535, found {self.port}")
        if not all(_KEY.fullmatch(key) for key in self.api_keys):
            raise ValueError(
                "an API key must be of visible ASCII characters without spaces, and not empty"
            )

    @property
    def max_request_pixels(self) -> int:
        """Of all pictures of a request, which are decoded together."""
        return 4 * self.max_pixels

    @property
    def max_bodies_bytes(self) -> int:
        """Of all requests that are held together."""
        return 8 * self.max_body_bytes
