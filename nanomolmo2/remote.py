"""Files behind addresses that strangers wrote: never from this computer or a private network.

An address is looked up once, what it leads to is checked, and the connection goes to the very
address that was checked: a name that leads elsewhere a moment later gains nothing. Each redirect is
checked likewise. Nothing is decompressed, and sizes and times have an end.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple, cast

SCHEMES = {"http": 80, "https": 443}
PORTS = frozenset({80, 443, 8080, 8443})  # others are of mail, databases and the like
MAX_REDIRECTS = 5
MAX_LENGTH = 8192  # characters of an address
_REDIRECTS = (301, 302, 303, 307, 308)
_BLOCK = 1 << 16

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_ORDINARY = ipaddress.ip_network("2000::/3")  # all that IPv6 has given out to the public
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in the last 32 bits
# In 2000::/3: these hold IPv4 addresses (Teredo, 6to4), lead nowhere, or are for examples.
_SPECIAL = [
    ipaddress.ip_network(n) for n in ("2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20")
]
_RELAYS = ipaddress.ip_network("192.88.99.0/24")  # of 6to4, given up: who answers there is unknown


class _Place(NamedTuple):
    """Where a request goes."""

    url: str
    scheme: str
    host: str
    port: int
    target: str  # path and query


def fetch(url: str, *, max_bytes: int = 64 << 20, timeout: float = 20.0) -> bytes:
    """The bytes behind an http or https address of the public internet.

    Args:
        max_bytes: most that is downloaded, 64 MiB by default.
        timeout: seconds for all of it, looking the name up and redirects included.
    Raises: ValueError for an address that is no such one or holds a name and password, for a host
        of which any address is private, loopback, link-local, multicast, reserved or unspecified,
        for what is too long, too slow or compressed, and for what could not be fetched.
    """
    deadline = time.monotonic() + timeout
    shown, base = url[:100], ""
    try:
        for _ in range(MAX_REDIRECTS + 1):
            place = _read(url, base)
            found = _get(place, max_bytes, deadline)
            if isinstance(found, bytes):
                return found
            url, base = found, place.url
    except TimeoutError:
        raise ValueError(f"{shown!r} took longer than {timeout:g} seconds: try another") from None
    except (OSError, http.client.HTTPException) as error:
        # Not its text, which may tell of networks that the asker does not see.
        raise ValueError(
            f"{shown!r} could not be fetched ({type(error).__name__}): check that the address "
            f"opens in a browser"
        ) from None
    raise ValueError(
        f"{shown!r} was redirected more than {MAX_REDIRECTS} times: give the address it leads to"
    )


def _read(url: str, base: str = "") -> _Place:
    """Take an address apart, which may be relative to that of a redirect.

    Raises: ValueError for what is no address of http(s).
    """
    shown = url[:100]
    if len(url) > MAX_LENGTH:
        raise ValueError(f"an address of {len(url)} characters, expected at most {MAX_LENGTH}")
    if any(c <= " " or c in '\\\x7f"<>' for c in url):
        raise ValueError(f"{shown!r} is no address: it holds a space or a control character")
    try:
        url = urllib.parse.urljoin(base, url)
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        host = host and host.encode("idna" if not host.isascii() else "ascii").decode()
    except ValueError as error:  # UnicodeError too
        raise ValueError(f"{shown!r} is no address: {error}") from None
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"found an address of kind {parts.scheme[:20] or 'none'!r}, expected http or https: "
            f"send other files as bytes or as a data URL"
        )
    if "@" in parts.netloc:
        raise ValueError("the address holds a name or password before an @: leave them out")
    if not host:
        raise ValueError(f"{shown!r} names no host")
    port = SCHEMES[parts.scheme] if port is None else port
    if port not in PORTS:
        raise ValueError(
            f"the address names port {port}, expected {', '.join(map(str, sorted(PORTS)))}"
        )
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return _Place(url, parts.scheme, host, port, f"{path}?{query}" if query else path)


# ---- what it leads to ----


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, for everyone to connect to."""
    try:
        ip: _Address = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:  # of one network card
            return False
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _ORDINARY or any(ip in network for network in _SPECIAL):
            return False
    is_special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip in _RELAYS
    return ip.is_global and not is_special


def _look_up(host: str, port: int) -> list[str]:
    """The IP addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _addresses(place: _Place, deadline: float) -> list[str]:
    """Those addresses, all of which are public.

    Raises: ValueError if one is not; TimeoutError, for which a lookup itself has no limit.
    """
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(_look_up(place.host, place.port))
        except (OSError, ValueError) as error:
            answers.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        found = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise ValueError(f"there is no host {place.host[:100]!r}: check the address") from None
    if not found or not all(is_public(address) for address in found):
        raise ValueError(
            f"the host {place.host[:100]!r} is not of the public internet: save the file and send "
            f"it as bytes or as a data URL"
        )
    return found


# ---- the exchange ----


def _get(place: _Place, max_bytes: int, deadline: float) -> bytes | str:
    """The bytes of one place, or the address that it sends us to."""
    with _connected(place, deadline) as stream:
        connection = http.client.HTTPConnection(place.host, place.port)
        connection.sock = cast(socket.socket, stream)
        headers = {
            "Accept": "image/*, video/*;q=0.9",
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": "nanomolmo2",
        }
        connection.request("GET", place.target, headers=headers)
        response = connection.getresponse()
        target = response.getheader("Location")
        if response.status in _REDIRECTS and target:
            return target
        if response.status != 200:
            raise ValueError(
                f"{place.host[:100]!r} answered {response.status}, expected the file (200): check "
                f"the address"
            )
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise ValueError(
                f"{place.host[:100]!r} sent the file compressed, which was not asked for: save it "
                f"and send it as bytes or as a data URL"
            )
        return _body(response, max_bytes)


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Raises: ValueError as soon as it is known to be too long."""
    too_long = f"the file behind the address is longer than {max_bytes:,} bytes: send a smaller one"
    if response.length is not None and response.length > max_bytes:
        raise ValueError(too_long)
    body = bytearray()
    while block := response.read1(_BLOCK):
        body += block
        if len(body) > max_bytes:
            raise ValueError(too_long)
    if response.length:
        raise ValueError("the file behind the address broke off: try again")
    return bytes(body)


@contextlib.contextmanager
def _connected(place: _Place, deadline: float) -> Iterator[_Stream]:
    """A connection to an address of the place that was checked, closed at the end."""
    failed: OSError = OSError("no address")
    for address in _addresses(place, deadline):
        try:
            raw = socket.create_connection((address, place.port), _left(deadline))
            break
        except TimeoutError:
            raise
        except OSError as error:
            failed = error
    else:
        raise failed
    with raw:
        if place.scheme == "https":
            raw.settimeout(_left(deadline))
            context = ssl.create_default_context()
            raw = context.wrap_socket(raw, server_hostname=place.host.rstrip("."))
        with raw:
            yield _Stream(raw, deadline)


def _left(deadline: float) -> float:
    """Raises: TimeoutError if there is no time left."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Stream(io.RawIOBase):
    """A socket for http.client of which all that is read and written has one deadline.

    A socket's own timeout starts anew with every byte.
    """

    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw, self._deadline = raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._raw.settimeout(_left(self._deadline))
        return self._raw.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(_left(self._deadline))
        self._raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def close(self) -> None:
        """Nothing: http.client closes it before it has read the body."""
