"""What every rank must do in one step (`StepPlan`), and the result (`StepOutcome`).

Both are immutable and hold only host values. Follower ranks get the plan itself, as msgpack.
"""

from __future__ import annotations

import msgspec

from engine.messages import DraftNodes, DraftState, TokenLogprob
from engine.request import Request
from engine.step.shape import ROOT, DynamicShape, StaticShape

DRAFT, VERIFY, COMMIT = "draft", "verify", "commit"  # parts of a step that the host can time
STEP = "step"  # all parts together, for an asynchronous device

UNKNOWN = -1  # stands for a token that a step in flight draws


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters the running set and takes a line. `output_ids` is not empty if the
    sequence was preempted before, or comes from another engine; then `draft` is what a head may
    know of it."""

    line: int
    request: Request
    output_ids: tuple[int, ...] = ()
    draft: DraftState | None = None


class RowPlan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One sequence's part of the step.

    Tokens `token_ids` are at positions `start .. start + len(token_ids) - 1`. The row's block table
    is its first `first_block` blocks, from earlier plans, then `new_blocks`. If `samples`, the last
    token is the newest of the sequence: it is the root of a draft tree, and a token is drawn after
    it. Up to `num_draft` nodes may be below the root; their slots follow the root's. `draft` holds
    their tokens if the scheduler knows them: a chain that it found in the text.
    """

    line: int  # identifies the sequence, from its admission to its release
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

    If `ahead`, the plan was made before the outcome of the last one was known, and is launched
    before that one is collected. Its rows were in the last plan. Their only token is `UNKNOWN`,
    `start` is the smallest position that it may have, and there are slots up to the largest."""

    rows: tuple[RowPlan, ...] = ()
    admitted: tuple[Admission, ...] = ()
    released: tuple[int, ...] = ()
    shape: StaticShape | DynamicShape = ROOT  # of the step's trees; a row's tree may be cut
    ahead: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens and draft nodes."""
        return sum(len(row.token_ids) + row.num_draft for row in self.rows)

    @property
    def is_drafted(self) -> bool:
        """Whether the proposer may draft for any row."""
        return any(row.is_drafted for row in self.rows)

    @property
    def only_decodes(self) -> bool:
        """Whether every row's only token is its root, so that the step computes no prompt."""
        return all(row.samples and len(row.token_ids) == 1 for row in self.rows)


class RowOutcome(msgspec.Struct, frozen=True, array_like=True):
    """The result of one row: accepted tokens and the bonus token; nothing if it did not sample.

    `prompt_logprobs` covers the prompt tokens that this step predicted (positions start + 1 ..).
    `unsound`: the model's logits have a NaN or +inf, or nothing finite, at the node that the walk
    came to, or at a prompt token that was to be scored. Then there is no bonus token, and the
    request cannot go on. `nodes`: those of the verified tree, for a request with a trace. `pooled`:
    the sum of the hidden states of the row's tokens, float32 [H], if the request wants it.
    """

    emitted: tuple[int, ...] = ()
    num_draft: int = 0  # verified nodes besides the root
    path: tuple[int, ...] = ()  # accepted nodes, from the root down
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    unsound: bool = False
    nodes: DraftNodes | None = None
    pooled: bytes | None = None


class StepOutcome(msgspec.Struct, frozen=True, array_like=True):
    """One `RowOutcome` per row of the plan, in the same order."""

    rows: tuple[RowOutcome, ...] = ()
    seconds: dict[str, float] = {}  # by part of the step, see `Laps`
    draft_faults: int = 0  # trees not grown because the head's outputs were not finite, in total
    draft_failed: bool = False  # the draft head has failed and is no longer used
