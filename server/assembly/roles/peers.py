"""Joins an engine to those of the other role."""

from __future__ import annotations

from engine.kv.transfer import KVTransfer, SharedMemory
from engine.runner.peers import TransferPeers, pages_of
from engine.runner.runner import ModelRunner
from server.assembly.roles.role import Role


def peers_of(role: Role, runner: ModelRunner, timeout: float) -> TransferPeers:
    """Joins a runner to the engines of the other role. `timeout`: seconds that pages may take."""
    pages = pages_of(runner.kv, runner.proposer)
    num_places = 0 if role.computes_prompts else runner.kv.num_blocks
    transfer: KVTransfer
    if role.areas is not None:
        transfer = SharedMemory(pages, role.areas, num_places)
    else:
        from engine.kv.nixl_memory import NixlMemory

        transfer = NixlMemory(pages, role.number, role.num_peers, num_places, timeout)
    return TransferPeers(transfer, runner.proposer)
