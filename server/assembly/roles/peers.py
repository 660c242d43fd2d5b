"""Joins an engine to those of the other role."""

from __future__ import annotations

from engine.kv.transfer import SharedMemory
from engine.runner.peers import TransferPeers, pages_of
from engine.runner.runner import ModelRunner
from server.assembly.roles.role import Role


def peers_of(role: Role, runner: ModelRunner) -> TransferPeers:
    """Joins a runner to the engines of the other role."""
    pages = pages_of(runner.kv, runner.proposer)
    num_places = 0 if role.computes_prompts else runner.kv.num_blocks
    return TransferPeers(SharedMemory(pages, role.areas, num_places), runner.proposer)
