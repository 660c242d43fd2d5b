"""The engine processes of a server with roles, and the memory that they share."""

from __future__ import annotations

import asyncio
import os

from configs.resolve import HostConfig, shared_out
from configs.roles import RoleCounts
from server.assembly.roles.role import Role
from server.process.channel.client import ZmqEngineClient
from server.process.channel.suspects import Suspects
from server.process.roles.client import RolesClient
from server.process.supervision.keeper import EngineKeeper


class RoleEngines:
    """Starts and keeps them, as `EngineKeeper` does one."""

    def __init__(self, config: HostConfig, counts: RoleCounts) -> None:
        """OSError if there is no shared memory."""
        self._areas: dict[tuple[int, int], int] | None = None
        if config.parallel.transfer == "shared_memory":
            # One for each pair, which outlives the engines.
            self._areas = {
                (prefill, decode): os.memfd_create(f"aerie-pages-{prefill}-{decode}")
                for prefill in range(counts.prefill)
                for decode in range(counts.decode)
            }
        prefill = [
            Role("prefill", number, counts.decode, self._of(0, number))
            for number in range(counts.prefill)
        ]
        decode = [
            Role("decode", number, counts.prefill, self._of(1, number))
            for number in range(counts.decode)
        ]
        own = shared_out(config, sum(counts))
        # A request goes on at another engine, so what was running at two deaths may have ended two.
        suspects = Suspects(config.server.refuse_suspects)
        clients = [ZmqEngineClient(suspects) for _ in range(sum(counts))]
        self.client = RolesClient(clients[: counts.prefill], clients[counts.prefill :])
        self._keepers = [
            EngineKeeper(own, client, role)
            for client, role in zip(clients, (*prefill, *decode), strict=True)
        ]

    @property
    def exit_code(self) -> int:
        return max(keeper.exit_code for keeper in self._keepers)

    def start(self) -> None:
        for keeper in self._keepers:
            keeper.start()

    async def failed(self) -> None:
        """Return when an engine has ended for good."""
        tasks = [asyncio.create_task(keeper.failed()) for keeper in self._keepers]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def stop(self) -> None:
        """End all engines, and with them all open requests."""
        await asyncio.gather(*(keeper.stop() for keeper in self._keepers))
        for area in (self._areas or {}).values():
            os.close(area)
        self._areas = None

    def _of(self, side: int, number: int) -> dict[int, int] | None:
        """The areas of an engine, by the number of the other one."""
        if self._areas is None:
            return None
        return {pair[1 - side]: area for pair, area in self._areas.items() if pair[side] == number}
