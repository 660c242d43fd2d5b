"""The loss of a batch over all unrolled steps, and estimates of acceptance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.train.head.head_kernels import IN_TORCH, HeadKernels
from drafter.train.head.losses import CROSS_ENTROPY, TokenLoss, feature_distance, token_loss
from drafter.train.head.network import DraftNetwork
from drafter.train.head.sampled import SampledDrafts, TargetDraws
from drafter.train.head.unroll import (
    TrainBatch,
    UnrolledStep,
    UnrolledStepPlan,
    UnrollPlan,
    plan_unrolling,
    unroll,
)
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the loss's parts and steps."""

    num_steps: int  # unrolled steps
    decay: float = 0.8  # step j has weight decay ** j (EAGLE-3)
    tokens: float = 1.0  # loss against the target's distribution
    features: float = 0.0  # smooth L1 against the target's features (EAGLE-1)
    kind: TokenLoss = CROSS_ENTROPY


@dataclass(slots=True)
class Tally:
    """Sums over answer tokens, per step [L] float64, to be added over batches and processes."""

    loss: Tensor  # against the target's distribution, of the kind that is trained with
    num: Tensor  # tokens to predict
    correct: Tensor  # drafts that are the target's likeliest token
    chained: Tensor  # correct drafts for which all drafts before are correct, too
    distance: Tensor  # to the target's features
    chains: Tensor  # tokens to predict for which all drafts before are answer tokens
    drawn: Tensor  # chained drafts at temperature 1, with shared noise; only of measurements

    @classmethod
    def zeros(cls, num_steps: int, device: torch.device) -> Tally:
        return cls(*(torch.zeros(num_steps, dtype=torch.float64, device=device) for _ in range(7)))

    @classmethod
    def of(cls, numbers: Tensor) -> Tally:
        """Of the sums one after the other, [7 L], in the order of `tensors`."""
        return cls(*numbers.view(7, -1))

    def add(self, other: Tally) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs

    def tensors(self) -> tuple[Tensor, ...]:
        counts = self.num, self.correct, self.chained
        return self.loss, *counts, self.distance, self.chains, self.drawn

    @property
    def accuracy(self) -> list[float]:
        """Share of correct drafts of each step."""
        return [round(float(x), 4) for x in self.correct / self.num.clamp(min=1)]

    @property
    def acceptance_length(self) -> float:
        """Tokens per greedy verify step that a chain of L drafts would emit, the bonus counted."""
        return 1 + float((self.chained / self.chains.clamp(min=1)).sum())

    @property
    def sampled_acceptance_length(self) -> float:
        """The same at temperature 1."""
        return 1 + float((self.drawn / self.chains.clamp(min=1)).sum())


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the target gives at the M places before answer tokens."""

    hidden: Tensor  # [M, H], after the final norm
    best: Tensor  # [M] int64, its likeliest next token
    is_draft: (
        Tensor  # [M] bool: that one is in the draft vocabulary, which is all the teacher knows
    )
    teacher: Tensor  # [M, Vd], from `RowLoss.teacher`
    draws: TargetDraws | None = None  # at temperature 1


class Objective:
    """The loss of a network against its target."""

    def __init__(
        self,
        network: DraftNetwork,
        target_head: Tensor,
        target_ids: Tensor | None,
        weights: LossWeights,
        dtype: torch.dtype,
        kernels: HeadKernels = IN_TORCH,
        ops: Ops | None = None,
    ) -> None:
        """`target_head` [V, H]: the target's LM head. `target_ids` [Vd]: the draft vocabulary.
        `dtype`: type of matrix products. `ops`: to measure drafts at temperature 1, too."""
        self.network = network
        self.weights = weights
        self.kernels = kernels
        network.choose_attention(kernels.attend)
        self._dtype = dtype
        size = len(target_head)
        ids = torch.arange(size, device=target_head.device) if target_ids is None else target_ids
        self._target_ids = ids
        self._teacher_head = (target_head if target_ids is None else target_head[ids]).to(dtype)
        self._is_draft = torch.zeros(size, dtype=torch.bool, device=ids.device)
        self._is_draft[ids] = True
        self._sampled = None if ops is None else SampledDrafts(ops, target_head, ids, dtype)

    def __call__(self, batch: TrainBatch) -> tuple[Tensor, Tally]:
        """The loss summed over answer tokens (not divided by their number), and the sums."""
        return self._over_steps(batch, None)

    @torch.no_grad()
    def measure(self, batch: TrainBatch) -> Tally:
        """The sums, drafts at temperature 1 included."""
        return self._over_steps(batch, self._sampled)[1]

    def _over_steps(self, batch: TrainBatch, sampled: SampledDrafts | None) -> tuple[Tensor, Tally]:
        device = batch.token_ids.device
        plan = plan_unrolling(batch, self.weights.num_steps)
        tally = Tally.zeros(self.weights.num_steps, device)
        total = torch.zeros((), device=device)
        wanted = self._wanted(batch, plan, sampled)
        inside = torch.ones_like(plan.steps[0].counts)  # rows that have drafted only answer tokens
        chain, drawn = inside, inside  # of these, rows whose drafts were all right
        with torch.autocast(device.type, torch.bfloat16, self._dtype == torch.bfloat16):
            for index, step in enumerate(unroll(self.network, batch, plan)):
                loss, right = self._step(index, step, wanted, tally)
                inside, chain = inside & step.plan.counts, chain & right
                tally.chained[index] = chain.sum()
                tally.chains[index] = inside.sum()
                if sampled is not None and wanted.draws is not None:
                    drawn = drawn & self._drawn(step, wanted.draws, sampled)
                    tally.drawn[index] = drawn.sum()
                total = total + self.weights.decay**index * loss
        return total, tally

    def _wanted(self, batch: TrainBatch, plan: UnrollPlan, sampled: SampledDrafts | None) -> Wanted:
        def predicting(values: Tensor) -> Tensor:
            return values.flatten(0, 1).index_select(0, plan.predicting)

        hidden, best = predicting(batch.hidden), predicting(batch.best)
        teacher = self.kernels.losses.teacher(hidden, self._teacher_head, self._dtype)
        draws = None
        if sampled is not None:
            places = predicting(batch.token_ids), predicting(plan.positions)
            draws = sampled.draws(hidden, *places)
        return Wanted(hidden, best, self._is_draft[best], teacher, draws)

    def _step(
        self, index: int, step: UnrolledStep, wanted: Wanted, tally: Tally
    ) -> tuple[Tensor, Tensor]:
        """The loss of one step, and the rows [B, R] that drafted the target's likeliest token."""
        picked, rows = step.plan.picked, step.plan.predicting
        loss, best = token_loss(
            step.head_inputs.flatten(0, 1).index_select(0, picked),
            self.network.head_weight,
            wanted.teacher,
            rows,
            wanted.is_draft[rows],
            self._dtype,
            self.weights.kind,
            self.kernels.losses,
        )
        hits = self._target_ids[best] == wanted.best[rows]
        right = _marked(step.plan, hits)
        tally.num[index] = len(picked)
        tally.correct[index] = hits.sum()
        tally.loss[index] = loss.detach()
        loss = loss * self.weights.tokens
        if self.weights.features:
            features = wanted.hidden.index_select(0, rows).float()
            states = step.states.flatten(0, 1).index_select(0, picked).float()
            distance = feature_distance(states, features)
            tally.distance[index] = distance.detach()
            loss = loss + self.weights.features * distance
        return loss, right

    def _drawn(self, step: UnrolledStep, draws: TargetDraws, sampled: SampledDrafts) -> Tensor:
        """[B, R] bool: the rows that drafted what the target draws at temperature 1."""
        inputs = step.head_inputs.flatten(0, 1).index_select(0, step.plan.picked)
        hits = sampled.are_right(draws, step.plan.predicting, inputs, self.network.head_weight)
        return _marked(step.plan, hits)


def _marked(plan: UnrolledStepPlan, hits: Tensor) -> Tensor:
    """[B, R] bool: `hits` [N] at the rows that count, False elsewhere."""
    marked = torch.zeros_like(plan.counts).flatten().index_copy_(0, plan.picked, hits)
    return marked.view_as(plan.counts)
