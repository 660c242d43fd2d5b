"""The start of a server: its port, what it says when it is ready, and the application while the
engine loads."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import msgspec
import pytest

from configs.schema import Config, ModelConfig
from engine.messages import DraftFacts, OperationBackend
from server.apis import ROUTES
from server.http.app import create_app
from server.http.context import ServerInfo
from server.process.announcement import announcement, summary, warn_of_fallback
from server.process.channel.client import ZmqEngineClient
from server.process.setup.listening import open_port
from server.text.template.chat_template import ChatTemplate
from tests.support.configurations import hosted
from tests.support.engines.scripted_engine import INFO
from tests.support.servers.http_server import tiny_tokenizer


def test_a_free_port_is_picked_for_zero() -> None:
    with open_port("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*in use"):
            open_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0 \(server\.host, server\.port\)"):
        open_port("192.0.2.1", 0)


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(OSError, match=r"no host\.invalid:0"):
        open_port("no host.invalid", 0)


@pytest.mark.parametrize(
    ("ops", "warnings"),
    [
        ({"linear": OperationBackend("native", "AMX"), "draw": OperationBackend("reference")}, []),
        (
            dict.fromkeys(("linear", "draw"), OperationBackend("reference", "no C++ compiler")),
            ["slow kernels are used for linear, draw: reference (no C++ compiler)"],
        ),
    ],
)
def test_kernels_that_stand_in_for_others_are_warned_of(
    caplog: pytest.LogCaptureFixture, ops: dict[str, OperationBackend], warnings: list[str]
) -> None:
    warn_of_fallback(msgspec.structs.replace(INFO, ops=ops))
    assert [r.getMessage() for r in caplog.records] == warnings


def test_a_start_is_told_in_a_few_narrow_lines_and_ready_is_the_last() -> None:
    head = DraftFacts("heads/smollm2", "eagle3", 1, 32, 1000)
    ops = dict.fromkeys(("linear", "norm"), OperationBackend("native", "AMX")) | {
        "walk": OperationBackend("reference")
    }
    info = msgspec.structs.replace(INFO, ops=ops, draft=head)
    config = hosted(Config(model=ModelConfig(served_name="tiny")))
    lines = announcement(summary(config, info), "http://a:1", "text").splitlines()
    assert lines[:5] == [
        "model: tiny, 64 tokens of context",
        f"device: none, {config.kernels.threads} threads",
        "kernels: native (2), reference (1)",
        "drafts: eagle3 head heads/smollm2, lookup; tree auto",
        "cache: 512 tokens",
    ]
    assert lines[-1].startswith("READY http://a:1 ")
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    plain = msgspec.structs.replace(INFO, draft=None)
    assert summary(config, plain)["drafts"] == "lookup"


def test_while_the_engine_loads_the_server_is_healthy_and_not_ready(tmp_path: Path) -> None:
    async def main() -> list[tuple[str, int]]:
        client = ZmqEngineClient()
        client.attach(f"ipc://{tmp_path}/engine")  # where nobody is going to connect
        config = hosted(Config(model=ModelConfig(served_name="tiny")))
        template = ChatTemplate("{{ messages }}", {})
        info = ServerInfo.from_config(config)
        app = create_app(config, client, tiny_tokenizer(tmp_path), template, info, ROUTES)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
            body = {"model": "tiny", "prompt": "a"}
            answers = [await web.get(path) for path in ("/health", "/ready", "/metrics", "/info")]
            answers.append(await web.post("/v1/completions", json=body))
            client._take(INFO)  # the first message of a loaded engine
            answers.append(await web.get("/ready"))
        client.close()
        return [(answer.url.path, answer.status_code) for answer in answers]

    assert asyncio.run(main()) == [
        ("/health", 200),
        ("/ready", 503),
        ("/metrics", 200),
        ("/info", 200),
        ("/v1/completions", 503),
        ("/ready", 200),
    ]
