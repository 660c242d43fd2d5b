"""What rank 0 tells the followers, and what they answer: packed integers, no pickles."""

from __future__ import annotations

import msgspec

from engine.request import Request


class RowFrame(msgspec.Struct, frozen=True, array_like=True):
    """A `RowPlan`. Blocks before `first_block` are as they were when the row was last sent."""

    line: int  # stands for the request, from its admission to its release
    start: int
    token_ids: list[int]
    first_block: int
    block_ids: list[int]
    samples: bool
    num_draft: int
    draft: tuple[int, ...]
    next_token: int | None


class AdmissionFrame(msgspec.Struct, frozen=True, array_like=True):
    line: int
    request: Request
    output_ids: tuple[int, ...]


class StaticFrame(msgspec.Struct, frozen=True, array_like=True, tag="static"):
    name: str
    parents: tuple[int, ...]


class DynamicFrame(msgspec.Struct, frozen=True, array_like=True, tag="dynamic"):
    name: str
    num_nodes: int
    max_depth: int
    top_k: int


class PlanFrame(msgspec.Struct, frozen=True, array_like=True, tag="plan"):
    """A `StepPlan`. Released lines are free for the admitted."""

    scratch: bool  # for the runner that measures a head, not the one that serves
    rows: list[RowFrame]
    admitted: list[AdmissionFrame]
    released: list[int]
    shape: StaticFrame | DynamicFrame | None  # None: that of the plan before


class LoadDraft(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """Load the head in this directory on a thread, and answer with `DraftLoaded`."""

    path: str


class UseDraft(msgspec.Struct, frozen=True, array_like=True, tag="use"):
    """Draft with the head that was loaded last, from the next plan on; not `loaded`: with none."""

    loaded: bool


class DropDraft(msgspec.Struct, frozen=True, array_like=True, tag="drop"):
    """Forget the head that was loaded last: another rank could not load it."""


class OpenScratch(msgspec.Struct, frozen=True, array_like=True, tag="scratch"):
    """Build the runner that measures the head that was loaded last, instead of an earlier one."""


class DraftLoaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    """A follower's answer; `error` says why the head cannot be used."""

    rank: int
    error: str | None


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Leave."""


Order = PlanFrame | LoadDraft | UseDraft | DropDraft | OpenScratch | Stop
