"""What every rank must do this step (`StepPlan`), and what came out of it (`StepOutcome`).

Both hold host integers only, so that a plan can be broadcast to follower ranks as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import TokenLogprob
from engine.request import Request
from engine.step.shape import ROOT, TreeShape

DRAFT, VERIFY, COMMIT = "draft", "verify", "commit"  # parts of a step
ROUND = "round"  # all of them, in one go on the device

UNKNOWN = -1  # stands for a token that a step in flight draws


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence enters the running set: what the sampler has to know about it.

    `output_ids` is not empty when a preempted sequence comes back.
    """

    request: Request
    output_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One sequence's part of the step.

    Tokens `token_ids` sit at positions `start .. start + len(token_ids) - 1`; their KV goes to
    the slots of the same index in `block_ids`. When `samples`, the last of them is the newest
    token of the sequence (the root of its draft tree) and a token is drawn behind it. Up to
    `num_draft` nodes may hang below the root; slots for them follow the root's. Those of `draft`
    are known already: a chain that the scheduler found in the text.
    """

    request_id: str
    start: int
    token_ids: list[int]
    block_ids: list[int]
    samples: bool
    num_draft: int = 0
    draft: tuple[int, ...] = ()  # tokens of the nodes; empty: the proposer's choice
    next_token: int | None = None  # the token behind, when it is known already (not samples)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows in batch order. `admitted` are new or resumed rows, `released` rows that left the
    running set since the last plan (finished, aborted, preempted).

    When `ahead`, the plan was made before the outcome of the last one was known, and is to be
    launched before that is collected. Its rows were in the last one. Their only token is `UNKNOWN`,
    `start` is the first position it may get, and slots are there for the last."""

    rows: tuple[RowPlan, ...] = ()
    admitted: tuple[Admission, ...] = ()
    released: tuple[str, ...] = ()
    shape: TreeShape = ROOT  # of the trees of this step; a row may cut its own
    ahead: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens and draft nodes."""
        return sum(len(row.token_ids) + row.num_draft for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What one row of the plan produced: accepted tokens + bonus, empty when nothing was drawn.

    `prompt_logprobs` covers the prompt tokens that this step predicted (positions start + 1 ..).
    """

    emitted: tuple[int, ...] = ()
    num_draft: int = 0  # nodes that were verified besides the root
    path: tuple[int, ...] = ()  # those of them that were accepted, from the root down
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """One `RowOutcome` per row of the plan, in the same order."""

    rows: tuple[RowOutcome, ...] = field(default_factory=tuple)
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the step, see `Laps`
    draft_faults: int = 0  # of the proposer, since its start
    draft_failed: bool = False
