"""Parts of the launcher: its port, `EngineKeeper`, and the application while an engine loads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import msgspec
import pytest
import uvloop

from configs.resolve import HostConfig
from configs.schema import Config, ModelConfig, ServerConfig
from engine.messages import ErrorCode, Finished, OperationBackend
from server.http.app import create_app
from server.http.context import ServerInfo
from server.openai.routes import ROUTES
from server.process import launch
from server.process.client import ZmqEngineClient
from server.process.engine_process import EXIT_BAD_SETUP, STOPPING
from server.process.launch import EngineKeeper, open_port, warn_of_fallback
from server.text.chat_template import ChatTemplate
from tests.support.configurations import hosted
from tests.support.engines import ask
from tests.support.http_server import tiny_tokenizer
from tests.support.live_server import wait_gone
from tests.support.scripted_engine import INFO

WAIT = 30


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


@pytest.fixture
def stub_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Replaces the engine process with a shell script; returns the file that it may write."""

    def install(body: str) -> Path:
        script, trace = tmp_path / "engine.sh", tmp_path / "trace"
        script.write_text(f'#!/bin/sh\ntrace="{trace}"\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setattr(launch.sys, "executable", str(script))
        monkeypatch.setattr(launch, "FIRST_BACKOFF", 0.0)
        return trace

    return install


def keep(
    config: Config,
    work: Callable[[EngineKeeper], Awaitable[None]],
    loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> int:
    """Run `work` beside an `EngineKeeper`; return the keeper's exit code."""

    async def main() -> int:
        client = ZmqEngineClient()
        keeper = EngineKeeper(hosted(config), client)
        keeper.start()
        try:
            await asyncio.wait_for(work(keeper), WAIT)
        finally:
            await keeper.stop()
            client.close()
        return keeper.exit_code

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main())


def test_a_bad_setup_is_not_tried_again(stub_engine: Callable[[str], Path]) -> None:
    trace = stub_engine(f'echo >> "$trace"; exit {EXIT_BAD_SETUP}')
    assert keep(Config(), EngineKeeper.failed) == 1
    assert trace.read_text() == "\n"


def test_an_engine_that_dies_is_started_again(stub_engine: Callable[[str], Path]) -> None:
    lives = f'echo >> "$trace"; [ $(wc -l < "$trace") -lt 3 ] || exit {EXIT_BAD_SETUP}; exit 1'
    trace = stub_engine(lives)
    assert keep(Config(), EngineKeeper.failed) == 1
    assert trace.read_text() == "\n" * 3


def test_an_engine_that_dies_is_the_end_without_restarts(
    stub_engine: Callable[[str], Path],
) -> None:
    trace = stub_engine('echo >> "$trace"; exit 0')
    config = Config(server=ServerConfig(restart_engine=False))
    assert keep(config, EngineKeeper.failed) == 1
    assert trace.read_text() == "\n"


@pytest.mark.parametrize("state", ["STOP", "CONT"])
def test_what_an_engine_leaves_behind_is_killed(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(launch, "LAST_WORDS", 0.0)
    left = f'sleep 1000000 & echo $! > "$trace"; kill -{state} $!; exit {EXIT_BAD_SETUP}'
    trace = stub_engine(left)
    assert keep(Config(), EngineKeeper.failed) == 1
    with contextlib.suppress(ProcessLookupError):
        wait_gone(os.pidfd_open(int(trace.read_text())))


def test_keys_are_not_sent_to_the_engine(
    stub_engine: Callable[[str], Path], tmp_path: Path
) -> None:
    trace = stub_engine(f'head -n 1 > "$trace"; exit {EXIT_BAD_SETUP}')
    server = ServerConfig(api_keys=("sk-secret",), api_key_file=tmp_path / "keys", port=1234)
    keep(Config(server=server), EngineKeeper.failed)
    told = HostConfig.model_validate_json(trace.read_text())
    assert (told.server.api_keys, told.server.api_key_file, told.server.port) == ((), None, 1234)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize(
    ("mode", "reason"), [(None, "No such file or directory"), (0o644, "Permission denied")]
)
def test_an_engine_that_cannot_be_spawned_is_the_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loop: Callable[[], asyncio.AbstractEventLoop],
    mode: int | None,
    reason: str,
) -> None:
    program = tmp_path / "python"
    if mode is not None:
        program.write_text("#!/bin/sh\n")
        program.chmod(mode)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    assert keep(Config(), EngineKeeper.failed, loop) == 1
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.getMessage() == f"the engine process cannot be started: {program}: {reason}"


def test_a_socket_that_cannot_be_created_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = tmp_path / ("x" * 100)  # addresses of sockets have at most 107 characters
    long.mkdir()
    for folder in (tmp_path / "none", long):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert keep(Config(), EngineKeeper.failed) == 1
    assert caplog.text.count("the engine process cannot be started") == 2


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


def test_open_requests_of_an_engine_killed_at_the_end_get_the_shutdown_error(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_engine("exec sleep 1000000")
    monkeypatch.setattr(launch, "LAST_WORDS", 0.0)

    async def main() -> tuple[str | None, ErrorCode | None]:
        client = ZmqEngineClient()
        keeper = EngineKeeper(hosted(), client)
        keeper.start()
        while keeper._process is None:
            await asyncio.sleep(0)
        client._take(INFO)
        stream = client.submit(ask("a", [5]))
        await keeper.stop()
        client.close()
        (end,) = [event async for event in stream]
        assert isinstance(end, Finished)
        return end.error, end.error_code

    assert asyncio.run(main()) == (STOPPING, ErrorCode.STOPPING)


class Said(logging.Handler):
    """Sets an event when the launcher has logged `words`."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words
        self.event = asyncio.Event()
        logger = logging.getLogger("server.process.launch")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if self._words in record.getMessage():
            self.event.set()


def test_the_wait_for_the_next_engine_ends_with_the_server(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_engine("exit 1")
    monkeypatch.setattr(launch, "FIRST_BACKOFF", 1e6)
    monkeypatch.setattr(launch, "LONGEST_BACKOFF", 1e6)

    async def work(_: EngineKeeper) -> None:
        said = Said("starting the engine again")
        try:
            await said.event.wait()
        finally:
            logging.getLogger("server.process.launch").removeHandler(said)

    assert keep(Config(), work) == 0


@pytest.mark.parametrize("started", [False, True])
def test_an_engine_that_is_not_ready_is_killed(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    monkeypatch.setattr(launch, "LAST_WORDS", 1e6)
    stub_engine("exec sleep 1000000")

    async def work(keeper: EngineKeeper) -> None:
        while started and keeper._process is None:
            await asyncio.sleep(0)

    assert keep(Config(), work) == 0


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
