"""How Ray Serve chooses an engine for a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable
from typing import Any, NamedTuple

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.ray.messages import Route, decode_route
from server.routing.policies import Policy, Routing, Target, policy_of


class EngineRouter(RequestRouter):
    """Asks a policy. Aborts go to the replica that has the request."""

    def initialize_state(self, **settings: Any) -> None:
        """Called by Ray Serve with `request_router_kwargs`."""
        routing: Routing = settings["routing"]
        self._policy: Policy[Hashable] = policy_of(
            routing, settings["bound"], settings["num_blocks"]
        )
        self._places: dict[str, ReplicaID] = {}  # by request id
        self._open: dict[str, _Open] = {}  # by Ray's id of the call

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The chosen replica, then all others, should it refuse."""
        if pending_request is None:
            return [candidate_replicas]
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        route = _route(pending_request)
        place = self._places.get(route.request_id)
        if place is not None:
            return [[by_id[place]]] if place in by_id else [candidate_replicas]
        free = self.select_available_replicas(candidate_replicas) or candidate_replicas
        loads = self._loads([each.replica_id for each in free])
        chosen = self._policy.choose(loads, Target(route.chain, route.session))
        self._keep(pending_request, route, chosen)
        return [[by_id[chosen]], [each for each in candidate_replicas if each.replica_id != chosen]]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        route = _route(pending_request)
        if route.request_id in self._places:  # this one aborts it
            return
        self._places[route.request_id] = replica_id
        self._keep(pending_request, route, replica_id)
        self._policy.placed(Target(route.chain, route.session), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        ended = self._open.pop(internal_request_id, None)
        if ended is not None:
            self._places.pop(ended.request_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._policy.keep([replica.replica_id for replica in replicas])

    def _keep(self, pending: PendingRequest, route: Route, place: ReplicaID) -> None:
        name = pending.metadata.internal_request_id
        self._open[name] = _Open(route.request_id, pending.future, place)

    def _loads(self, replica_ids: list[ReplicaID]) -> dict[Hashable, int]:
        """Open requests of replicas. Ray counts those of all front ends, but not yet the newest;
        this front end knows its own."""
        own = self._count_own()
        known = self.replica_queue_len_cache
        return {each: max(own[each], known.get(each) or 0) for each in replica_ids}

    def _count_own(self) -> Counter[ReplicaID]:
        """Ray tells the end of those alone that it has sent: the cancelled ones are left to us."""
        cancelled = [name for name, each in self._open.items() if each.choosing.cancelled()]
        for name in cancelled:
            del self._open[name]
        return Counter(each.place for each in self._open.values())


class _Open(NamedTuple):
    """A request of this front end that has not ended. `choosing`: Ray's choice of its replica."""

    request_id: str
    choosing: asyncio.Future[RunningReplica]
    place: ReplicaID


def _route(pending: PendingRequest) -> Route:
    """The last argument of `EngineReplica.generate` and `abort`."""
    return decode_route(pending.args[-1])
