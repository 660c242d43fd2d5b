"""How an engine drafts: everything that changes with the draft head."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from engine.messages import DraftFacts
from engine.speculation.costs import StepCosts
from engine.speculation.lookup import Lookup
from engine.speculation.planner import FixedPlanner, Planner


@dataclass(frozen=True, slots=True)
class Measuring:
    """Made-up steps to run before trees can be chosen: one before every real step."""

    steps: Generator[None, None, StepCosts]  # each `next` runs one; nothing may be in flight
    decide: Callable[[StepCosts], Planner]


@dataclass(frozen=True, slots=True)
class DraftPolicy:
    """Where drafts come from and what chooses their shape. The default drafts nothing."""

    planner: Planner = field(default_factory=FixedPlanner)
    lookahead: int = 0  # of the proposer, see `Proposer.lookahead`
    lookup: Lookup | None = None
    facts: DraftFacts | None = None  # of the draft head, if there is one
    measuring: Measuring | None = None  # `planner` chooses until it is done
