"""Which running sequence gives way when blocks or lines are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

from engine.request import Sequence


def choose_victim(running: Rows[Sequence]) -> Sequence:
    """Who is preempted so that others can grow: one of the largest priority; of these, one of the
    client that holds most blocks; of these, the least important. It is never the most important
    sequence of all, unless that runs alone: so one always makes progress.

    Args:
        running: the most important first; not empty.
    """
    return _of_heaviest_client(running[1:] or running, running)


def choose_outranked(running: Rows[Sequence], priority: int, num_blocks: int) -> Sequence | None:
    """Who is preempted so that a waiting sequence of this priority can start, which lacks
    `num_blocks`; None if no running one has a larger priority, or these hold fewer blocks."""
    if not running or running[-1].rank[0] <= priority:
        return None
    held = sum(len(seq.block_ids) for seq in running if seq.rank[0] > priority)
    return _of_heaviest_client(running, running) if held >= num_blocks else None


def _of_heaviest_client(candidates: Rows[Sequence], running: Rows[Sequence]) -> Sequence:
    held: Counter[str] = Counter()
    for seq in running:
        held[seq.request.client] += len(seq.block_ids)
    return max(candidates, key=lambda seq: (seq.rank[0], held[seq.request.client], seq.rank))
