"""Kernels of training against plain torch, results and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drafter.train.head import losses
from drafter.train.head.head_kernels import IN_TORCH, in_triton
from drafter.train.head.network import StepKeys, attend
from drafter.train.head.objective import LossWeights, Objective
from drafter.train.head.unroll import TrainBatch
from kernels.ops import Ops
from tests.drafter.published_heads import TargetWeights
from tests.drafter.train.networks import TRAINABLE, network_of, random_batch
from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, numbers

attention = triton_env.load("kernels.training.triton_attention")
loss_kernel = triton_env.load("kernels.training.triton_loss")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

LENGTHS = (70, 3, 41)  # texts one after the other; tiles of 64 keys hold parts of several
HEADS, KV_HEADS, DIM = 4, 2, 24


def ranges(skipped: int) -> tuple[Tensor, Tensor]:
    """First and last keys [1, R] that rows of the texts see; the first `skipped` of each have no
    row, and nobody sees the first key of a text."""
    first, last, start = [], [], 0
    for length in LENGTHS:
        for place in range(max(1, skipped), length):
            first.append(start + 1)
            last.append(start + place)
        start += length
    return (torch.tensor([each], dtype=torch.int32, device=DEVICE) for each in (first, last))  # type: ignore[return-value]


def gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [each.detach().clone().requires_grad_(True) for each in inputs]
    out = run(*leaves)
    torch.autograd.backward(out, numbers(*out.shape, seed=99, dtype=out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("steps", "skipped"), [(0, 1), (2, 10)])
def test_attention_and_its_gradients_equal_plain_torch(steps: int, skipped: int) -> None:
    first, last = ranges(skipped)
    num_rows, num_keys = first.shape[1], sum(LENGTHS)
    shapes = [(1, num_rows, HEADS, DIM), *[(1, num_keys, KV_HEADS, DIM)] * 2]
    shapes += [(1, num_rows, KV_HEADS, DIM)] * (2 * steps)
    inputs = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    def pairs(own: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(own[::2], own[1::2], strict=True))

    def ours(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        found: Tensor = attention.attention(q, k, v, pairs(own), first, last)
        return found.flatten(2)

    def plain(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        return attend(q, StepKeys(k, v, first, last, pairs(own)))

    got, slopes = gradients(ours, inputs)
    expected, wanted = gradients(plain, [each.double() for each in inputs])
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert len(slopes) == len(inputs)
    for mine, theirs in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=3e-5, rtol=1e-4)


def test_texts_side_by_side_and_rows_of_padding_are_right_too() -> None:
    """Padding rows come last and see the first entry alone, so rows are not sorted."""
    first = torch.ones(2, 70, dtype=torch.int32, device=DEVICE)
    last = torch.arange(1, 71, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    last[1, 30:] = 1
    shapes = [(2, 70, 2, 16), (2, 75, 1, 16), (2, 75, 1, 16)]
    inputs = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    got, slopes = gradients(lambda *qkv: attention.attention(*qkv, [], first, last), inputs)
    expected, wanted = gradients(
        lambda *qkv: attend(qkv[0], StepKeys(*qkv[1:], first, last)).view(qkv[0].shape),
        [each.double() for each in inputs],
    )
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=3e-5, rtol=1e-4)


def test_bfloat16_attention_is_near() -> None:
    first, last = ranges(1)
    shapes = [(1, first.shape[1], 2, 64), *[(1, sum(LENGTHS), 1, 64)] * 2]
    inputs = [numbers(*s, seed=seed, dtype=torch.bfloat16) for seed, s in enumerate(shapes)]
    got, slopes = gradients(lambda *qkv: attention.attention(*qkv, [], first, last), inputs)
    expected, wanted = gradients(
        lambda *qkv: attend(qkv[0], StepKeys(*qkv[1:], first, last)).view(qkv[0].shape),
        [each.double() for each in inputs],
    )
    for mine, theirs in zip([got, *slopes], [expected, *wanted], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("kind", ["cross_entropy", "acceptance", "lk"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 53), (torch.bfloat16, 9000)])
def test_loss_and_gradient_equal_plain_torch(kind: str, dtype: torch.dtype, size: int) -> None:
    logits, teacher = numbers(5, size, dtype=dtype) * 3, numbers(4, size, seed=1, dtype=dtype) * 3
    logits[4, 7:] = -300.0  # far from the teacher
    rows = torch.tensor([3, 0, 0, 1, 2], device=DEVICE)
    kept = torch.tensor([True, True, False, True, True], device=DEVICE)
    settings = losses.TokenLoss(kind, 2.0)  # type: ignore[arg-type]
    p = teacher.double().softmax(dim=-1)[rows]
    loss, slope = settings.of(logits.double().log_softmax(dim=-1), p)
    best = logits.argmax(dim=-1)
    got, found = loss_kernel.token_loss(
        logits, teacher, rows, kept, kind, 2.0, losses.LEAST_OVERLAP
    )
    torch.testing.assert_close(got.double(), loss * kept, atol=1e-5, rtol=1e-4)
    looser = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits.double(), slope * kept[:, None], atol=1e-6, rtol=looser)
    assert torch.equal(found, best)


TEXTS = (12, 2, 9, 5)
ANSWERS = ([range(5, 8), range(10, 12)], [range(1, 2)], [range(2, 9)], [range(5)])


def packed(batch: TrainBatch) -> TrainBatch:
    """The texts in one row, without the padding."""
    inside = torch.arange(max(TEXTS)) < torch.tensor(TEXTS)[:, None]
    starts = torch.tensor(TEXTS).cumsum(0) - torch.tensor(TEXTS)
    return TrainBatch(
        token_ids=batch.token_ids[inside][None].to(DEVICE),
        is_answer=batch.is_answer[inside][None],
        starts=starts.repeat_interleave(torch.tensor(TEXTS))[None],
        taps=batch.taps[inside][None].to(DEVICE),
        hidden=batch.hidden[inside][None].to(DEVICE),
        best=batch.best[inside][None].to(DEVICE),
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("reference-eagle3", "top_k"), ("eagle3-of-two-layers", "acceptance")]
)
def test_packed_texts_give_the_loss_the_counts_and_the_gradients_of_padded_ones(
    name: str, kind: losses.TokenLossKind, reference_ops: Ops
) -> None:
    layout, target = TRAINABLE[name], TargetWeights.of(reference_ops)
    weights = LossWeights(2, kind=losses.TokenLoss(kind))
    batch = random_batch(layout, TEXTS, ANSWERS)
    found = []
    for device, kernels, each in (
        (torch.device("cpu"), IN_TORCH, batch),
        (DEVICE, in_triton(weights.kind), packed(batch)),
    ):
        network = network_of(layout, target.embedding, target.lm_head).to(device)
        ids = layout.target_ids()
        objective = Objective(
            network,
            target.lm_head.to(device),
            None if ids is None else ids.to(device),
            weights,
            torch.float32,
            kernels,
            reference_ops,
        )
        loss, tally = objective(each)
        torch.autograd.backward(loss)
        slopes = [p.grad.cpu() for p in network.parameters() if p.grad is not None]
        counts = [*tally.tensors(), *objective.measure(each).tensors()]
        found.append((loss.detach().cpu(), [t.cpu() for t in counts], slopes))
    (loss, tally, slopes), (other, counts, wanted) = found
    assert float(loss) == pytest.approx(float(other), rel=1e-4)
    assert len(slopes) == len(wanted) > 5
    for mine, theirs in zip([*tally, *slopes], [*counts, *wanted], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
