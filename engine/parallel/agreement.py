"""What ranks settle before they serve: sizes, and whether all of them can."""

from __future__ import annotations

import torch

from engine.step.group import TPGroup

MAX_REASON = 2048  # bytes


class RefusedByAllError(ValueError):
    """A rank cannot serve, and all of them know."""


def smallest(value: int, group: TPGroup) -> int:
    """The least of the ranks' values."""
    return int(group.stack(torch.tensor(value)).min())


def check_all(error: str | None, group: TPGroup) -> None:
    """Raise on every rank if one of them has an `error`: RefusedByAllError with the first."""
    text = (error or "").encode()[:MAX_REASON]
    line = torch.zeros(MAX_REASON, dtype=torch.uint8)
    line[: len(text)] = torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)[: len(text)]
    for rank, other in enumerate(group.stack(line)):
        reason = bytes(other.tolist()).rstrip(b"\0").decode(errors="replace")
        if reason:
            raise RefusedByAllError(reason if rank == 0 else f"rank {rank}: {reason}")
