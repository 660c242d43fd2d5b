"""How a front end spreads requests over engines, without a cluster."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings(action="ignore"):  # Ray uses what its libraries deprecate
    pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

from server.ray.messages import Route, encode
from server.ray.router import EngineRouter

pytestmark = pytest.mark.ray
ENGINES: list[Any] = [SimpleNamespace(replica_id=name) for name in "ab"]


class Router(EngineRouter):
    """`counted`: the open requests of engines that Ray knows of."""

    def __init__(self, **counted: int) -> None:
        self.counted = counted
        self.initialize_state(routing="prefix", bound=1.5, num_blocks=10)

    @property
    def replica_queue_len_cache(self) -> Any:
        return self.counted

    def select_available_replicas(self, candidates: list[Any] | None = None) -> list[Any]:
        return candidates or []


def request(number: int) -> Any:
    return SimpleNamespace(
        args=[b"", encode(Route(f"r{number}"))],
        metadata=SimpleNamespace(internal_request_id=f"call {number}"),
        future=asyncio.get_running_loop().create_future(),
    )


async def place(router: Router, pending: Any) -> str:
    """Where the request goes first."""
    (first,), _ = await router.choose_replicas(ENGINES, pending)
    return str(first.replica_id)


def test_requests_that_come_together_are_spread() -> None:
    """Ray counts none of them before all are routed."""

    async def places() -> list[str]:
        router = Router()
        return [await place(router, request(number)) for number in range(6)]

    assert sorted(asyncio.run(places())) == ["a"] * 3 + ["b"] * 3


def test_ended_and_cancelled_requests_are_not_counted_and_those_of_other_front_ends_are() -> None:
    async def run() -> None:
        router = Router()
        pending = [request(number) for number in range(2)]
        first, second = [await place(router, each) for each in pending]
        router.on_request_routed(pending[0], ENGINES[0].replica_id, None)
        router.on_request_completed(ENGINES[0].replica_id, "call 0")
        pending[1].future.cancel()
        assert {first, second} == {"a", "b"}
        router.counted = {"a": 3}
        assert [await place(router, request(number)) for number in range(2, 5)] == ["b"] * 3
        assert len(router._open) == 3

    asyncio.run(run())
