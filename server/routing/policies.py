"""Policies that choose one of several engines for a request.

A policy is told the loads, chooses, and is told where the request went. It knows nothing of
networks or processes, so that servers and simulations use the same one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

Routing = Literal["prefix", "round_robin"]
Engine = TypeVar("Engine", bound=Hashable)
MAX_SESSIONS = 100_000


@dataclass(frozen=True, slots=True)
class Target:
    """What a policy may know of a request."""

    chain: Sequence[Hashable] = ()  # chained hashes of the full blocks of its prompt
    session: Hashable = ""  # requests with the same one belong together; "": none


class Policy(Protocol[Engine]):
    """Chooses engines for requests."""

    def choose(self, loads: Mapping[Engine, float], target: Target) -> Engine:
        """One of the engines in `loads`, which must not be empty; loads are open requests."""
        ...

    def placed(self, target: Target, engine: Engine) -> None:
        """The request went to this engine."""
        ...

    def keep(self, engines: Sequence[Engine]) -> None:
        """Forget all engines but these."""
        ...


class RoundRobin(Generic[Engine]):
    """One engine after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, loads: Mapping[Engine, float], target: Target) -> Engine:
        engines = list(loads)
        self._turn = (self._turn + 1) % len(engines)
        return engines[self._turn]

    def placed(self, target: Target, engine: Engine) -> None:
        """Nothing depends on it."""

    def keep(self, engines: Sequence[Engine]) -> None:
        """Nothing is kept."""


class PrefixAffinity(Generic[Engine]):
    """The engine that computed most of the prompt before, or the session's; never one that has
    more than its share of the load.

    Which blocks an engine has is a guess from what was sent to it: the newest `num_blocks`, as its
    prefix cache keeps them. A wrong guess costs prompt tokens that are computed again.

    Args:
        bound: an engine is passed over if the request made its load more than `bound` times the
            mean (consistent hashing with bounded loads, arXiv:1608.01350).
        num_blocks: that one engine's cache holds.
    """

    def __init__(self, bound: float = 1.5, num_blocks: int = 100_000) -> None:
        self._bound = bound
        self._num_blocks = num_blocks
        self._blocks: dict[Engine, OrderedDict[Hashable, None]] = {}  # least recently sent first
        self._holders: dict[Hashable, dict[Engine, None]] = {}
        self._sessions: OrderedDict[Hashable, Engine] = OrderedDict()

    def choose(self, loads: Mapping[Engine, float], target: Target) -> Engine:
        limit = math.ceil(self._bound * (sum(loads.values()) + 1) / len(loads))
        if target.session in self._sessions:
            engine = self._sessions[target.session]
            if loads.get(engine, limit) < limit:
                return engine
        for content in reversed(target.chain[: self._depth(target.chain)]):
            holders = [each for each in self._holders[content] if loads.get(each, limit) < limit]
            if holders:
                return min(holders, key=loads.__getitem__)
        return min(loads, key=lambda each: (loads[each], len(self._blocks.get(each, ()))))

    def placed(self, target: Target, engine: Engine) -> None:
        blocks = self._blocks.setdefault(engine, OrderedDict())
        for content in reversed(target.chain):  # caches evict the ends of prefixes first
            if content in blocks:
                blocks.move_to_end(content)
            else:
                blocks[content] = None
                self._holders.setdefault(content, {})[engine] = None
        while len(blocks) > self._num_blocks:
            self._unhold(blocks.popitem(last=False)[0], engine)
        if target.session:
            self._sessions.pop(target.session, None)
            self._sessions[target.session] = engine
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def keep(self, engines: Sequence[Engine]) -> None:
        for engine in set(self._blocks) - set(engines):
            for content in self._blocks.pop(engine):
                self._unhold(content, engine)

    def _depth(self, chain: Sequence[Hashable]) -> int:
        """How many leading blocks some engine has."""
        known = self._holders
        return next((i for i, content in enumerate(chain) if content not in known), len(chain))

    def _unhold(self, content: Hashable, engine: Engine) -> None:
        holders = self._holders[content]
        del holders[engine]
        if not holders:
            del self._holders[content]


def policy_of(routing: Routing, bound: float, num_blocks: int) -> Policy[Hashable]:
    """The policy of this name."""
    if routing == "round_robin":
        return RoundRobin()
    return PrefixAffinity(bound, num_blocks)
