"""The HTTP process: opens the port at once, keeps an engine process running, and drains on
SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn
import uvloop
import yaml
from fastapi import FastAPI

from configs.redact import redacted
from configs.resolve import HostConfig
from configs.schema import ServerConfig
from engine.messages import EngineInfo
from server.http.app import create_app
from server.http.connections import Connections
from server.http.context import ServerContext, ServerInfo, with_engine_facts
from server.http.protocol import HttpProtocol
from server.openai.routes import ROUTES
from server.process.client import ZmqEngineClient
from server.process.keeper import LAST_WORDS, EngineKeeper
from server.process.logs import machine_line, set_up_logging
from server.process.open_files import connection_limit, raise_limit
from server.process.socket_folder import remove_stale_folders
from server.text.chat_codec import load_codec

logger = logging.getLogger(__name__)


def serve(config: HostConfig) -> int:
    """Run the server until it is told to stop; returns the exit code.

    Raises:
        OSError, ValueError: the port, the model's files or the API keys cannot be used.
    """
    set_up_logging(config.log)
    raise_limit()
    remove_stale_folders()
    listener = open_port(config.server.host, config.server.port)
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with contextlib.closing(listener), runner:
        return runner.run(_serve(config, listener))


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket. OSError, naming the address, when it cannot be opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"cannot listen on {host}:{port} (server.host, server.port): {reason}"
        ) from error
    return listener


async def _serve(config: HostConfig, listener: socket.socket) -> int:
    stop = _stop_signals()  # first of all: as PID 1 of a container no other handler exists
    client = ZmqEngineClient()
    engine = EngineKeeper(config, client)
    engine.start()  # loads the model while this process loads the tokenizer
    try:
        text = asyncio.create_task(asyncio.to_thread(load_codec, config))
        await _first(stop.wait(), text)
        if not stop.is_set():
            codec = await text
            info = ServerInfo.from_config(config, codec.defaults)
            app = create_app(config, client, codec.tokenizer, codec.template, info, ROUTES)
            await _run(config, app, client, engine, listener, stop)
    finally:
        await engine.stop()
        client.close()
    return engine.exit_code


async def _run(
    config: HostConfig,
    app: FastAPI,
    client: ZmqEngineClient,
    engine: EngineKeeper,
    listener: socket.socket,
    stop: asyncio.Event,
) -> None:
    """Answer requests until a signal comes or the engine cannot be restarted."""
    web = _WebServer(web_config(app, _limit(config.server, app.state.context)))
    running = asyncio.create_task(web.serve(sockets=[listener]))
    announcing = asyncio.create_task(_announce(config, client, listener))
    await _first(stop.wait(), engine.failed(), running)
    announcing.cancel()
    if stop.is_set():
        await _drain(app.state.context, config.server.drain_timeout, stop)
    await engine.stop()
    web.should_exit = True
    for last_resort in (web.drop_connections, web.stop_waiting):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(running), LAST_WORDS)
        last_resort()
    await running


def _limit(config: ServerConfig, context: ServerContext) -> Connections:
    most = connection_limit(config.max_connections)
    return Connections(most, config.retry_after, context.metrics)


def web_config(app: FastAPI, limit: Connections | None = None) -> uvicorn.Config:
    """How uvicorn serves `app`, with at most so many connections."""
    protocol: Any = functools.partial(HttpProtocol, limit=limit)
    return uvicorn.Config(
        app, http=protocol, ws="none", log_config=None, access_log=False, lifespan="on"
    )


async def _announce(config: HostConfig, client: ZmqEngineClient, listener: socket.socket) -> None:
    """Print the resolved configuration, then where the server can be reached."""
    info = await client.wait_ready()
    warn_of_fallback(info)
    resolved = redacted(with_engine_facts(config, info))
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    facts = {"config": resolved, "ops": info.ops_in_words}
    try:
        sys.stdout.write(announcement(facts, f"http://{host}:{port}", config.log.format))
        sys.stdout.flush()
    except OSError as error:  # nobody reads it any more
        logger.warning("standard output cannot be written to: %s", error)


def announcement(facts: Mapping[str, Any], url: str, form: str) -> str:
    """What standard output gets once the server is ready; `form` is `log.format`."""
    if form == "json":
        places = {"url": url, "openai_base_url": f"{url}/v1"}
        return machine_line("configuration", facts) + machine_line("ready", places)
    text: str = yaml.safe_dump(facts, sort_keys=False)
    return f"{text}READY {url}  (OpenAI base URL: {url}/v1)\n"


def warn_of_fallback(info: EngineInfo) -> None:
    """Log why native kernels, which were to be used where possible, could not be had."""
    for fallback in dict.fromkeys(one for one in info.ops.values() if one.is_fallback):
        operations = ", ".join(name for name, backend in info.ops.items() if backend == fallback)
        logger.warning("slow kernels are used for %s: %s", operations, fallback)


async def _drain(context: ServerContext, timeout: float, stop: asyncio.Event) -> None:
    """Refuse new requests and let open ones finish, up to `timeout` or a second signal."""
    context.state.start_draining()
    logger.info("draining: %d requests are open", context.state.num_open)
    stop.clear()
    await _first(context.state.wait_idle(), stop.wait(), asyncio.sleep(timeout))
    if context.state.num_open:
        logger.warning("%d requests did not finish in time", context.state.num_open)


async def _first(*awaitables: object) -> None:
    """Wait for the first to complete; cancel the other coroutines, but not the tasks."""
    own = [asyncio.ensure_future(a) for a in awaitables if asyncio.iscoroutine(a)]
    tasks = [a for a in awaitables if isinstance(a, asyncio.Task)]
    await asyncio.wait([*own, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in own:
        task.cancel()


def _stop_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


class _WebServer(uvicorn.Server):
    """uvicorn without its own signal handlers: the server drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def drop_connections(self) -> None:
        """Abort connections of clients that do not read their responses."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def stop_waiting(self) -> None:
        self.force_exit = True
