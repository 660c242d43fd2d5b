"""Encoded request bodies: gzip, deflate and zstd, decoded to at most a number of bytes."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

from server.http.errors import ApiError, invalid

GZIP, ZLIB, RAW = 31, 15, -15  # `wbits` of zlib
ZSTD_WINDOW = 8 * 2**20  # bytes; RFC 8878 asks decoders for this much
ZSTD_SLICE = 64  # bytes; they decode to two megabytes at most
IDENTITY = "identity"
TOO_EARLY = "it ends too early"
Decode = Callable[[bytes, int], bytes]


def decoder(encoding: str) -> Decode | None:
    """The function that decodes a body with this content-encoding, to at most a number of bytes and
    one more; None for a body that is not encoded. It raises ValueError for invalid bodies.

    Raises:
        ApiError: 415 for an encoding that is not known.
    """
    name = encoding.strip().lower()
    if name in ("", IDENTITY):
        return None
    known = _decoders()
    if name not in known:
        message = f"The content-encoding is {encoding!r}: it must be {', '.join(known)} or absent"
        headers = {"accept-encoding": ", ".join(known), "connection": "close"}
        code = "unsupported_content_encoding"
        raise ApiError(415, message, "invalid_request_error", code=code, headers=headers)
    return known[name]


def decoded(decode: Decode, body: bytes, limit: int, encoding: str) -> bytes:
    """The decoded body, of at most `limit + 1` bytes. ApiError 400 if it is invalid."""
    try:
        return decode(body, limit + 1)
    except (ValueError, zlib.error) as error:
        message = f"The body is not valid {encoding}: {error}"
        raise invalid(message, code="invalid_content_encoding") from error


def _decoders() -> dict[str, Decode]:
    found: dict[str, Decode] = {"gzip": _gunzip, "x-gzip": _gunzip, "deflate": _inflate}
    zstd = _zstd()
    return found if zstd is None else found | {"zstd": zstd}


def _gunzip(body: bytes, most: int) -> bytes:
    """All members of a gzip file."""
    pieces: list[bytes] = []
    while body and most > 0:
        piece, body = _unpacked(body, most, GZIP)
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def _inflate(body: bytes, most: int) -> bytes:
    """RFC 9110 means zlib's format; some clients send deflate without its frame."""
    framed = len(body) >= 2 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
    return _unpacked(body, most, ZLIB if framed else RAW)[0]


def _unpacked(body: bytes, most: int, wbits: int) -> tuple[bytes, bytes]:
    """Decoded bytes, and the bytes after the end of the encoded ones."""
    unpacker = zlib.decompressobj(wbits)
    piece = unpacker.decompress(body, most)
    if not unpacker.eof and len(piece) < most:
        raise ValueError(TOO_EARLY)
    return piece, unpacker.unused_data


def _zstd() -> Decode | None:
    """zstd of Python 3.14, else of the package zstandard; None without both."""
    for name, make in (("compression.zstd", _own_zstd), ("zstandard", _packaged_zstd)):
        try:
            return make(importlib.import_module(name))
        except ImportError:
            continue
    return None


def _own_zstd(library: Any) -> Decode:
    def decode(body: bytes, most: int) -> bytes:
        pieces: list[bytes] = []
        while body and most > 0:
            unpacker = library.ZstdDecompressor()
            try:
                piece = unpacker.decompress(body, most)
            except library.ZstdError as error:
                raise ValueError(str(error)) from error
            if not unpacker.eof and len(piece) < most:
                raise ValueError(TOO_EARLY)
            pieces.append(piece)
            most -= len(piece)
            body = unpacker.unused_data
        return b"".join(pieces)

    return decode


def _packaged_zstd(library: Any) -> Decode:
    def decode(body: bytes, most: int) -> bytes:
        whole = library.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        pieces, size, unpacker = [], 0, whole.decompressobj()
        view = memoryview(body)
        try:
            # This library has no bound for its output; a few bytes cannot become very many.
            for begin in range(0, len(view), ZSTD_SLICE):
                rest: bytes | memoryview = view[begin : begin + ZSTD_SLICE]
                while rest and size < most:
                    unpacker = whole.decompressobj() if unpacker.eof else unpacker
                    pieces.append(unpacker.decompress(rest))
                    size += len(pieces[-1])
                    rest = unpacker.unused_data
        except library.ZstdError as error:
            raise ValueError(str(error)) from error
        if not unpacker.eof and size < most:
            raise ValueError(TOO_EARLY)
        return b"".join(pieces)[:most]

    return decode
