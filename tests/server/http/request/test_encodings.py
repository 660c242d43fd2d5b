"""Encoded bodies are decoded within the limit for bodies, or refused with the name of the
encoding."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable

import httpx
import pytest
import zstandard

from server.http.request import encodings
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server

MakeServer = Callable[..., Server]
BODY = json.dumps(CHAT).encode()


def deflate_without_frame(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


ENCODED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]),
    "GZIP": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    "deflate ": deflate_without_frame(BODY),
    "zstd": zstandard.compress(BODY),
    "zstd ": zstandard.compress(BODY[:9]) + zstandard.compress(BODY[9:]),
    "identity": BODY,
}
BOMB = b" " * 2_000_000
BOMBS = {
    "gzip": gzip.compress(BOMB),
    "deflate": zlib.compress(BOMB),
    "zstd": zstandard.compress(BOMB),
}


def post(server: Server, encoding: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return server.request("POST", CHAT_PATH, content=body, headers=headers)


def test_every_encoding_is_decoded(server: Server) -> None:
    for encoding, body in ENCODED.items():
        assert post(server, encoding, body).status_code == 200, encoding


def test_a_body_is_too_large_once_it_is_decoded(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=100_000)
    for encoding, body in BOMBS.items():
        assert error_of(post(server, encoding, body), 413)["code"] == "request_too_large"


@pytest.mark.parametrize("encoding", ["br", "gzip, zstd", "nothing"])
def test_other_encodings_are_415(server: Server, encoding: str) -> None:
    response = post(server, encoding, BODY)
    error = error_of(response, 415)
    assert f"'{encoding}'" in error["message"]
    assert response.headers["accept-encoding"] == "gzip, x-gzip, deflate, zstd"


def test_broken_encodings_are_400(server: Server) -> None:
    for encoding in ("gzip", "deflate", "zstd"):
        for body in (ENCODED[encoding][:-3], b"\x00" + ENCODED[encoding], b"{"):
            error = error_of(post(server, encoding, body), 400)
            assert error["code"] == "invalid_content_encoding", (encoding, body)


def test_without_a_library_zstd_is_not_known(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert encodings.decoder("gzip") is not None
    error = error_of(post(server, "zstd", ENCODED["zstd"]), 415)
    assert "gzip, x-gzip, deflate or absent" in error["message"]
