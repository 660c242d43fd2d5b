"""The loss of a batch equals the sum written out token by token; so do the counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from drafter.train.head.network import DraftNetwork
from drafter.train.head.objective import LossWeights, Objective, Tally
from drafter.train.head.unroll import TrainBatch
from kernels.ops import Ops
from kernels.sampling.reference import gumbel, noise_bits, noise_keys
from tests.drafter.published_heads import TargetWeights
from tests.drafter.train.networks import (
    ONE_OF_EACH_KIND,
    TRAINABLE,
    network_of,
    random_batch,
    unrolled,
)

STEPS, DECAY = 3, 0.7
LENGTHS, ANSWERS = (12, 8), ([range(5, 8), range(10, 12)], [range(4, 8)])

CHAINS = ([(1, 3), (1, 6), (0, 4)], [(1, 3), (0, 4)], [(1, 3)])  # (text, base), by step


@dataclasses.dataclass
class Case:
    """A network with its target's tensors and a batch."""

    name: str
    ops: Ops

    def __post_init__(self) -> None:
        self.layout = TRAINABLE[self.name]
        target = TargetWeights.of(self.ops)
        self.head = target.lm_head
        self.network = network_of(self.layout, target.embedding, target.lm_head)
        self.ids = self.layout.target_ids() if self.layout.mapped else None
        self.batch = random_batch(self.layout, LENGTHS, ANSWERS)
        self.batch = dataclasses.replace(self.batch, best=self.some_right())

    def some_right(self) -> Tensor:
        """The target's likeliest tokens: equal to the head's drafts along chains of three, two and
        one, and any tokens elsewhere, even outside the draft vocabulary."""
        best = self.batch.best.clone()
        for index, step in enumerate(unrolled(self.network, self.batch, STEPS)):
            drafts = named(self.ids, step.head_inputs @ self.network.head_weight.T)
            for text, row in step.plan.counts.nonzero().tolist():
                place = int(step.plan.places[text, row])
                if (text, place - index) in CHAINS[index]:
                    best[text, place] = drafts[text, row]
        return best

    def objective(self, weights: LossWeights, dtype: torch.dtype = torch.float32) -> Objective:
        return Objective(self.network, self.head, self.ids, weights, dtype, ops=self.ops)


def named(ids: Tensor | None, logits: Tensor) -> Tensor:
    best = logits.argmax(dim=-1)
    return best if ids is None else ids[best]


def by_hand(case: Case, weights: LossWeights) -> tuple[float, Tally]:
    """The loss and counts, token by token, in float64."""
    tally, total = Tally.zeros(weights.num_steps, torch.device("cpu")), 0.0
    ids = torch.arange(len(case.head)) if case.ids is None else case.ids
    right: dict[tuple[int, int], bool] = {}  # (text, base): whether every draft so far is right
    with torch.no_grad():
        steps = list(unrolled(case.network, case.batch, weights.num_steps))
    for index, step in enumerate(steps):
        drafted: dict[tuple[int, int], bool] = {}
        for text, row in step.plan.counts.nonzero().tolist():
            place = int(step.plan.places[text, row])
            log_q = (
                step.head_inputs[text, row].double() @ case.network.head_weight.detach().double().T
            )
            log_q = log_q.log_softmax(dim=-1)
            p = (case.batch.hidden[text, place].double() @ case.head[ids].double().T).softmax(-1)
            wanted = int(case.batch.best[text, place])
            correct, loss = int(ids[log_q.argmax()]) == wanted, 0.0
            if wanted in ids.tolist():
                loss = -float((p * log_q).sum())
            delta = (step.states[text, row] - case.batch.hidden[text, place]).double().abs()
            distance = float(torch.where(delta < 1, delta**2 / 2, delta - 0.5).mean())
            total += weights.decay**index * (weights.tokens * loss + weights.features * distance)
            tally.num[index] += 1
            tally.loss[index] += loss
            tally.correct[index] += correct
            tally.distance[index] += distance if weights.features else 0
            base = (text, place - index)
            if index == 0 or base in right:
                drafted[base] = correct and right.get(base, True)
        right = drafted
        tally.chains[index], tally.chained[index] = len(right), sum(right.values())
    return total, tally


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize("name", ["reference-eagle3", *ONE_OF_EACH_KIND])
def test_loss_and_counts_equal_the_sum_by_hand(
    name: str, weights: tuple[float, float], reference_ops: Ops
) -> None:
    case = Case(name, reference_ops)
    wanted = LossWeights(STEPS, DECAY, *weights)
    expected, counts = by_hand(case, wanted)
    loss, tally = case.objective(wanted)(case.batch)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    for mine, theirs in zip(tally.tensors(), counts.tensors(), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    lengths = [float(part) for part in counts.chained / counts.chains]
    assert tally.acceptance_length == pytest.approx(1 + sum(lengths))
    first, second, third = counts.chained.tolist()
    assert 9 > first > second > third > 0
    assert counts.chains.tolist() == [9, 6, 3]  # answers of 3, 2 and 4 tokens
    assert counts.num.tolist() == [9, 9, 9]


@pytest.mark.parametrize("name", ["reference-eagle3", "reference-eagle"])
def test_drafts_at_temperature_1_are_those_that_share_the_noise(
    name: str, reference_ops: Ops
) -> None:
    """Token by token, with the noise written out. At every second place the target is made to want
    what the first step drafts."""
    case = Case(name, reference_ops)
    ids = torch.arange(len(case.head)) if case.ids is None else case.ids
    hidden = case.batch.hidden.clone()
    guesses: list[dict[tuple[int, int], int]] = []  # by step: (text, place) -> token
    noises: dict[tuple[int, int], Tensor] = {}
    for index, step in enumerate(unrolled(case.network, case.batch, STEPS)):
        guesses.append({})
        for text, row in step.plan.counts.nonzero().tolist():
            place = int(step.plan.places[text, row])
            seed = torch.tensor([int(case.batch.token_ids[text, place]) + 2**20 * place])
            keys = noise_keys(seed, torch.tensor([place + 1]))
            noise = gumbel(noise_bits(keys, torch.arange(len(case.head))))[0]
            logits = (step.head_inputs[text, row] @ case.network.head_weight.T).detach()
            guess = int(ids[(logits + noise[ids]).argmax()])
            guesses[index][text, place], noises[text, place] = guess, noise
            if index == 0 and place % 2:
                hidden[text, place] = 200 * case.head[guess] / case.head[guess].norm()
    right: set[tuple[int, int]] = set()  # (text, base)
    chained = []
    for index, found in enumerate(guesses):
        hits = {
            (text, place - index)
            for (text, place), guess in found.items()
            if guess == int((hidden[text, place] @ case.head.T + noises[text, place]).argmax())
        }
        right = hits if index == 0 else hits & right
        chained.append(len(right))
    batch = dataclasses.replace(case.batch, hidden=hidden)
    tally = case.objective(LossWeights(STEPS)).measure(batch)
    assert tally.drawn.tolist() == chained
    assert 9 > chained[0] >= 4
    lengths = [float(part) for part in tally.drawn / tally.chains]
    assert tally.sampled_acceptance_length == pytest.approx(1 + sum(lengths))
    assert float(case.objective(LossWeights(STEPS))(batch)[1].drawn.sum()) == 0


def test_tokens_outside_the_draft_vocabulary_cost_nothing_and_count_as_wrong(
    reference_ops: Ops,
) -> None:
    case, weights = Case("reference-eagle3", reference_ops), LossWeights(STEPS)
    assert case.ids is not None
    outside = next(token for token in range(len(case.head)) if token not in case.ids.tolist())
    best = torch.full_like(case.batch.best, outside)
    loss, tally = case.objective(weights)(dataclasses.replace(case.batch, best=best))
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in case.network.parameters())
    assert tally.num.tolist() == [9, 9, 9]
    assert tally.accuracy == [0, 0, 0]
    assert tally.acceptance_length == 1


@pytest.mark.parametrize("name", [n for n in TRAINABLE if n != "vllm-eagle"])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_gradients_reach_every_trained_weight_and_nothing_else(
    name: str, steps: int, reference_ops: Ops
) -> None:
    case = Case(name, reference_ops)
    loss, _ = case.objective(LossWeights(steps))(case.batch)
    torch.autograd.backward(loss)
    for key, parameter in case.network.named_parameters():
        assert parameter.grad is not None, key
        # A bias moves all keys equally, which a softmax ignores: its gradient is only rounding.
        if not key.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 1e-5, key
    for buffer in (*case.network.buffers(), case.head, case.batch.hidden, case.batch.taps):
        assert not buffer.requires_grad
        assert buffer.grad is None


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_gradient_is_the_slope_of_the_loss(name: str, reference_ops: Ops) -> None:
    case, size = Case(name, reference_ops), 2e-4
    objective = case.objective(LossWeights(2, DECAY, 0.1, 1.0))
    torch.autograd.backward(objective(case.batch)[0])
    generator = torch.Generator().manual_seed(9)
    for key in (
        "fc.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight",
    ):
        weight = case.network.get_parameter(key)
        assert weight.grad is not None
        towards = weight.grad / weight.grad.norm() + 1e-3 * torch.randn(
            weight.shape, generator=generator
        )
        slope = (
            loss_at(case.network, objective, key, towards * size, case.batch)
            - loss_at(case.network, objective, key, -towards * size, case.batch)
        ) / (2 * size)
        assert slope == pytest.approx(float((weight.grad * towards).sum()), rel=0.05), key


def loss_at(
    network: DraftNetwork, objective: Objective, key: str, moved: Tensor, batch: TrainBatch
) -> float:
    weight = network.get_parameter(key)
    with torch.no_grad():
        kept = weight.clone()
        weight += moved
        loss = float(objective(batch)[0])
        weight.copy_(kept)
    return loss


def test_bfloat16_products_change_the_loss_little(reference_ops: Ops) -> None:
    case, weights = Case("reference-eagle3", reference_ops), LossWeights(STEPS)
    exact, counts = case.objective(weights)(case.batch)
    loss, tally = case.objective(weights, torch.bfloat16)(case.batch)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert torch.equal(tally.num, counts.num)
    torch.autograd.backward(loss)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in case.network.parameters())


def test_features_of_a_bfloat16_target_are_learnt_from_in_float32(reference_ops: Ops) -> None:
    case = Case("reference-eagle3", reference_ops)
    narrow = dataclasses.replace(
        case.batch, taps=case.batch.taps.bfloat16(), hidden=case.batch.hidden.bfloat16()
    )
    objective = case.objective(LossWeights(STEPS))
    expected = float(objective(case.batch)[0].detach())
    assert float(objective(narrow)[0].detach()) == pytest.approx(expected, rel=0.02)


def test_sums_of_batches_add_up(reference_ops: Ops) -> None:
    case = Case("reference-eagle3", reference_ops)
    objective = case.objective(LossWeights(STEPS))
    whole = objective.measure(case.batch)
    parts = Tally.zeros(STEPS, torch.device("cpu"))
    for row in range(len(LENGTHS)):
        fields = (
            getattr(case.batch, f.name)[row : row + 1] for f in dataclasses.fields(TrainBatch)
        )
        parts.add(objective.measure(TrainBatch(*fields)))
    for mine, theirs in zip(parts.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert Tally.zeros(2, torch.device("cpu")).acceptance_length == 1
