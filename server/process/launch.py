"""The HTTP process: keeps an engine process running, answers on the port that the launcher has
opened, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from io import FileIO
from typing import TYPE_CHECKING, Any

import uvloop
import yaml

from configs.redact import redacted
from configs.resolve import HostConfig
from configs.roles import role_counts
from engine.messages import EngineInfo
from server.http.state import ServerState
from server.process.client import ZmqEngineClient
from server.process.keeper import LAST_WORDS, EngineKeeper
from server.process.learner import Learner
from server.process.listening import address_of, check_tls, open_listener
from server.process.logs import machine_line, set_up_logging
from server.process.open_files import raise_limit
from server.process.restarts import Restarts
from server.process.role_engines import RoleEngines
from server.process.roles import RolesClient
from server.process.socket_folder import remove_stale_folders
from server.process.supervisor import CRASHED, Leash, supervise
from server.process.suspects import Suspects

if TYPE_CHECKING:
    from server.http.context import ServerContext
    from server.http.engine_client import EngineClient
    from server.process.web import WebServer

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
    limit = Restarts(config.server.max_restarts) if config.server.restart_engine else None
    launcher = os.getpid()
    try:
        with contextlib.closing(listener):
            return supervise(lambda pipe: _serve_in_child(config, listener, pipe), limit)
    finally:
        if config.server.socket is not None and os.getpid() == launcher:
            config.server.socket.unlink(missing_ok=True)


def _serve_in_child(config: HostConfig, listener: socket.socket, pipe: FileIO) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, listener, Leash(pipe)))


async def _serve(config: HostConfig, listener: socket.socket, leash: Leash) -> int:
    stop = _stop_event(leash)  # first of all: a signal may come at any time
    client, engine = _engines(config)
    engine.start()
    try:
        preparing = asyncio.create_task(asyncio.to_thread(_prepare, config, client))
        await _first(stop.wait(), preparing)
        if not stop.is_set():
            web = await preparing
            try:
                await _run(config, web, client, engine, listener, stop)
            except Exception:
                logger.exception("the HTTP process fails")
                return CRASHED
    finally:
        await engine.stop()
        client.close()
    return engine.exit_code


def _stop_event(leash: Leash) -> asyncio.Event:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(stop.set)

    leash.call_at_stop(ask)
    return stop


def _engines(
    config: HostConfig,
) -> tuple[ZmqEngineClient | RolesClient, EngineKeeper | RoleEngines]:
    """The engine, or one for each role, and how requests come there."""
    if config.parallel.roles is not None:
        engines = RoleEngines(config, role_counts(config.parallel.roles))
        return engines.client, engines
    client = ZmqEngineClient(Suspects(config.server.refuse_suspects))
    return client, EngineKeeper(config, client)


def _prepare(config: HostConfig, client: EngineClient) -> WebServer:
    """The web server, while the engine loads: its modules and the tokenizer take a second."""
    from server.process.web import WebServer, build_app

    return WebServer(build_app(config, client))


async def _run(
    config: HostConfig,
    web: WebServer,
    client: ZmqEngineClient | RolesClient,
    engine: EngineKeeper | RoleEngines,
    listener: socket.socket,
    stop: asyncio.Event,
) -> None:
    """Answer requests until a signal comes or the engine cannot be restarted."""
    running = asyncio.create_task(web.serve(sockets=[listener]))
    announcing = asyncio.create_task(_announce(web.context, client, listener))
    learning = _learn(config, web.context, client)
    await _first(stop.wait(), engine.failed(), running)
    announcing.cancel()
    if learning is not None:
        learning.cancel()
    if stop.is_set():
        await _drain(web.context.state, config.server.drain_timeout, stop)
    await engine.stop()
    web.should_exit = True
    for last_resort in (web.drop_connections, web.stop_waiting):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(running), LAST_WORDS)
        last_resort()
    await running


def _learn(
    config: HostConfig, context: ServerContext, client: ZmqEngineClient | RolesClient
) -> asyncio.Task[None] | None:
    """Let the draft head learn, if the operator wants it."""
    if context.learning is None:
        return None
    assert isinstance(client, ZmqEngineClient), "the configuration refuses learning with roles"
    task = asyncio.create_task(Learner(config, client, context.learning).run())
    task.add_done_callback(_tell_of_failure)
    return task


def _tell_of_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the draft head learns no more, serving continues", exc_info=error)


async def _announce(
    context: ServerContext, client: ZmqEngineClient | RolesClient, listener: socket.socket
) -> None:
    """Print what is served, then where."""
    info = await client.wait_ready()
    warn_of_fallback(info)
    config = context.resolved_config()
    url = address_of(config.server, listener)
    facts: dict[str, Any] = {"config": redacted(config), "ops": info.ops_in_words}
    if not config.log.configuration and config.log.format == "text":
        facts = summary(config, info)
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
    text: str = yaml.safe_dump(facts, sort_keys=False, width=1000)
    return f"{text}READY {url}  (OpenAI base URL: {url}/v1)\n"


def summary(config: HostConfig, info: EngineInfo) -> dict[str, str]:
    """What somebody who starts a server wants to know first."""
    kernels = Counter(backend.name for backend in info.ops.values())
    drafts = [] if info.draft is None else [f"{info.draft.kind} head {info.draft.path}"]
    drafts += ["lookup"] if config.speculation.looks_up else []
    tree = f"; tree {config.speculation.tree}" if info.draft is not None else ""
    roles = {} if config.parallel.roles is None else {"engines": config.parallel.roles}
    return {
        "model": f"{config.model.served_name}, {info.max_model_len} tokens of context",
        "device": f"{info.device}, {config.kernels.threads} threads",
        "kernels": ", ".join(f"{name} ({count})" for name, count in kernels.most_common()),
        "drafts": (", ".join(drafts) or "none") + tree,
        **roles,
        "cache": f"{info.num_blocks * info.block_size} tokens",
        "more": "--verbose, /info, aerie config"
        + ("; a page to chat at /" if config.server.page else ""),
    }


def warn_of_fallback(info: EngineInfo) -> None:
    """Log why native kernels, which were to be used where possible, could not be had."""
    for fallback in dict.fromkeys(one for one in info.ops.values() if one.is_fallback):
        operations = ", ".join(name for name, backend in info.ops.items() if backend == fallback)
        logger.warning("slow kernels are used for %s: %s", operations, fallback)


async def _drain(state: ServerState, timeout: float, stop: asyncio.Event) -> None:
    """Refuse new requests and let open ones finish, up to `timeout` or a second signal."""
    state.start_draining()
    logger.info("draining: %d requests are open", state.num_open)
    stop.clear()
    await _first(state.wait_idle(), stop.wait(), asyncio.sleep(timeout))
    if state.num_open:
        logger.warning("%d requests did not finish in time", state.num_open)


async def _first(*awaitables: object) -> None:
    """Wait for the first to complete; cancel the other coroutines, but not the tasks."""
    own = [asyncio.ensure_future(a) for a in awaitables if asyncio.iscoroutine(a)]
    tasks = [a for a in awaitables if isinstance(a, asyncio.Task)]
    await asyncio.wait([*own, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in own:
        task.cancel()
