"""How Ray Serve chooses an engine for a request."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

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
        # Requests that this front end has open, and where, by Ray's id of the call.
        self._open: dict[str, tuple[PendingRequest, ReplicaID]] = {}

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
        self._forget_cancelled()
        loads = {each.replica_id: self._load(each.replica_id) for each in free}
        chosen = self._policy.choose(loads, Target(route.chain, route.session))
        self._open[pending_request.metadata.internal_request_id] = pending_request, chosen
        return [[by_id[chosen]], [each for each in candidate_replicas if each.replica_id != chosen]]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        route = _route(pending_request)
        if route.request_id in self._places:  # this one aborts it
            return
        self._places[route.request_id] = replica_id
        self._open[pending_request.metadata.internal_request_id] = pending_request, replica_id
        self._policy.placed(Target(route.chain, route.session), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        pending, _ = self._open.pop(internal_request_id, (None, None))
        if pending is not None:
            self._places.pop(_route(pending).request_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._policy.keep([replica.replica_id for replica in replicas])

    def _forget_cancelled(self) -> None:
        """Ray tells the end of those alone that it has sent."""
        for name, (pending, _) in list(self._open.items()):
            if pending.future.cancelled():
                del self._open[name]

    def _load(self, replica_id: ReplicaID) -> int:
        """Open requests of a replica. Ray counts those of all front ends, but not yet the newest;
        this front end knows its own."""
        own: int = sum(place == replica_id for _, place in self._open.values())
        counted: int = self.replica_queue_len_cache.get(replica_id) or 0
        return max(own, counted)


def _route(pending: PendingRequest) -> Route:
    """The last argument of `EngineReplica.generate` and `abort`."""
    return decode_route(pending.args[-1])
