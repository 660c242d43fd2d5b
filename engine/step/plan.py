"""What every rank must do in one step (`StepPlan`), and what came out of it (`StepOutcome`).

Both are immutable and hold host integers only. A plan is its own wire form: follower ranks get it
as msgpack, and carry out the same values.
"""

from __future__ import annotations

import msgspec

from engine.messages import TokenLogprob
from engine.request import Request
from engine.step.shape import ROOT, DynamicShape, StaticShape

DRAFT, VERIFY, COMMIT = "draft", "verify", "commit"  # parts of a step that the host can time
STEP = "step"  # all of them together, where the device does not wait for the host

UNKNOWN = -1  # stands for a token that a step in flight draws


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters the running set and takes a line. `output_ids` is not empty when a
    preempted sequence comes back."""

    line: int
    request: Request
    output_ids: tuple[int, ...] = ()


class RowPlan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One sequence's part of the step.

    Tokens `token_ids` sit at positions `start .. start + len(token_ids) - 1`. The row's block table
    keeps its first `first_block` blocks as earlier plans gave them; `new_blocks` follow, and are
    the last. When `samples`, the last token is the newest of the sequence: it is the root of a
    draft tree, and a token is drawn after it. Up to `num_draft` nodes may hang below the root;
    slots for them follow the root's. `draft` holds their tokens where the scheduler knows them: a
    chain that it found in the text.
    """

    line: int  # stands for the sequence, from its admission to its release
    start: int
    token_ids: tuple[int, ...]
    first_block: int
    new_blocks: tuple[int, ...]
    samples: bool
    num_draft: int = 0
    draft: tuple[int, ...] = ()  # empty: the proposer chooses
    next_token: int = UNKNOWN  # the token that follows; known unless `samples`

    @property
    def num_blocks(self) -> int:
        return self.first_block + len(self.new_blocks)

    @property
    def is_drafted(self) -> bool:
        """Whether the proposer may draft for this row."""
        return self.num_draft > 0 and not self.draft


class StepPlan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Rows in batch order. `released` are lines whose sequences left the running set since the last
    plan (finished, aborted, preempted); they are free for the `admitted`.

    When `ahead`, the plan was made before the outcome of the last one was known, and is launched
    before that is collected. Its rows were in the last one. Their only token is `UNKNOWN`, `start`
    is the first position that it may get, and there are slots for the last such position."""

    rows: tuple[RowPlan, ...] = ()
    admitted: tuple[Admission, ...] = ()
    released: tuple[int, ...] = ()
    shape: StaticShape | DynamicShape = ROOT  # of the trees of this step; a row may cut its own
    ahead: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens and draft nodes."""
        return sum(len(row.token_ids) + row.num_draft for row in self.rows)

    @property
    def only_decodes(self) -> bool:
        """Whether every row has its root alone, so that the step computes no prompt."""
        return all(row.samples and len(row.token_ids) == 1 for row in self.rows)


class RowOutcome(msgspec.Struct, frozen=True, array_like=True):
    """What one row of the plan produced: accepted tokens and the bonus, nothing if it did not draw.

    `prompt_logprobs` covers the prompt tokens that this step predicted (positions start + 1 ..).
    """

    emitted: tuple[int, ...] = ()
    num_draft: int = 0  # nodes that were verified besides the root
    path: tuple[int, ...] = ()  # those of them that were accepted, from the root down
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


class StepOutcome(msgspec.Struct, frozen=True, array_like=True):
    """One `RowOutcome` per row of the plan, in the same order."""

    rows: tuple[RowOutcome, ...] = ()
    seconds: dict[str, float] = {}  # by part of the step, see `Laps`
    draft_faults: int = 0  # trees that were not grown for numbers that are not finite, since start
    draft_failed: bool = False  # the draft head broke down and is left alone
