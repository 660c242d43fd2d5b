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
import ssl
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
import yaml
from fastapi import FastAPI

from configs.files import check_regular
from configs.redact import redacted
from configs.resolve import HostConfig
from configs.schema import ServerConfig
from engine.messages import EngineInfo
from server.http.app import create_app
from server.http.connections import Connections
from server.http.context import ServerContext, ServerInfo, with_engine_facts
from server.http.protocol import protocol_with
from server.openai.routes import ROUTES
from server.process.client import ZmqEngineClient
from server.process.keeper import LAST_WORDS, EngineKeeper
from server.process.loaded import spare_loaded
from server.process.logs import machine_line, set_up_logging
from server.process.open_files import connection_limit, raise_limit
from server.process.socket_folder import remove_stale_folders
from server.text.chat_codec import load_codec

SWITCH_INTERVAL = 0.001  # seconds that other threads keep the event loop waiting

logger = logging.getLogger(__name__)


def serve(config: HostConfig) -> int:
    """Run the server until it is told to stop; returns the exit code.

    Raises:
        OSError, ValueError: the port, the model's files or the API keys cannot be used.
    """
    set_up_logging(config.log)
    sys.setswitchinterval(SWITCH_INTERVAL)
    raise_limit()
    remove_stale_folders()
    check_tls(config.server)
    listener = open_listener(config.server)
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        with contextlib.closing(listener), runner:
            return runner.run(_serve(config, listener))
    finally:
        if config.server.socket is not None:
            config.server.socket.unlink(missing_ok=True)


def check_tls(config: ServerConfig) -> None:
    """ValueError, naming the files, if they hold no certificate and its key."""
    files = f"server.tls_certificate {config.tls_certificate}, server.tls_key {config.tls_key}"
    if config.tls_certificate is None or config.tls_key is None:
        if config.tls_certificate is not config.tls_key:
            raise ValueError(f"{files}: set both, or none of them")
        return
    try:
        for path in (config.tls_certificate, config.tls_key):
            check_regular(path)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.tls_certificate, config.tls_key, password=""
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{files}: {error}") from error


def open_listener(config: ServerConfig) -> socket.socket:
    """A socket that listens where the configuration says. OSError, naming the place, when it cannot
    be opened."""
    if config.socket is None:
        return open_port(config.host, config.port)
    return open_unix_socket(config.socket)


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket. OSError, naming the address, when it cannot be opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = f"{host}:{port} (server.host, server.port)"
    return _listening(family, (host, port), place)


def open_unix_socket(path: Path) -> socket.socket:
    """A listening Unix socket; one that nobody listens on any more is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()
    return _listening(socket.AF_UNIX, str(path), f"{path} (server.socket)")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _listening(family: int, address: tuple[str, int] | str, place: str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {place}: {reason}") from error
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
            spare_loaded()
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
    context: ServerContext = app.state.context
    settings = context.config.server
    configured = protocol_with(settings, lambda: context.state.draining)
    protocol: Any = functools.partial(configured, limit=limit)
    return uvicorn.Config(
        app,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
    )


async def _announce(config: HostConfig, client: ZmqEngineClient, listener: socket.socket) -> None:
    """Print the resolved configuration, then where the server can be reached."""
    info = await client.wait_ready()
    warn_of_fallback(info)
    resolved = redacted(with_engine_facts(config, info))
    url = address_of(config.server, listener)
    facts = {"config": resolved, "ops": info.ops_in_words}
    try:
        sys.stdout.write(announcement(facts, url, config.log.format))
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


def address_of(config: ServerConfig, listener: socket.socket) -> str:
    """The URL by which clients reach the server."""
    scheme = "http" if config.tls_certificate is None else "https"
    if config.socket is not None:
        return f"{scheme}+unix://{config.socket}{config.root_path}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{config.root_path}"


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
