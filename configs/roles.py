"""How many engines have each role (`parallel.roles`)."""

from __future__ import annotations

from typing import NamedTuple

ROLES = ("prefill", "decode")
ROLES_AS = "write prefill:N,decode:M, as prefill:1,decode:1"
MAX_ENGINES = 16  # of a role


class RoleCounts(NamedTuple):
    """How many engines have each role."""

    prefill: int
    decode: int


def role_counts(text: str) -> RoleCounts:
    """The meaning of `parallel.roles`, such as `prefill:1,decode:1`.

    Raises:
        ValueError: a role is unknown, missing or there twice, or its number is not possible.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, colon, count = (piece.strip() for piece in part.partition(":"))
        if not colon or name not in ROLES:
            raise ValueError(f"{part!r} is no role: {ROLES_AS}")
        if name in found:
            raise ValueError(f"{name} is there twice")
        if not (count.isascii() and count.isdigit()) or not 1 <= int(count) <= MAX_ENGINES:
            raise ValueError(f"{name}:{count}: the number of engines is 1 to {MAX_ENGINES}")
        found[name] = int(count)
    for name in ROLES:
        if name not in found:
            raise ValueError(f"{name} is missing: {ROLES_AS}")
    return RoleCounts(**found)
