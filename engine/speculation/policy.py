"""How an engine drafts: all that changes when another draft head is put to use."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from engine.messages import DraftFacts
from engine.speculation.lookup import Lookup
from engine.speculation.planner import FixedPlanner, Planner, StepCosts


@dataclass(frozen=True, slots=True)
class Measuring:
    """Steps still to be run before trees can be chosen: made-up ones, one beside every real one."""

    steps: Generator[None, None, StepCosts]  # each `next` runs one; nothing may be in flight
    decide: Callable[[StepCosts], Planner]


@dataclass(frozen=True, slots=True)
class DraftPolicy:
    """Where drafts come from and who chooses their shape. The default drafts nothing."""

    planner: Planner = field(default_factory=FixedPlanner)
    lookahead: int = 0  # of the proposer, see `Proposer.lookahead`
    lookup: Lookup | None = None
    facts: DraftFacts | None = None  # of the draft head, if there is one
    measuring: Measuring | None = None  # until it is done, `planner` chooses
