"""Keeps an engine process running: starts it, watches it, and starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
import time

import zmq

from configs.env import engine_environment
from configs.redact import without_secrets
from configs.resolve import HostConfig
from engine.messages import ErrorCode
from engine.progress import report
from server.assembly.roles.role import Role
from server.assembly.running_requests import marks_in
from server.process import engine_process
from server.process.channel.client import ENGINE_LOST, ZmqEngineClient
from server.process.engine_process import EXIT_BAD_SETUP, STOPPING
from server.process.setup.socket_folder import folder_of, private_endpoint
from server.process.supervision.process_table import ticks_of_group
from server.process.supervision.restarts import Restarts

CLOSING_TIME = 2.0  # seconds for connections to close after the engine has ended every request
GROUP_POLL = 0.02  # seconds between looks at what an ended engine has left
WATCH_POLL = 1.0  # seconds between looks at a running engine
STACKS_TIME = 0.2  # seconds for an engine to write where it hangs
FAILED_END = 10.0  # seconds for the process of a failed engine to end
HAS_SENT_NOTHING = "has work and has sent nothing"
# What a machine may lack for a moment.
SHORTAGES = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.ENOBUFS,
    errno.ENOSPC,
    errno.EDQUOT,
}

logger = logging.getLogger(__name__)


class EngineKeeper:
    """Starts the engine process, ends it when it hangs, and restarts it when it has ended."""

    def __init__(
        self, config: HostConfig, client: ZmqEngineClient, role: Role | None = None
    ) -> None:
        """`role`: among engines that hand prompts over."""
        self._config = config
        self._client = client
        self._role = role
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._was_ever_ready = False
        self._restarts = Restarts(config.server.max_restarts)
        self.exit_code = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep())

    async def failed(self) -> None:
        """Return when the engine has ended for good."""
        assert self._task is not None
        await asyncio.wait({self._task})

    async def stop(self) -> None:
        """End the engine, and with it all open requests."""
        self._stopping.set()
        if self._task is None:
            return
        if self._client.info is None:
            self._kill()  # it has no requests, and reads no messages while loading
        self._client.shut_down()
        try:
            await asyncio.wait_for(asyncio.shield(self._task), CLOSING_TIME)
        except TimeoutError:
            self._kill()
            await self._task

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _keep(self) -> None:
        while not self._stopping.is_set():
            served, may_go_on = await self._try_once()
            if self._stopping.is_set():
                return
            pause = self._pause_after(served) if may_go_on else None
            if pause is None:
                self.exit_code = 1
                return
            logger.info("starting the engine again in %.1f s", pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            self._client.num_restarts += 1

    def _pause_after(self, served: float) -> float | None:
        """Seconds before the next start; None if there must be none."""
        if not self._config.server.restart_engine:
            return None
        pause = self._restarts.died(served)
        if pause is None:
            logger.error(
                "the engine was started again %d times in a row (server.max_restarts): the server "
                "ends",
                self._config.server.max_restarts,
            )
        return pause

    async def _try_once(self) -> tuple[float, bool]:
        """Run one engine to its end, if it can be started. Returns for how many seconds it was
        ready, and whether another may be started."""
        try:
            code, served = await self._run_once()
        except (OSError, zmq.ZMQError) as error:
            if not self._stopping.is_set():
                logger.error("the engine process cannot be started: %s", error)
            return 0.0, self._was_ever_ready or error.errno in SHORTAGES
        if not self._stopping.is_set():
            logger.error("the engine process ended with exit code %d", code)
        # What was set up well once may lack memory, files or a disk now, and get them back.
        return served, code != EXIT_BAD_SETUP or self._was_ever_ready

    async def _run_once(self) -> tuple[int, float]:
        """Run one engine to its end; return its exit code and for how many seconds it was ready.

        Raises:
            OSError, zmq.ZMQError: its process or socket cannot be created.
        """
        with private_endpoint() as endpoint:
            try:
                self._client.attach(endpoint)
                report("starting the engine")
                self._process = process = await _spawn(endpoint, self._role)
                code = await self._run_to_end(process)
            finally:
                served = self._client.served
                self._was_ever_ready |= self._client.was_ready
                if self._stopping.is_set():
                    self._client.detach(STOPPING, ErrorCode.STOPPING)
                else:
                    self._client.suspect(marks_in(folder_of(endpoint)))
                    self._client.detach(ENGINE_LOST)
            await end_group(process.pid)
            return code, served

    async def _run_to_end(self, process: asyncio.subprocess.Process) -> int:
        """Tell the engine its configuration; return its exit code once it has ended."""
        if self._stopping.is_set():
            self._kill()
        assert process.stdin is not None
        process.stdin.write(without_secrets(self._config).model_dump_json().encode() + b"\n")
        watching = asyncio.create_task(self._watch(process))
        try:
            return await process.wait()
        finally:
            watching.cancel()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that gives no sign of life for `server.engine_timeout` seconds. When it
        owes messages, these are the signs; while it loads, the processor time that it uses.

        Only time in which this process could have heard it counts: both may have been stopped.
        """
        client, limit = self._client, self._config.server.engine_timeout
        poll = min(WATCH_POLL, limit / 4)
        silence, sign = 0.0, self._sign_of_life(process)
        while silence < (min(FAILED_END, limit) if client.has_failed else limit):
            began = time.monotonic()
            await asyncio.sleep(poll)
            before, sign = sign, self._sign_of_life(process)
            if sign != before or not (client.awaits_engine or client.is_loading):
                silence = 0.0
            else:
                silence += min(time.monotonic() - began, 2 * poll)
        logger.error(
            "the engine %s for %.1f s (server.engine_timeout): it is killed",
            "is loading and has done nothing" if client.is_loading else HAS_SENT_NOTHING,
            silence,
        )
        await self._kill_with_stacks(process)

    def _sign_of_life(self, process: asyncio.subprocess.Process) -> tuple[int, int]:
        ticks = ticks_of_group(process.pid) if self._client.is_loading else 0
        return self._client.num_heard, ticks

    async def _kill_with_stacks(self, process: asyncio.subprocess.Process) -> None:
        """Kill the engine, after its ranks have told the log where they hang, if they can."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGUSR1)
        await asyncio.sleep(STACKS_TIME)
        self._kill()


async def end_group(leader: int) -> None:
    """Kill the remaining processes of an ended leader's group: its children end with it, unless
    they are stopped or hang."""
    end = time.monotonic() + CLOSING_TIME
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            with contextlib.suppress(ChildProcessError):  # as PID 1 of a container, we inherit them
                os.waitpid(-leader, os.WNOHANG)
            os.killpg(leader, 0)
            await asyncio.sleep(GROUP_POLL)
        logger.warning("processes of the engine do not end with it: they are killed")
        os.killpg(leader, signal.SIGKILL)


async def _spawn(endpoint: str, role: Role | None) -> asyncio.subprocess.Process:
    """Start an engine process. OSError, naming the program, when it cannot be started."""
    program = sys.executable
    told = [] if role is None else [role.to_text()]
    areas = None if role is None else role.areas
    try:
        return await asyncio.create_subprocess_exec(
            *(program, "-P", "-m", engine_process.__name__, endpoint, *told),
            pass_fds=() if areas is None else tuple(areas.values()),
            stdin=asyncio.subprocess.PIPE,
            env=engine_environment(),
            start_new_session=True,  # this process handles a terminal's Ctrl-C
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"{program}: {reason}") from error
