"""One engine with its ranks, as a replica of Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator

from configs.host import this_host
from configs.resolve import HostConfig, resolve_host
from configs.schema import Config
from engine.messages import DraftSwapped, Finished
from server.process.channel.client import ZmqEngineClient
from server.process.setup.logs import set_up_logging
from server.process.supervision.keeper import EngineKeeper
from server.ray.messages import EngineStatus, Head, decode_request, encode

EXIT_ENGINE_ENDED = 1
NOT_READY = "the engine is not ready"

logger = logging.getLogger(__name__)


class EngineReplica:
    """An engine process and its followers. When the engine ends, so does this process: Ray Serve
    starts another replica, and requests go to others at once."""

    async def __init__(self, config: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """`config`: a `Config` as JSON. RuntimeError if the engine cannot start."""
        self._config = engine_config(config)
        set_up_logging(self._config.log)
        self._client = ZmqEngineClient()
        self._keeper = EngineKeeper(self._config, self._client)
        self._engine_id = uuid.uuid4().hex
        self._head = Head()
        self._swapping = asyncio.Lock()
        self._keeper.start()
        self._ended = asyncio.create_task(self._keeper.failed())
        ready = asyncio.create_task(self._client.wait_ready())
        await asyncio.wait((ready, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if self._client.info is None:
            ready.cancel()
            raise RuntimeError("the engine cannot start; the log of this replica says why")
        self._ended.add_done_callback(_end_process)

    async def generate(self, request: bytes, route: bytes) -> AsyncIterator[bytes]:
        """Batches of events of a request. The first batch is empty, and says that it is here."""
        wanted = decode_request(request)
        finished = False
        stream = self._client.submit(wanted)
        try:
            yield encode([])
            async for event in stream:
                finished = isinstance(event, Finished)
                yield encode([event])
        finally:
            if not finished:
                self._client.abort(wanted.request_id)

    async def abort(self, request_id: str, route: bytes) -> None:
        """End a request; its stream still gets its `Finished`."""
        self._client.abort(request_id)

    async def status(self) -> bytes:
        """The `EngineStatus`."""
        self.check_health()
        client = self._client
        assert client.info is not None
        return encode(EngineStatus(self._engine_id, client.info, client.stats, self._head))

    async def draft_with(self, version: float, path: str | None) -> bytes:
        """Draft with this head from now on, unless a newer choice is known. A `DraftSwapped`."""
        async with self._swapping:
            self.check_health()
            assert self._client.info is not None
            if version <= self._head.version:
                return encode(DraftSwapped("", self._client.info.draft))
            answer = await self._client.swap_draft(path)
            if answer.error is None:
                self._head = Head(version, path)
            return encode(answer)

    def check_health(self) -> None:
        """RuntimeError unless the engine takes requests: what /ready says of one server."""
        if self._client.info is None:
            raise RuntimeError(NOT_READY)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas depends on: see server/ray/scaling.py."""
        stats = self._client.stats
        if stats is None:
            return {"waiting": 0.0, "used": 0.0}
        rows = stats.num_running / self._config.scheduler.max_num_seqs
        return {"waiting": float(stats.num_waiting), "used": max(stats.kv_usage, rows)}

    async def __del__(self) -> None:
        """Ray Serve calls and awaits it once the replica has no requests left."""
        self._ended.remove_done_callback(_end_process)
        await self._keeper.stop()
        self._client.close()


def engine_config(config: str) -> HostConfig:
    """The configuration of a replica. Ray Serve restarts engines, so that nothing else may."""
    found = resolve_host(Config.model_validate_json(config), this_host())
    server = found.server.model_copy(update={"restart_engine": False})
    return found.model_copy(update={"server": server})


def _end_process(_: asyncio.Task[None]) -> None:
    logger.error("the engine has ended: this replica ends, too")
    logging.shutdown()
    os._exit(EXIT_ENGINE_ENDED)
