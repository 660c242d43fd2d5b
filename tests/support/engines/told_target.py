"""Sampling through the whole step, with a target whose logits are given in advance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from engine.kv.storage import KVStorage
from engine.request import Request
from engine.runner.runner import ModelRunner, RunnerParts, StepSettings
from engine.speculation.proposer import Drafted, DraftLimits, RootProposer, Roots
from engine.step import batch
from engine.step.batch import ForwardBatch, ForwardContext
from engine.step.executor import execute
from engine.step.group import TPGroup
from engine.step.plan import Admission, RowPlan, StepPlan
from engine.step.shape import TreeShape, chain
from engine.step.tree import DraftTree
from kernels.ops import Ops
from kernels.sampling.settings import DrawSettings, LogitEdits
from tests.support.drafts.scripted_proposer import tree_of

BLOCK = 1 << 16  # slots: all rows share one block, since nothing is stored in it


@dataclass(frozen=True)
class Text:
    """A sequence that draws. `tree`: parents and tokens of the nodes below its newest token."""

    request: Request
    output: Sequence[int] = ()
    tree: tuple[Sequence[int], Sequence[int]] = ((-1,), (0,))
    skipped: int = 0  # unknown positions before the newest token

    @property
    def num_nodes(self) -> int:
        return len(self.tree[0])

    @property
    def root(self) -> int:
        """Position of the newest token."""
        return len(self.request.prompt_ids) + len(self.output) + self.skipped - 1


@dataclass
class Sampled:
    """Inputs and results of the sampler, for all nodes of all texts in order."""

    logits: Tensor  # [R, V] before any edit
    edited: Tensor | None = None  # [R, V]; None: nothing was edited
    edits: LogitEdits | None = None
    settings: DrawSettings | None = None
    drawn: list[int] = field(default_factory=list)

    @property
    def after_edits(self) -> Tensor:
        return self.logits if self.edited is None else self.edited


def sample(
    ops: Ops,
    texts: Sequence[Text],
    logits: Tensor,
    *,
    eos: Sequence[int] = (),
    exact: bool = True,
) -> Sampled:
    """Run one step over `texts`; node r of all of them gets logits[r]."""
    num_nodes, vocab_size = logits.shape
    assert num_nodes == sum(text.num_nodes for text in texts)
    seen = Sampled(logits)

    def edit_logits(raw: Tensor, edits: LogitEdits) -> Tensor:
        edited = ops.edit_logits(raw, edits)
        seen.edits, seen.edited = _kept(edits), edited[:num_nodes]
        return edited

    def draw(edited: Tensor, settings: DrawSettings) -> Tensor:
        drawn = ops.draw(edited, settings)
        seen.settings, seen.drawn = settings, drawn[:num_nodes].tolist()
        return drawn

    pages = torch.empty(2, BLOCK, 1, 1)
    kv = KVStorage((pages,), (torch.empty_like(pages),))
    spied = replace(ops, edit_logits=edit_logits, draw=draw)
    parts = RunnerParts(
        model=ToldTarget(logits),
        context=ForwardContext(spied, kv, TPGroup()),
        proposer=ToldTrees(texts),
        vocab_size=vocab_size,
        eos_token_ids=frozenset(eos),
        max_num_seqs=len(texts),
        max_len=BLOCK - 64,
        steps=StepSettings(exact=exact),
    )
    with patch.object(batch, "LOGIT_ROWS", 10**6):  # the spies see all nodes at once
        execute(ModelRunner(parts), plan_of(texts))
    return seen


def _kept(edits: LogitEdits) -> LogitEdits:
    """A copy of the current edits: the step later counts its draws into them."""
    penalties = edits.penalties
    if penalties is None:
        return edits
    return replace(edits, penalties=replace(penalties, counts=penalties.counts.clone()))


def plan_of(texts: Sequence[Text]) -> StepPlan:
    """The step in which every text draws."""
    return StepPlan(
        rows=tuple(_row(line, text) for line, text in enumerate(texts)),
        admitted=tuple(
            Admission(line, text.request, tuple(text.output)) for line, text in enumerate(texts)
        ),
        shape=chain(max(text.num_nodes for text in texts) - 1),
    )


def _row(line: int, text: Text) -> RowPlan:
    return RowPlan(
        line=line,
        start=text.root,
        token_ids=(text.tree[1][0],),
        first_block=0,
        new_blocks=(0,),
        samples=True,
        num_draft=text.num_nodes - 1,
    )


@dataclass(frozen=True)
class ToldTarget:
    """Implements `TargetModel`: token t of the step has logits[t]."""

    told: Tensor
    attention_chunk: ClassVar[None] = None

    def forward(self, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        return torch.arange(len(batch.token_ids))[:, None]

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return self.told[hidden[:, 0].clamp(max=len(self.told) - 1)]


@dataclass
class ToldTrees(RootProposer):
    """The trees of the texts."""

    texts: Sequence[Text]

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        count = len(roots.tokens)
        padding = [((-1,), (0,))] * (count - len(self.texts))
        tree: DraftTree = tree_of([*(text.tree for text in self.texts), *padding])
        return Drafted(tree, torch.zeros(count, dtype=torch.bool))
