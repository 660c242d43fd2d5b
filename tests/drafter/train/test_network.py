"""A trainable head computes the same as a served head with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from drafter import manifest
from drafter.checkpoint import save_eagle, save_eagle3
from drafter.train.head.network import DraftNetwork
from drafter.train.head.unroll import TrainBatch
from kernels.ops import Ops
from tests.drafter.head_formulas import HeadFormulas
from tests.drafter.published_heads import HIDDEN, TARGET, Layout, TargetWeights
from tests.drafter.test_head_checkpoint import load
from tests.drafter.test_head_forward import PagedHead
from tests.drafter.train.networks import TRAINABLE, config_of, network_of, random_batch, unrolled

TOLERANCE = 1e-4  # float32 through up to three layers against float64
LENGTHS = (13, 9)


def first_step(network: DraftNetwork, batch: TrainBatch) -> tuple[list[Tensor], list[Tensor]]:
    """States and logits of step 0, for entries 1 to S - 2 of each text."""
    (step,) = unrolled(network, batch, 1)
    logits = step.head_inputs @ network.head_weight.T
    counts = [length - 2 for length in LENGTHS]
    states = [part[:n] for part, n in zip(step.states, counts, strict=True)]
    return states, [part[:n] for part, n in zip(logits, counts, strict=True)]


def everything_is_answer(name: str) -> TrainBatch:
    return random_batch(TRAINABLE[name], LENGTHS, [[range(n)] for n in LENGTHS])


@pytest.mark.parametrize("name", TRAINABLE)
@torch.no_grad()
def test_first_step_equals_the_formulas(name: str, reference_ops: Ops) -> None:
    layout, target = TRAINABLE[name], TargetWeights.of(reference_ops)
    batch, formulas = everything_is_answer(name), HeadFormulas(layout, target)
    states, logits = first_step(network_of(layout, target.embedding, target.lm_head), batch)
    for row, length in enumerate(LENGTHS):
        features = formulas.fuse(batch.taps[row].split(HIDDEN, dim=-1))
        ids, positions = batch.token_ids[row, 1 : length - 1], torch.arange(1, length - 1)
        expected = formulas.states(features[: length - 2], ids, positions)
        torch.testing.assert_close(states[row].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
        expected = formulas.logits(expected)
        torch.testing.assert_close(logits[row].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", TRAINABLE)
@torch.no_grad()
def test_first_step_equals_the_served_head(name: str, reference_ops: Ops, tmp_path: Path) -> None:
    layout, target = TRAINABLE[name], TargetWeights.of(reference_ops)
    network = network_of(layout, target.embedding, target.lm_head)
    layout.write(tmp_path)
    assert_served_as_trained(network, tmp_path, everything_is_answer(name), reference_ops)


@pytest.mark.parametrize("name", TRAINABLE)
def test_weights_are_named_and_shaped_as_files_are(name: str, reference_ops: Ops) -> None:
    layout, target = TRAINABLE[name], TargetWeights.of(reference_ops)
    network = network_of(layout, target.embedding, target.lm_head)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    expected = manifest.head_tensors(config_of(layout), TARGET, shapes)
    wanted = expected.required | {
        name: shape
        for name, shape in expected.optional.items()
        if name == manifest.LM_HEAD and layout.kind == "eagle3"  # trained there
    }
    wanted.pop(manifest.D2T, None)  # is written beside the weights
    assert shapes == wanted
    assert shapes.keys() == dict(network.named_parameters()).keys()


@pytest.mark.parametrize(
    "name", [n for n, one in TRAINABLE.items() if "embed_tokens" not in one.own]
)
@torch.no_grad()
def test_a_saved_network_is_served_as_it_was_trained(
    name: str, reference_ops: Ops, tmp_path: Path
) -> None:
    layout, target = TRAINABLE[name], TargetWeights.of(reference_ops)
    network, config = network_of(layout, target.embedding, target.lm_head), config_of(layout)
    if layout.kind == "eagle3":
        ids = layout.target_ids() if layout.mapped else None
        save_eagle3(tmp_path / "head", config, TARGET, network.state_dict(), ids)
    else:
        save_eagle(tmp_path / "head", config, TARGET, network.state_dict())
    head = load(tmp_path / "head", reference_ops)
    assert (head.arch, head.tap_layers) == (config.arch, layout_taps(layout))
    assert_served_as_trained(network, tmp_path / "head", everything_is_answer(name), reference_ops)


def layout_taps(layout: Layout) -> tuple[int, ...]:
    return layout.taps if layout.kind == "eagle3" else (TARGET.num_layers,)


def assert_served_as_trained(
    network: DraftNetwork, folder: Path, batch: TrainBatch, ops: Ops
) -> None:
    states, logits = first_step(network, batch)
    paged = PagedHead(load(folder, ops), ops)
    lens = [length - 2 for length in LENGTHS]
    taps = torch.cat([batch.taps[row, :n] for row, n in enumerate(lens)])
    ids = [batch.token_ids[row, 1 : 1 + n] for row, n in enumerate(lens)]
    served = paged.forward(paged.head.fuse(taps.split(HIDDEN, dim=-1), paged.ctx), ids)
    expected = paged.head.logits(served, paged.ctx)
    torch.testing.assert_close(torch.cat(states), served, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(torch.cat(logits), expected, atol=TOLERANCE, rtol=TOLERANCE)
