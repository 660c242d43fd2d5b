"""A follower rank that runs out of memory when a test asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tests.support.servers.start_up import with_start_up_code

KINDS: dict[str, type[Exception]] = {"host": MemoryError, "device": torch.OutOfMemoryError}


def starving(folder: Path, rank: int, wish: Path) -> Mapping[str, str]:
    """Environment of a server in which follower `rank` runs out of memory within its next step once
    the file `wish` names a kind of memory. `folder`: for the start-up code of Python."""
    program = (
        "import sys\n"
        f"if sys.orig_argv[3:5] == ['server.process.follower', '{rank}']:\n"
        "    from tests.support.ranks.starved_rank import starve\n"
        f"    starve({str(wish)!r})\n"
    )
    return with_start_up_code(folder, program)


def starve(wish: str) -> None:
    """Let a layer of this process fail between two collectives, once per wish."""
    from engine.models.layers import GatedMLP

    whole = GatedMLP.__call__

    def hungry(self: GatedMLP, *inputs: object) -> object:
        if Path(wish).exists():
            kind = KINDS[Path(wish).read_text(encoding="utf-8")]
            Path(wish).unlink()
            raise kind("no room for a test")
        return whole(self, *inputs)  # type: ignore[arg-type]

    GatedMLP.__call__ = hungry  # type: ignore[method-assign, assignment]
