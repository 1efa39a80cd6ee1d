"""The process of a server: its socket, its log, and how it ends."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nanomolmo2.serve.admission import Admission
from nanomolmo2.serve.connection import connections
from nanomolmo2.serve.refusal import LOG, describe_error
from nanomolmo2.serve.settings import ServeSettings

_PLAIN = (LOG, "uvicorn")  # loggers whose messages hold nothing of a request
_LAST_SECONDS = 2  # for connections to close after all answers ended, or their time was up


class Runner(uvicorn.Server):
    """A server that finishes its answers when it is told to end.

    From the first signal on, new requests get 503 while the socket still takes them; it is closed
    when the last answer is complete, or after ``shutdown_seconds``. A second one ends it at once.
    """

    def __init__(
        self,
        app: FastAPI,
        admission: Admission,
        settings: ServeSettings,
        on_start: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connections(settings.max_upload_seconds),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self.admission, self.shutdown_seconds = admission, settings.shutdown_seconds
        self._on_start = on_start
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Signals are already ours when it is said that connections are taken."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. uvicorn's own would close the socket, and raise the signal at the end."""
        if self._deadline is not None:
            self.should_exit = self.force_exit = True
            return
        self._deadline = time.monotonic() + self.shutdown_seconds
        self.admission.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self._deadline is not None and (
            not self.admission.inside or time.monotonic() >= self._deadline
        ):
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: whoever comes too early is told so by the system.

    Raises: ValueError for a host that there is not, and a port that is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise ValueError(f"there is no host {host!r} to listen at: 127.0.0.1 is this one") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(
            f"the server cannot listen at port {port} of {host} ({error.strerror}): choose another "
            f"with --port, or 0 for one that is free"
        ) from None
    return found


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this computer reaches a socket."""
    return ipaddress.ip_address(str(bound.getsockname()[0]).partition("%")[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """``http://127.0.0.1:8000``"""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_page(address: str) -> None:
    """Open an address in a browser, where there is a screen.

    Without one, Python would take a browser of the terminal, which the server writes to.
    """
    screens = "DISPLAY", "WAYLAND_DISPLAY"
    if sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in screens):
        # Some browsers are waited for until they are closed.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def run(
    app: FastAPI,
    admission: Admission,
    settings: ServeSettings,
    bound: socket.socket,
    on_start: Callable[[], None],
) -> None:
    """Serve until a signal comes and the answers that run then are complete.

    Args:
        on_start: called as soon as connections are taken.
    """
    Runner(app, admission, settings, on_start).run(sockets=[bound])


class _Lines(logging.Handler):
    """A line for each record, without what strangers wrote: neither errors' texts nor tracebacks.

    Messages of other packages have both, pieces of requests, and the files of the code.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = f"error: {describe_error(record.exc_info[1])}"
        elif not record.name.startswith(_PLAIN) or "\n" in text:  # uvicorn writes tracebacks too
            text = f"{record.levelname.lower()} of {record.name}"
        self.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def log_lines(write: Callable[[str], None]) -> None:
    """Write what the process logs as lines: our own from INFO on, of others what is wrong."""
    root = logging.getLogger()
    root.addHandler(_Lines(write))
    logging.getLogger(LOG).setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # its warnings are of clients that left

    def of_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None:
            logging.getLogger(LOG).error("error: %s", describe_error(failed.exc_value))

    def unraisable(failed: sys.UnraisableHookArgs) -> None:
        if failed.exc_value is not None:
            logging.getLogger(LOG).error("error: %s", describe_error(failed.exc_value))

    threading.excepthook = of_thread
    sys.unraisablehook = unraisable
    logging.captureWarnings(True)  # they quote lines of the code, with their files
