"""Upper limits of measured values, and whether they were kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar: a measured value and its upper limit."""

    name: str
    at_most: float
    value: float | None  # None: could not be measured

    @property
    def kept(self) -> bool | None:
        return None if self.value is None else self.value <= self.at_most

    def line(self) -> str:
        word = {None: "NO VALUE", True: "kept", False: "MISSED"}[self.kept]
        value = "" if self.value is None else f"{self.value:.2f}"
        return f"{word:8}  {value:>8}  at most {self.at_most:<6.2f}  {self.name}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"kept": self.kept}


def as_json(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    return [verdict.as_json() for verdict in verdicts]


def from_json(found: dict[str, Any]) -> Verdict:
    return Verdict(found["name"], found["at_most"], found["value"])
