"""Requests that ask for another protocol, such as HTTP/2, are answered in this one, as RFC 9110
(7.8) allows. Java's HTTP client asks so with each request to an address without TLS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case
OF_UPGRADES = (b"upgrade", b"http2-settings")


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """The head of a request, as the parser has read it, without the wish for another protocol."""
    lines = [name + b": " + value for name, value in _kept(headers)]
    return b"\r\n".join([b"%s %s HTTP/%s" % (method, url, version.encode()), *lines, b"\r\n"])


def _kept(headers: Headers) -> Iterator[tuple[bytes, bytes]]:
    for name, value in headers:
        if name == b"connection":
            words = [word.strip() for word in value.split(b",")]
            others = [word for word in words if word.lower() not in OF_UPGRADES]
            if others:
                yield name, b", ".join(others)
        elif name not in OF_UPGRADES:
            yield name, value
