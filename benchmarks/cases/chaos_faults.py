"""What `benchmarks.chaos` does to a running server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.cases.chaos_traffic import MODEL, Traffic
from server.process.supervision.process_table import children_of
from tests.support.servers.live_server import LiveServer, command_line, post

STOPPED = 15.0  # seconds that the engine stands still
SHORTAGE = 6.0  # seconds that files, disk or memory are short
CLIENTS = 24  # bad clients at a time


@dataclass(frozen=True)
class Scene:
    """What faults act on."""

    server: LiveServer
    traffic: Traffic
    luck: random.Random
    notes: list[str]  # what a fault measured


Fault = Callable[[Scene], Awaitable[None]]


async def kill_engine(scene: Scene) -> None:
    os.kill(scene.server.engine_pid, signal.SIGKILL)
    await asyncio.sleep(3)


async def kill_rank(scene: Scene) -> None:
    (rank,) = followers(scene.server.engine_pid)
    os.kill(rank, signal.SIGKILL)
    await asyncio.sleep(3)


def followers(engine: int) -> list[int]:
    """The other ranks of an engine."""
    return [pid for pid in children_of(engine) if "follower" in command_line(pid)]


async def kill_helpers(scene: Scene) -> None:
    """Processes that compile grammars or render templates, where there are any."""
    parents = scene.server.http_pid, scene.server.engine_pid
    for pid in [pid for parent in parents for pid in children_of(parent)]:
        if "_process" in command_line(pid) and "engine_process" not in command_line(pid):
            scene.notes.append(f"killed: {command_line(pid).split()[-1]}")
            os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(2)


async def kill_http(scene: Scene) -> None:
    with breaking(scene):
        os.kill(scene.server.http_pid, signal.SIGKILL)
        await asyncio.sleep(3)
        await scene.traffic.pause()


async def stop_engine(scene: Scene) -> None:
    """All processes of the engine stand still."""
    leader = scene.server.engine_pid
    group = [leader, *children_of(leader)]
    for pid in group:
        os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(STOPPED)
    for pid in group:
        os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(2)


async def disk_full(scene: Scene) -> None:
    """Nothing can be written to any file; at times the engine must start so."""
    pids = [scene.server.pid, scene.server.http_pid, scene.server.engine_pid]
    with limited(pids, resource.RLIMIT_FSIZE, lambda _: 0):
        await asyncio.sleep(1)
        if scene.luck.random() < 0.5:
            scene.notes.append("the engine started while the disk was full")
            os.kill(scene.server.engine_pid, signal.SIGKILL)
        await asyncio.sleep(SHORTAGE)
    for pid in (scene.server.http_pid, *engine_of(scene)):  # those started meanwhile
        soft_limit(pid, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)


async def no_descriptors(scene: Scene) -> None:
    """The HTTP process can open no further file, while more connections come."""
    pid = scene.server.http_pid
    with breaking(scene), contextlib.ExitStack() as open_ones:
        with limited([pid], resource.RLIMIT_NOFILE, lambda pid: num_files(pid) + 1):
            for _ in range(CLIENTS):
                open_ones.enter_context(connection(scene))
            await asyncio.sleep(SHORTAGE)
        open_ones.close()
        await scene.traffic.pause()


async def no_memory(scene: Scene) -> None:
    """The engine, or the HTTP process, gets no more memory."""
    of_engine = scene.luck.random() < 0.7
    pid = scene.server.engine_pid if of_engine else scene.server.http_pid
    scene.notes.append("memory of the engine" if of_engine else "memory of the HTTP process")
    with breaking(scene), limited([pid], resource.RLIMIT_AS, address_space):
        await asyncio.sleep(SHORTAGE)
        await scene.traffic.pause()
    for pid in (*engine_of(scene), scene.server.http_pid):
        soft_limit(pid, resource.RLIMIT_AS, resource.RLIM_INFINITY)


async def stalled_readers(scene: Scene) -> None:
    """Clients that read nothing of long answers, longer than `server.write_timeout`."""
    body = {"model": MODEL, "prompt": "the", "max_tokens": 600, "stream": True, "logprobs": 5}
    raw = json.dumps(body | {"n": 4, "ignore_eos": True}).encode()
    with contextlib.ExitStack() as open_ones:
        for _ in range(CLIENTS // 4):
            with contextlib.suppress(OSError):
                open_ones.enter_context(post(scene.server.url, "/v1/completions", raw))
        await asyncio.sleep(8)


async def slow_heads(scene: Scene) -> None:
    """Clients that send a request byte by byte, and never all of it."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-" + b"a" * 100
    with contextlib.ExitStack() as open_ones:
        slow = [open_ones.enter_context(connection(scene)) for _ in range(CLIENTS)]
        for at in range(12):
            for client in slow:
                with contextlib.suppress(OSError):
                    client.send(head[at * 8 : at * 8 + 8])
            await asyncio.sleep(0.4)


async def disconnects(scene: Scene) -> None:
    """Clients that leave, by a reset, at any time after their request."""
    body = json.dumps({"model": MODEL, "prompt": "the", "max_tokens": 400, "stream": True})
    for _ in range(CLIENTS * 2):
        with contextlib.suppress(OSError):
            client = post(scene.server.url, "/v1/completions", body.encode())
            await asyncio.sleep(scene.luck.random() * 0.1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0] + [0] * 4))
            client.close()


@contextlib.contextmanager
def breaking(scene: Scene) -> Iterator[None]:
    """Connections may break inside."""
    scene.traffic.may_break = True
    try:
        yield
    finally:
        scene.traffic.may_break = False


@contextlib.contextmanager
def limited(pids: list[int], kind: int, limit: Callable[[int], int]) -> Iterator[None]:
    """A soft limit of processes, for a while."""
    before = {pid: resource.prlimit(pid, kind)[0] for pid in pids}
    for pid in pids:
        soft_limit(pid, kind, limit(pid))
    try:
        yield
    finally:
        for pid in pids:
            soft_limit(pid, kind, before[pid])


def soft_limit(pid: int, kind: int, limit: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        _, hard = resource.prlimit(pid, kind)
        resource.prlimit(pid, kind, (hard if limit == resource.RLIM_INFINITY else limit, hard))


def engine_of(scene: Scene) -> list[int]:
    """The engine process, if there is one now."""
    with contextlib.suppress(ValueError):
        return [scene.server.engine_pid]
    return []


def num_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def address_space(pid: int) -> int:
    """Bytes of a process, and one MiB more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize() + 2**20


def connection(scene: Scene) -> socket.socket:
    address = urlsplit(scene.server.url)
    assert address.hostname is not None
    assert address.port is not None
    return socket.create_connection((address.hostname, address.port), timeout=5)


FAULTS: dict[str, Fault] = {
    "engine killed": kill_engine,
    "rank killed": kill_rank,
    "helper processes killed": kill_helpers,
    "HTTP process killed": kill_http,
    "engine stopped for 15 s": stop_engine,
    "disk full": disk_full,
    "no descriptors": no_descriptors,
    "no memory": no_memory,
    "clients that do not read": stalled_readers,
    "slow heads": slow_heads,
    "disconnects": disconnects,
}
