"""Servers as processes: started, waited for, and stopped with all their children."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from benchmarks.peers.known import Server, Setting
from configs.env import environment
from server.measuring.answers import Endpoint, ask_all

POLL = 0.1  # seconds between questions whether a server is there
STOP = 20.0  # seconds for a server to end by itself
LAST_LINES = 15  # of its log, in messages


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def started(server: Server, setting: Setting, log: Path, patience: float) -> Iterator[Endpoint]:
    """The endpoint of a server, once it answers; stopped at the end.

    Args:
        log: gets its output.
        patience: seconds until it must answer.

    Raises:
        RuntimeError: it ended, or answers nothing; with the last lines of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            server.command(setting),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment(), **server.environment},
            start_new_session=True,  # so that its children can be stopped with it
        )
        try:
            yield _endpoint(server, process, setting.port, log, patience)
        finally:
            _stop(process)


def _endpoint(
    server: Server, process: subprocess.Popen[bytes], port: int, log: Path, patience: float
) -> Endpoint:
    url, reason, end = f"http://127.0.0.1:{port}/v1", "", time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{server.name} ended with {process.returncode}:\n{_tail(log)}")
        try:
            endpoint = Endpoint.discover(server.name, url, goes_on_by=server.goes_on_by)
            asyncio.run(ask_all(endpoint, ["Hello"], 1, 1))
            return endpoint
        except (httpx.HTTPError, ValueError, RuntimeError) as error:
            reason = str(error)  # it may still be loading
        time.sleep(POLL)
    raise RuntimeError(
        f"{server.name} gave no answer within {patience:.0f} s ({reason}):\n{_tail(log)}"
    )


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask, then kill; the group may outlive its first process."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP)
    with suppress(ProcessLookupError):  # the usual end: nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
