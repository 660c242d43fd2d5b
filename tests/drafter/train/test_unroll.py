"""Step j from base position t equals what serving computes when it drafts j tokens after t."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from drafter.heads.config import HeadConfig
from drafter.train.head.network import PEagleNetwork
from drafter.train.head.unroll import TrainBatch, UnrolledStep, base_rows
from kernels.ops import Ops
from tests.drafter.head_formulas import HeadFormulas
from tests.drafter.parallel_heads import PARALLEL_LAYOUTS, formulas_of
from tests.drafter.published_heads import HIDDEN, TargetWeights
from tests.drafter.train.networks import (
    MAX_LEN,
    ONE_OF_EACH_KIND,
    TRAINABLE,
    network_of,
    random_batch,
    unrolled,
)

TOLERANCE = 1e-4  # of the largest value: streams without a norm grow with every step
STEPS = 4
LENGTHS = (14, 9, 2, 6)
# Two answers in one text; one from the first token to the last; too short for a draft; one in the
# middle, with its end before the text's.
ANSWERS = ([range(4, 7), range(11, 14)], [range(9)], [range(1, 2)], [range(3, 5)])


def mixed_batch(name: str) -> TrainBatch:
    return random_batch(TRAINABLE[name], LENGTHS, ANSWERS)


def chain_of(formulas: HeadFormulas, ids: Tensor, fused: Tensor, base: int, steps: int) -> Tensor:
    """The state after entries 1 to `base` with true features and `steps` entries that take the
    state before as feature: computed entry by entry, as in serving."""
    features, last = fused[:base], base
    while True:
        entries = torch.arange(1, last + 1)
        states = formulas.states(features, ids[1 : last + 1], entries)
        if last == base + steps:
            return states[-1]
        features, last = torch.cat((features, states[-1:])), last + 1


def counted(step: UnrolledStep, index: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(text, base) of each row that counts -> its text and row in the step."""
    found = step.plan.counts.nonzero().tolist()
    return {(text, int(step.plan.places[text, row]) - index): (text, row) for text, row in found}


@pytest.mark.parametrize("name", TRAINABLE)
@torch.no_grad()
def test_every_step_equals_a_chain_drafted_entry_by_entry(name: str, reference_ops: Ops) -> None:
    layout, target = TRAINABLE[name], TargetWeights.of(reference_ops)
    formulas, batch = HeadFormulas(layout, target), mixed_batch(name)
    network = network_of(layout, target.embedding, target.lm_head)
    fused = [formulas.fuse(taps.split(HIDDEN, dim=-1)) for taps in batch.taps]
    for index, step in enumerate(unrolled(network, batch, STEPS)):
        places = counted(step, index)
        assert places  # every step compares some rows
        for (text, base), at in places.items():
            expected = chain_of(formulas, batch.token_ids[text], fused[text], base, index)
            assert_close(step.states[at], expected)
            assert_close(step.head_inputs[at] @ network.head_weight.T, formulas.logits(expected))


def assert_close(got: Tensor, expected: Tensor) -> None:
    atol = TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=0)


def test_every_answer_token_in_reach_is_predicted_once_per_step(reference_ops: Ops) -> None:
    target, name = TargetWeights.of(reference_ops), "reference-eagle3"
    network = network_of(TRAINABLE[name], target.embedding, target.lm_head)
    for index, step in enumerate(unrolled(network, mixed_batch(name), STEPS)):
        found = [
            (text, int(step.plan.places[text, row]) + 1) for text, row in step.plan.counts.nonzero()
        ]
        expected = [  # entry 1 is the first, so step j reaches tokens from j + 2 on
            (text, place)
            for text, spans in enumerate(ANSWERS)
            for span in spans
            for place in span
            if place >= index + 2
        ]
        assert sorted(found) == sorted(expected)


def test_base_rows_are_those_that_some_step_needs() -> None:
    batch = mixed_batch("reference-eagle3")
    rows = [[int(row) for row in text if row] for text in base_rows(batch, 2)]
    assert rows == [[2, 3, 4, 5, 9, 10, 11, 12], [*range(1, 8)], [], [1, 2, 3]]
    assert base_rows(random_batch(TRAINABLE["reference-eagle"], (3,), [[]]), 3).tolist() == [[0]]


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
@torch.no_grad()
def test_padding_after_a_text_changes_nothing(name: str, reference_ops: Ops) -> None:
    target = TargetWeights.of(reference_ops)
    network = network_of(TRAINABLE[name], target.embedding, target.lm_head)
    batch = mixed_batch(name)
    behind = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    changed = dataclasses.replace(  # attention multiplies padding by 0, so it must be finite
        batch,
        token_ids=batch.token_ids.where(~behind, 7),
        taps=batch.taps.where(~behind[..., None], 1e4),
        hidden=batch.hidden.where(~behind[..., None], torch.nan),
    )
    pairs = zip(unrolled(network, batch, STEPS), unrolled(network, changed, STEPS), strict=True)
    for clean, other in pairs:
        assert torch.equal(clean.plan.counts, other.plan.counts)
        assert torch.equal(clean.states[clean.plan.counts], other.states[clean.plan.counts])
        assert other.states.isfinite().all()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_gradients_reach_the_features_before_the_base_and_no_others(
    name: str, reference_ops: Ops
) -> None:
    target = TargetWeights.of(reference_ops)
    network = network_of(TRAINABLE[name], target.embedding, target.lm_head)
    batch = mixed_batch(name)
    batch.taps.requires_grad_(True)
    last = list(unrolled(network, batch, STEPS))[-1]
    base = 6
    torch.autograd.backward(last.states[counted(last, STEPS - 1)[1, 4]].sum(), retain_graph=True)
    torch.autograd.backward(last.states[counted(last, STEPS - 1)[0, base + 2]].sum())
    reached = batch.taps.grad.abs().sum(dim=-1) > 0  # type: ignore[union-attr]
    expected = torch.zeros_like(reached)
    expected[1, :4] = True
    expected[0, : base + 2] = True
    assert torch.equal(reached, expected)


def test_gradients_stay_finite_where_nothing_can_be_drafted(reference_ops: Ops) -> None:
    target, layout = TargetWeights.of(reference_ops), TRAINABLE["reference-eagle3"]
    network = network_of(layout, target.embedding, target.lm_head)
    for step in unrolled(network, random_batch(layout, (2,), [[range(1, 2)]]), STEPS):
        assert not step.plan.counts.any()
        torch.autograd.backward(step.states.sum(), retain_graph=True)
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@torch.no_grad()
def test_steps_of_a_parallel_head_are_the_tokens_it_drafts_at_once(reference_ops: Ops) -> None:
    layout, target = PARALLEL_LAYOUTS["vllm-peagle"], TargetWeights.of(reference_ops)
    formulas = formulas_of(layout, target)
    weights = layout.tensors()
    network = PEagleNetwork(HeadConfig.from_json(layout.config), target.embedding, MAX_LEN)
    network.load_state_dict(weights)
    batch = random_batch(layout, LENGTHS, ANSWERS)
    fused = [formulas.fuse(taps.split(HIDDEN, dim=-1)) for taps in batch.taps]
    for index, step in enumerate(unrolled(network, batch, STEPS)):
        places = counted(step, index)
        assert places
        for (text, base), at in places.items():
            ids = batch.token_ids[text, 1 : base + 1]
            expected = formulas.draft(fused[text][:base], ids, index + 1)[-1]
            assert_close(step.states[at], expected)


def test_every_parameter_of_a_parallel_head_learns(reference_ops: Ops) -> None:
    layout, target = PARALLEL_LAYOUTS["vllm-peagle"], TargetWeights.of(reference_ops)
    network = PEagleNetwork(HeadConfig.from_json(layout.config), target.embedding, MAX_LEN)
    network.load_state_dict(layout.tensors())
    for step in unrolled(network, random_batch(layout, LENGTHS, ANSWERS), 2):
        loss = (step.head_inputs @ network.head_weight.T)[step.plan.counts].square().sum()
        torch.autograd.backward(loss, retain_graph=True)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name
