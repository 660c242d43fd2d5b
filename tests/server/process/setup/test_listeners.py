"""Where the server listens: Unix sockets and TLS, with the web server that users get."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from configs.schema import ServerConfig
from server.http.connection import outlet
from server.process.setup.listening import address_of, check_tls, open_listener, open_unix_socket
from server.process.web import WebServer
from tests.support.servers.certificate import CERTIFICATE, KEY
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server
from tests.support.waiting import DEADLINE

MakeServer = Callable[..., Server]


def serve(server: Server, ask: Callable[[str], Awaitable[None]]) -> None:
    """Run `ask`, which gets the server's address, while the web server answers."""

    async def main() -> None:
        settings = server.config.server
        listener = open_listener(settings)
        url = address_of(settings, listener)
        web = WebServer(server.app)
        running = asyncio.create_task(web.serve(sockets=[listener]))
        try:
            await ask(url)
        finally:
            web.should_exit = True
            await running

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, Any]:
    files = {"tls_certificate": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    files["tls_certificate"].write_text(CERTIFICATE)
    files["tls_key"].write_text(KEY)
    return files


def test_a_unix_socket_is_served(make_server: MakeServer, tmp_path: Path) -> None:
    path = tmp_path / "aerie.sock"
    server = make_server(socket=path, root_path="/llm")

    async def ask(url: str) -> None:
        assert url == f"http+unix://{path}/llm"
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://any/llm", timeout=DEADLINE
        ) as client:
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200

    serve(server, ask)


def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "aerie.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    in_use = r"aerie\.sock \(server\.socket\): .*in use"
    with open_unix_socket(path), pytest.raises(OSError, match=in_use):
        open_unix_socket(path)
    path.unlink()
    path.write_text("somebody's file")
    with pytest.raises(OSError, match=r"\(server\.socket\)"):
        open_unix_socket(path)
    assert path.read_text() == "somebody's file"


def test_tls_is_served(
    make_server: MakeServer, tls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "LINGER", DEADLINE)
    server = make_server(port=0, **tls)

    async def ask(url: str) -> None:
        assert url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cadata=CERTIFICATE)
        async with httpx.AsyncClient(verify=trusted, base_url=url, timeout=DEADLINE) as client:
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200
            streamed = await client.post(CHAT_PATH, json=CHAT | {"stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
            too_large = await client.post(CHAT_PATH, content=b" " * 5_000_000)
            assert too_large.status_code == 413

    serve(server, ask)


def test_files_without_certificate_and_key_are_named(tls: dict[str, Any], tmp_path: Path) -> None:
    check_tls(ServerConfig())
    check_tls(ServerConfig(**tls))
    for changed in ({"tls_key": tls["tls_certificate"]}, {"tls_key": tmp_path / "none"}):
        with pytest.raises(ValueError, match=r"server\.tls_certificate .*, server\.tls_key "):
            check_tls(ServerConfig(**tls | changed))
    with pytest.raises(ValueError, match="set both, or none"):
        check_tls(ServerConfig(tls_key=tls["tls_key"]))


@pytest.mark.parametrize("root_path", ["llm", "/llm/", "/a b", "/a?b"])
def test_a_root_path_is_a_path(make_server: MakeServer, root_path: str) -> None:
    with pytest.raises(ValueError, match=r"server\.root_path is .*: it must be empty, or a path"):
        make_server(root_path=root_path)
