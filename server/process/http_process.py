"""The HTTP process: keeps the engine process running, answers on the port that the launcher has
opened, and drains when the launcher asks it to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from io import FileIO
from typing import TYPE_CHECKING

import uvloop

from configs.resolve import HostConfig
from configs.roles import role_counts
from server.http.admission.state import ServerState
from server.process.announcement import ready_text, warn_of_fallback
from server.process.channel.client import ZmqEngineClient
from server.process.channel.suspects import Suspects
from server.process.learning.learner import Learner
from server.process.roles.client import RolesClient
from server.process.roles.engines import RoleEngines
from server.process.setup.listening import address_of
from server.process.supervision.keeper import CLOSING_TIME, EngineKeeper
from server.process.supervision.supervisor import CRASHED, LauncherPipe

if TYPE_CHECKING:
    from server.http.context import ServerContext
    from server.http.engine_client import EngineClient
    from server.process.web import WebServer

logger = logging.getLogger(__name__)


def run_http_process(config: HostConfig, listener: socket.socket, pipe: FileIO) -> int:
    """Serve until the launcher asks through `pipe` to stop; returns the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(config, listener, LauncherPipe(pipe)))


async def _run(config: HostConfig, listener: socket.socket, launcher: LauncherPipe) -> int:
    stop = _stop_event(launcher)  # first of all: a signal may come at any time
    client, engine = _engines(config)
    engine.start()
    try:
        loading = asyncio.create_task(asyncio.to_thread(_web_server, config, client))
        await _first(stop.wait(), loading)
        if not stop.is_set():
            web = await loading
            try:
                await _answer(config, web, client, engine, listener, stop)
            except Exception:
                logger.exception("the HTTP process fails")
                return CRASHED
    finally:
        await engine.stop()
        client.close()
    return engine.exit_code


def _stop_event(launcher: LauncherPipe) -> asyncio.Event:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(stop.set)

    launcher.call_at_stop(ask)
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


def _web_server(config: HostConfig, client: EngineClient) -> WebServer:
    """The web server, while the engine loads: its modules and the tokenizer take a second."""
    from server.process.web import WebServer, build_app

    return WebServer(build_app(config, client))


async def _answer(
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
    learning = _start_learning(config, web.context, client)
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
            await asyncio.wait_for(asyncio.shield(running), CLOSING_TIME)
        last_resort()
    await running


def _start_learning(
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
    try:
        sys.stdout.write(ready_text(config, info, address_of(config.server, listener)))
        sys.stdout.flush()
    except OSError as error:  # nobody reads it any more
        logger.warning("standard output cannot be written to: %s", error)


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
