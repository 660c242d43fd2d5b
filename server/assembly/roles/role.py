"""The role of an engine among several."""

from __future__ import annotations

import importlib.util
from typing import Literal

import msgspec

from configs.schema import ParallelConfig

NIXL_MISSING = 'parallel.transfer is nixl, which is not installed: pip install "aerie[nixl]"'


class Role(msgspec.Struct, frozen=True):
    """An engine's role; `areas`: handles of the memory that it shares with each engine of the other
    role, by its number; None if they share none."""

    kind: Literal["prefill", "decode"]
    number: int  # among those of its role
    num_peers: int  # engines of the other role
    areas: dict[int, int] | None

    @property
    def computes_prompts(self) -> bool:
        """Whether it does so for other engines."""
        return self.kind == "prefill"

    def to_text(self) -> str:
        """For the command line of the engine's process."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_text(cls, text: str) -> Role:
        return msgspec.json.decode(text, type=cls)


def check_transfer(config: ParallelConfig) -> None:
    """ValueError if engines with roles cannot reach each other as configured."""
    if config.roles is None or config.transfer != "nixl":
        return
    if importlib.util.find_spec("nixl") is None:
        raise ValueError(NIXL_MISSING)
