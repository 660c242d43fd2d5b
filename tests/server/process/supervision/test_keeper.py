"""The engine process as its keeper sees it: started, watched, ended, started again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from configs.resolve import HostConfig
from configs.schema import Config, ServerConfig
from engine.messages import EngineFailed, ErrorCode, Finished
from server.assembly.roles.role import Role
from server.process.channel.client import ENGINE_LOST, ZmqEngineClient
from server.process.engine_process import EXIT_BAD_SETUP, STOPPING
from server.process.supervision import keeper as keeping
from server.process.supervision import restarts
from server.process.supervision.keeper import EngineKeeper
from server.process.supervision.process_table import PROC, ticks_of_group
from tests.support.configurations import hosted
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import INFO
from tests.support.servers.live_server import wait_gone
from tests.support.waiting import DEADLINE, until, wait_until


@pytest.fixture
def stub_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Replaces the engine process with a shell script; returns the file that it may write."""

    def install(body: str) -> Path:
        script, trace = tmp_path / "engine.sh", tmp_path / "trace"
        script.write_text(f'#!/bin/sh\ntrace="{trace}"\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setattr(keeping.sys, "executable", str(script))
        monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.0)
        return trace

    return install


def keep(
    config: Config,
    work: Callable[[EngineKeeper], Awaitable[None]],
    loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    *,
    was_ready: bool = False,
) -> int:
    """Run `work` beside an `EngineKeeper`; return the keeper's exit code."""

    async def main() -> int:
        client = ZmqEngineClient()
        keeper = EngineKeeper(hosted(config), client)
        keeper._was_ever_ready = was_ready
        keeper.start()
        try:
            await asyncio.wait_for(work(keeper), DEADLINE)
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


def test_an_engine_that_dies_again_and_again_is_the_end(
    stub_engine: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    trace = stub_engine('echo >> "$trace"; exit 1')
    assert keep(Config(server=ServerConfig(max_restarts=3)), EngineKeeper.failed) == 1
    assert trace.read_text() == "\n" * 4
    assert "started again 3 times in a row (server.max_restarts)" in caplog.text


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
    monkeypatch.setattr(keeping, "CLOSING_TIME", 0.0)
    left = f'sleep 1000000 & echo $! > "$trace"; kill -{state} $!; exit {EXIT_BAD_SETUP}'
    trace = stub_engine(left)
    assert keep(Config(), EngineKeeper.failed) == 1
    with contextlib.suppress(ProcessLookupError):
        wait_gone(os.pidfd_open(int(trace.read_text())))


def test_keys_are_not_sent_to_the_engine(
    stub_engine: Callable[[str], Path], tmp_path: Path
) -> None:
    trace = stub_engine(f'head -n 1 > "$trace"; exit {EXIT_BAD_SETUP}')
    server = ServerConfig(
        api_keys=("sk-secret",),
        priority_keys=("sk-secret",),
        api_key_file=tmp_path / "keys",
        port=1234,
    )
    keep(Config(server=server), EngineKeeper.failed)
    assert "sk-secret" not in trace.read_text()
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
    monkeypatch.setattr(keeping.sys, "executable", str(program))
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


def test_open_requests_of_an_engine_killed_at_the_end_get_the_shutdown_error(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_engine("exec sleep 1000000")
    monkeypatch.setattr(keeping, "CLOSING_TIME", 0.0)

    async def main() -> tuple[str | None, ErrorCode | None]:
        client = ZmqEngineClient()
        keeper = EngineKeeper(hosted(), client)
        keeper.start()
        await until(lambda: keeper._process)
        client._take(INFO)
        stream = client.submit(ask("a", [5]))
        await keeper.stop()
        client.close()
        (end,) = [event async for event in stream]
        assert isinstance(end, Finished)
        return end.error, end.error_code

    assert asyncio.run(main()) == (STOPPING, ErrorCode.STOPPING)


class Said(logging.Handler):
    """Sets an event when the keeper has logged `words`."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words
        self.event = asyncio.Event()
        logger = logging.getLogger("server.process.supervision.keeper")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if self._words in record.getMessage():
            self.event.set()


def test_the_wait_for_the_next_engine_ends_with_the_server(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_engine("exit 1")
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 1e6)
    monkeypatch.setattr(restarts, "LONGEST_PAUSE", 1e6)

    async def work(_: EngineKeeper) -> None:
        said = Said("starting the engine again")
        try:
            await said.event.wait()
        finally:
            logging.getLogger("server.process.supervision.keeper").removeHandler(said)

    assert keep(Config(), work) == 0


@pytest.mark.parametrize("started", [False, True])
def test_an_engine_that_is_not_ready_is_killed(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    monkeypatch.setattr(keeping, "CLOSING_TIME", 1e6)
    stub_engine("exec sleep 1000000")

    async def work(keeper: EngineKeeper) -> None:
        await until(lambda: keeper._process or not started)

    assert keep(Config(), work) == 0


HANGS = "exec sleep 1000000"
WAITS = "while :; do read more || sleep 1000000; done"


@pytest.mark.parametrize("fails", [False, True], ids=["silent", "failed"])
def test_an_engine_that_owes_messages_and_sends_none_is_killed_and_started_again(
    stub_engine: Callable[[str], Path], caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    trace = stub_engine(f'echo >> "$trace"; [ $(wc -l < "$trace") -lt 2 ] || exit 3; {HANGS}')

    async def main() -> str | None:
        client = ZmqEngineClient()
        keeper = EngineKeeper(hosted(Config(server=ServerConfig(engine_timeout=0.5))), client)
        keeper.start()
        await until(lambda: keeper._process)
        client._take(INFO)
        stream = client.submit(ask("a", [5]))
        if fails:
            client._take(EngineFailed())
        await until(lambda: trace.exists() and trace.read_text().count("\n") >= 2)
        await keeper.stop()
        client.close()
        (end,) = [event async for event in stream]
        assert isinstance(end, Finished)
        return end.error

    assert asyncio.run(main()) == ENGINE_LOST
    assert "has sent nothing for 0." in caplog.text


@pytest.mark.skipif(not PROC.is_dir(), reason="processor time is read from /proc")
def test_an_engine_that_does_nothing_while_it_loads_is_killed_and_started_again(
    stub_engine: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = stub_engine(
        f'trap \'echo stacks >> "$trace"\' USR1; echo start >> "$trace"\n'
        f'[ $(grep -c start "$trace") -lt 2 ] || exit {EXIT_BAD_SETUP}; read config; {WAITS}'
    )
    said = lambda: trace.read_text().split() if trace.exists() else []  # noqa: E731
    used, send = itertools.count(), os.killpg

    def ticks(group: int) -> int:
        """An engine that waits for a processor, before it has begun or ended, does not hang."""
        return ticks_of_group(group) if said() == ["start"] else -next(used)

    def killpg(group: int, number: int) -> None:
        send(group, number)
        if number == signal.SIGUSR1:
            wait_until(lambda: "stacks" in said())

    monkeypatch.setattr(keeping, "ticks_of_group", ticks)
    monkeypatch.setattr(os, "killpg", killpg)
    assert keep(Config(server=ServerConfig(engine_timeout=0.5)), EngineKeeper.failed) == 1
    assert trace.read_text().split() == ["start", "stacks", "start"]
    assert "the engine is loading and has done nothing for 0." in caplog.text


@pytest.mark.parametrize("state", ["loading", "idle", "talking"])
def test_an_engine_that_owes_nothing_is_left_alone(
    stub_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    stub_engine(HANGS)
    monkeypatch.setattr(keeping, "CLOSING_TIME", 0.0)
    used = itertools.count()  # the loading one is at work
    monkeypatch.setattr(keeping, "ticks_of_group", lambda _: next(used))

    async def main() -> int:
        client = ZmqEngineClient()
        keeper = EngineKeeper(hosted(Config(server=ServerConfig(engine_timeout=0.08))), client)
        keeper.start()
        await until(lambda: keeper._process)
        if state != "loading":
            client._take(INFO)
        if state == "talking":
            client.submit(ask("a", [5]))
        for _ in range(20):
            client.num_heard += state == "talking"
            await asyncio.sleep(0.01)
        process = keeper._process
        assert process is not None
        assert process.returncode is None
        await keeper.stop()
        client.close()
        return keeper.exit_code

    assert asyncio.run(main()) == 0


@pytest.mark.parametrize(
    ("code", "was_ready"),
    [(errno.EMFILE, False), (errno.EMFILE, True), (errno.ENOENT, True), (None, True)],
    ids=["shortage-first", "shortage-later", "missing-later", "bad-setup-later"],
)
def test_an_engine_that_cannot_be_started_for_a_moment_is_started_later(
    stub_engine: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    code: int | None,
    was_ready: bool,
) -> None:
    """In the first moments of a server only a shortage is worth another try."""
    stub_engine(f"exit {EXIT_BAD_SETUP}")
    spawn, tries = keeping._spawn, 0

    async def starved(endpoint: str, role: Role | None) -> asyncio.subprocess.Process:
        nonlocal tries
        tries += 1
        if code is not None and tries < 3:
            raise OSError(code, os.strerror(code))
        return await spawn(endpoint, role)

    async def work(_: EngineKeeper) -> None:
        await until(lambda: tries >= 3)

    monkeypatch.setattr(keeping, "_spawn", starved)
    keep(Config(), work, was_ready=was_ready)
    assert tries >= 3
