"""Losses and their gradients equal those of plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from drafter.train.head.losses import (
    CHUNKS,
    TokenLoss,
    TokenLossKind,
    feature_distance,
    teacher_probabilities,
    token_loss,
)

HIDDEN, VOCAB, TEACHERS = 24, 53, 40
CHUNK = CHUNKS["cpu"]
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]


def problem(num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, LM head, teacher and row numbers, some of which repeat."""
    generator = torch.Generator().manual_seed(num)
    inputs = torch.randn(num, HIDDEN, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.5
    teacher = (torch.randn(TEACHERS, VOCAB, generator=generator) * 3).softmax(dim=-1)
    return inputs, head, teacher, torch.randint(TEACHERS, (num,), generator=generator)


def every(rows: Tensor) -> Tensor:
    return torch.ones_like(rows, dtype=torch.bool)


def expected_loss(inputs: Tensor, head: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    return -(teacher[rows] * functional.log_softmax(inputs @ head.T, dim=-1)).sum()


@pytest.mark.parametrize("num", SIZES)
def test_cross_entropy_and_its_gradients_equal_plain_torch(num: int) -> None:
    inputs, head, teacher, rows = problem(num)
    exact = [inputs.double().requires_grad_(True), head.double().requires_grad_(True)]
    expected = expected_loss(*exact, teacher.double(), rows)
    torch.autograd.backward(expected * -2.5)
    ours = [inputs.requires_grad_(True), head.requires_grad_(True)]
    loss, best = token_loss(*ours, teacher, rows, every(rows), torch.float32)
    torch.autograd.backward(loss * -2.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(best, (inputs @ head.T).argmax(dim=-1))
    assert not best.requires_grad


def test_gradients_equal_finite_differences() -> None:
    inputs, head, teacher, rows = problem(3)
    step, moved = 1e-3, torch.zeros_like(inputs)
    moved[1, 4] = step

    def at(x: Tensor) -> Tensor:
        return expected_loss(x.double(), head.double(), teacher.double(), rows)

    slope = (at(inputs + moved) - at(inputs - moved)) / (2 * step)
    inputs.requires_grad_(True)
    torch.autograd.backward(token_loss(inputs, head, teacher, rows, every(rows), torch.float32)[0])
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad[1, 4].double(), slope, rtol=1e-3, atol=1e-4)


def test_bfloat16_products_give_the_loss_and_gradients_nearly() -> None:
    inputs, head, teacher, rows = problem(CHUNK + 5)
    exact = [inputs.double().requires_grad_(True), head.double().requires_grad_(True)]
    expected = expected_loss(*exact, teacher.double(), rows)
    torch.autograd.backward(expected)
    ours = [inputs.requires_grad_(True), head.requires_grad_(True)]
    loss, _ = token_loss(*ours, teacher.bfloat16(), rows, every(rows), torch.bfloat16)
    torch.autograd.backward(loss)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        wrong = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert wrong < 0.02


def test_a_frozen_head_takes_no_gradient() -> None:
    inputs, head, teacher, rows = problem(5)
    loss, _ = token_loss(
        inputs.requires_grad_(True), head, teacher, rows, every(rows), torch.float32
    )
    torch.autograd.backward(loss)
    assert inputs.grad is not None
    assert head.grad is None


def test_measuring_without_gradients_gives_the_same_loss() -> None:
    inputs, head, teacher, rows = problem(5)
    inputs.requires_grad_(True)
    loss, best = token_loss(inputs, head, teacher, rows, every(rows), torch.float32)
    with torch.no_grad():
        measured, found = token_loss(inputs, head, teacher, rows, every(rows), torch.float32)
    assert not measured.requires_grad
    assert torch.equal(measured, loss)
    assert torch.equal(found, best)


@pytest.mark.parametrize("num", SIZES)
def test_teacher_probabilities_are_the_softmax_over_the_rows_of_the_head(num: int) -> None:
    inputs, head, _, _ = problem(num)
    expected = (inputs.double() @ head.double().T).softmax(dim=-1)
    found = teacher_probabilities(inputs, head, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    narrow = teacher_probabilities(inputs, head, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=2e-3)


def test_feature_distance_is_the_mean_over_the_width_summed_over_rows() -> None:
    states = torch.tensor([[0.5, 3.0], [0.0, -1.0]], requires_grad=True)
    features = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    loss = feature_distance(states, features)  # x^2 / 2 below 1, |x| - 1/2 above
    assert float(loss.detach()) == pytest.approx((0.125 + 1.5) / 2 + (0.0 + 1.5) / 2)
    torch.autograd.backward(loss)
    assert states.grad is not None
    assert states.grad.tolist() == [[0.25, 0.5], [0.0, -0.5]]


def plain_loss(kind: TokenLossKind, logits: Tensor, p: Tensor, eta: float, top_k: int) -> Tensor:
    """The formulas of `TokenLoss`, for torch to differentiate."""
    log_q = logits.log_softmax(dim=-1)
    overlap = torch.minimum(log_q.exp(), p).sum(dim=-1)
    if kind == "acceptance":
        return -overlap.log().sum()
    if kind == "lk":
        weight = torch.exp(-eta * overlap.detach())
        divergence = functional.kl_div(log_q, p, reduction="none").sum(dim=-1)
        return (weight * divergence + (1 - weight) * (1 - overlap)).sum()
    if kind == "top_k":
        p = p * (p >= p.topk(top_k, dim=-1).values[:, -1:])
        p = p / p.sum(dim=-1, keepdim=True)
    return -(p * log_q).sum()


KINDS: tuple[TokenLossKind, ...] = ("cross_entropy", "acceptance", "lk", "top_k")


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_and_its_gradients_equal_those_that_torch_derives(kind: TokenLossKind) -> None:
    inputs, head, teacher, rows = problem(CHUNK + 3)
    exact = [inputs.double().requires_grad_(True), head.double().requires_grad_(True)]
    logits = exact[0] @ exact[1].T
    expected = plain_loss(kind, logits, teacher[rows].double(), 2.0, 5)
    torch.autograd.backward(expected * -2.5)
    ours = [inputs.requires_grad_(True), head.requires_grad_(True)]
    loss, best = token_loss(
        *ours, teacher, rows, every(rows), torch.float32, TokenLoss(kind, 2.0, 5)
    )
    torch.autograd.backward(loss * -2.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(best, logits.argmax(dim=-1))
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)


def of(kind: TokenLossKind, logits: Tensor, p: Tensor, **settings: float) -> tuple[float, Tensor]:
    loss = TokenLoss(kind, **settings)  # type: ignore[arg-type]
    value, slope = loss.of(logits.log_softmax(dim=-1), p)
    return float(value.sum()), slope


@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_own_distribution_is_a_minimum(kind: TokenLossKind) -> None:
    """The losses of the paper are 0 there, and have an edge: the slope's sign depends on the side
    from which it is reached."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, generator=generator)
    p = logits.softmax(dim=-1)
    value, slope = of(kind, logits, p, top_k=7)
    if kind in ("acceptance", "lk"):
        assert value == pytest.approx(0.0, abs=1e-5)
    else:
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)
    for _ in range(4):
        moved = logits + 0.1 * torch.randn(3, 7, generator=generator)
        assert of(kind, moved, p, top_k=7)[0] > value


def test_for_a_certain_target_acceptance_is_cross_entropy() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    certain = functional.one_hot(torch.tensor([3, 0, 8, 1]), 9).float()
    value, slope = of("acceptance", logits, certain)
    expected, wanted = of("cross_entropy", logits, certain)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(slope, wanted)


def test_lk_is_divergence_at_first_and_the_share_that_is_refused_at_last() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    p = torch.randn(4, 9, generator=torch.Generator().manual_seed(4)).softmax(dim=-1)
    _, slope = of("lk", logits, p, eta=1e-9)
    torch.testing.assert_close(slope, logits.softmax(dim=-1) - p)
    value, _ = of("lk", logits, p, eta=1e9)
    refused = 1 - torch.minimum(logits.softmax(dim=-1), p).sum(dim=-1)
    assert value == pytest.approx(float(refused.sum()), rel=1e-5)


def test_without_overlap_the_gradient_stays_finite() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    for kind in KINDS:
        value, slope = of(kind, logits, torch.tensor([[0.0, 0.5, 0.5]]))
        assert torch.tensor(value).isfinite()
        assert slope.isfinite().all()
