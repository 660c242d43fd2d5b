"""Processor time that the HTTP process uses for a token, for an engine that costs nothing.

A process of its own serves the whole application. At the other end of its socket, an engine
without a model sends the tokens of a text, for all requests at once in every step, as the real one
does. Only processor time of the HTTP process counts, so that other work of the machine disturbs
little.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import machine
from configs.host import host_config
from configs.resolve import HostConfig
from engine.messages import (
    Abort,
    ClientMessage,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Finished,
    OperationBackend,
    Shutdown,
    Submit,
    Tokens,
)
from engine.request import FinishReason, Request
from server.measuring.open_load import TEXT
from server.process.channel.client import ZmqEngineClient
from server.process.channel.wire import encode
from server.process.engine_process import EngineChannel
from server.process.launcher import SWITCH_INTERVAL
from server.process.setup.logs import set_up_logging
from server.process.setup.socket_folder import private_endpoint
from server.text.chat_codec import load_codec

PATIENCE = 120.0  # seconds for one answer
CHARACTERS = 20_000  # of the text that the engine says
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}

Route = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one kind, `streams` at a time."""

    model: str
    route: Route
    stream: bool
    streams: int
    requests: int
    tokens: int  # of each answer


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of processor time, median and extremes over the repeats."""

    load: Load
    per_token: tuple[float, float, float]
    per_request: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Pace:
    """How the engine speaks."""

    seconds: float  # from step to step
    tokens: int  # of each request in a step
    max_model_len: int = 8192


class SpokenEngine(threading.Thread):
    """Answers every request with a text, so many tokens in each step, until it is told to end."""

    def __init__(self, endpoint: str, text_ids: Sequence[int], pace: Pace) -> None:
        super().__init__(daemon=True)
        self._endpoint = endpoint
        self._ids = text_ids
        self._pace = pace
        self._said: dict[str, tuple[Request, int]] = {}  # requests and how many tokens they have
        self._num_steps = 0
        self._told_to_end = False

    def run(self) -> None:
        channel = EngineChannel(self._endpoint)
        channel.send(encode([_info(self._pace.max_model_len)]))
        due = time.perf_counter()
        while not self._told_to_end:
            for message in channel.receive(wait=not self._said, at_most=0.1):
                self.take(message)
            if self._said:
                due = max(due + self._pace.seconds, time.perf_counter())
                time.sleep(max(0.0, due - time.perf_counter()))
                channel.send(encode(self.step()))
        channel.close()

    def take(self, message: ClientMessage) -> None:
        """Begin or end a request, or all."""
        if isinstance(message, Submit):
            self._said |= {each.request_id: (each, 0) for each in message.requests()}
        elif isinstance(message, Abort):
            self._said.pop(message.request_id, None)
        self._told_to_end = isinstance(message, Shutdown)

    def step(self) -> list[EngineMessage]:
        """The next tokens of all requests, and statistics."""
        events: list[EngineMessage] = []
        for name, (request, count) in list(self._said.items()):
            end = min(count + self._pace.tokens, request.params.max_tokens)
            events.append(
                Tokens(name, [self._ids[at % len(self._ids)] for at in range(count, end)])
            )
            self._said[name] = (request, end)
            if end == request.params.max_tokens:
                del self._said[name]
                events.append(_finished(request, end))
        self._num_steps += 1
        rows = len(events)
        return [*events, EngineStats(rows, 0, 0.5, 0, 0, 0, self._num_steps, rows)]


def _info(max_model_len: int) -> EngineInfo:
    return EngineInfo(
        vocab_size=1 << 20,
        max_model_len=max_model_len,
        num_blocks=1024,
        block_size=16,
        hidden_size=4,
        eos_token_ids=[],
        ops={"linear": OperationBackend("none")},
        device="none",
    )


def _finished(request: Request, count: int) -> Finished:
    now = time.time()
    return Finished(
        request.request_id,
        FinishReason.LENGTH,
        len(request.prompt_ids),
        count,
        first_scheduled_time=now,
        first_token_time=now,
    )


@contextlib.contextmanager
def serving(config: HostConfig, pace: Pace) -> Iterator[tuple[int, int]]:
    """The process number and the port of an HTTP process with its engine."""
    codec = load_codec(config)
    text_ids = codec.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:CHARACTERS])
    spawning = multiprocessing.get_context("spawn")
    with private_endpoint() as endpoint, socket.create_server(("127.0.0.1", 0)) as listener:
        given = (config.model_dump_json(), endpoint, listener)
        process: BaseProcess = spawning.Process(target=serve, args=given, daemon=True)
        process.start()
        engine = SpokenEngine(endpoint, text_ids, pace)
        engine.start()
        try:
            assert process.pid is not None
            yield process.pid, listener.getsockname()[1]
        finally:
            process.terminate()
            process.join()


def serve(config: str, endpoint: str, listener: socket.socket) -> None:
    """The HTTP process, as server/process/http_process.py runs it."""
    settings = HostConfig.model_validate_json(config)
    set_up_logging(settings.log)
    sys.setswitchinterval(SWITCH_INTERVAL)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, endpoint, listener))


async def _serve(config: HostConfig, endpoint: str, listener: socket.socket) -> None:
    from server.process.web import WebServer, build_app

    client = ZmqEngineClient()
    web = WebServer(build_app(config, client))
    client.attach(endpoint)
    await client.wait_ready()
    await web.serve(sockets=[listener])


def processor_seconds(pid: int) -> float:
    """What a process has used: Linux' clock of all its threads, see clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


async def put_on(load: Load, port: int, prompts: Iterator[str]) -> None:
    """Send all requests of a load and read the answers; RuntimeError if one is not complete."""
    free = asyncio.Semaphore(load.streams)

    async def one() -> None:
        async with free:
            head, answer = await _ask(port, load, next(prompts))
            if not _is_complete(load, head, answer):
                raise RuntimeError(f"an answer is not complete: {head!r} {answer[-500:]!r}")

    await asyncio.wait_for(asyncio.gather(*(one() for _ in range(load.requests))), PATIENCE)


async def _ask(port: int, load: Load, prompt: str) -> tuple[bytes, bytes]:
    body = json.dumps(_body(load, prompt)).encode()
    head = (
        f"POST {PATHS[load.route]} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    found = await reader.read()
    writer.close()
    begin, _, rest = found.partition(b"\r\n\r\n")
    return begin, rest


def _body(load: Load, prompt: str) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": prompt}]}
    fields = asked if load.route == "chat" else {"prompt": prompt}
    sampling = {"max_tokens": load.tokens, "temperature": 0, "ignore_eos": True}
    return {**fields, **sampling, "model": load.model, "stream": load.stream}


def _is_complete(load: Load, head: bytes, answer: bytes) -> bool:
    end = b'"finish_reason":"length"' in answer
    return end and b" 200 " in head and (not load.stream or b"data: [DONE]\n\n" in answer)


def measure(load: Load, pid: int, port: int, repeats: int, prompts: Iterator[str]) -> Row:
    """A first run warms up."""
    seconds: list[float] = []
    for _ in range(1 + repeats):
        before = processor_seconds(pid)
        asyncio.run(put_on(load, port, prompts))
        seconds.append(processor_seconds(pid) - before)
    of_requests = [1000 * each / load.requests for each in seconds[1:]]
    return Row(load, _spread([each / load.tokens for each in of_requests]), _spread(of_requests))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    found = (statistics.median(values), min(values), max(values))
    return found[0], found[1], found[2]


def loads(model: str, streams: Sequence[int], tokens: int) -> list[Load]:
    """Streamed and whole answers of each route for every number of streams."""
    kinds: tuple[tuple[Route, bool], ...] = (
        ("chat", True),
        ("completion", True),
        ("chat", False),
    )
    return [
        Load(model, route, stream, count, max(8, 3 * count), tokens)
        for (route, stream), count in itertools.product(kinds, streams)
    ]


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
    ] = None,
    streams: Annotated[list[int] | None, typer.Option(min=1, help="At a time.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 128,
    step_ms: Annotated[float, typer.Option(help="From step to step of the engine.")] = 10.0,
    step_tokens: Annotated[int, typer.Option(min=1, help="Of each request in a step.")] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    only: Annotated[str, typer.Option(help="Loads whose name begins so.")] = "",
    output: Annotated[Path, typer.Option(help="JSON of the results.")] = Path(
        "benchmarks/out/http-process.json"
    ),
) -> None:
    """Measure the processor time of the HTTP process."""
    config, pace = host_config(None, overrides or ()), Pace(step_ms / 1000, step_tokens)
    prompts = (f"Tell me of the white rabbit, part {number}." for number in itertools.count())
    before = machine.load()
    served = config.model.served_name
    assert served is not None
    every = loads(served, streams or (1, 8, 32), tokens)
    planned = [each for each in every if name(each).startswith(only)]
    with serving(config, pace) as (pid, port):
        rows = [measure(each, pid, port, repeats, prompts) for each in planned]
    show(rows)
    content = {
        "benchmark": "http_process",
        **machine.facts(),
        "pace": asdict(pace),
        "repeats": repeats,
        "rows": [asdict(row) for row in rows],
        "load": [before, machine.load()],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")


def name(load: Load) -> str:
    """Of the kind of its requests, for people."""
    return f"{load.route}, {'streamed' if load.stream else 'whole'}"


def show(rows: Sequence[Row]) -> None:
    """The table."""
    table = Table("answers", "at a time", "ms per token", "ms per request")
    for row in rows:
        cells = [
            f"{median:.3f} ({low:.3f} to {high:.3f})"
            for median, low, high in (row.per_token, row.per_request)
        ]
        table.add_row(name(row.load), str(row.load.streams), *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
