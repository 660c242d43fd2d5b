"""The role of an engine among several."""

from __future__ import annotations

from typing import Literal

import msgspec


class Role(msgspec.Struct, frozen=True):
    """An engine's role; `areas`: handles of the memory that it shares with each engine of the other
    role, by its number."""

    kind: Literal["prefill", "decode"]
    areas: dict[int, int]

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
