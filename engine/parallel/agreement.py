"""What ranks agree on before they serve: sizes, and whether every rank can serve."""

from __future__ import annotations

import torch

from engine.step.group import TPGroup

MAX_REASON = 2048  # bytes


class RefusedByAllError(ValueError):
    """A rank cannot serve; every rank raises this."""


def smallest(value: int, group: TPGroup) -> int:
    """The smallest of the ranks' values."""
    return int(group.stack(torch.tensor(value)).min())


def check_all(error: str | None, group: TPGroup) -> None:
    """Raise RefusedByAllError on every rank if one has an `error`, with the first rank's error."""
    text = (error or "").encode()[:MAX_REASON]
    line = torch.zeros(MAX_REASON, dtype=torch.uint8)
    line[: len(text)] = torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)[: len(text)]
    for rank, other in enumerate(group.stack(line)):
        reason = bytes(other.tolist()).rstrip(b"\0").decode(errors="replace")
        if reason:
            raise RefusedByAllError(reason if rank == 0 else f"rank {rank}: {reason}")
