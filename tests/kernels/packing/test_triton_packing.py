"""Nodes packed in one launch equal those that torch packs, step by step."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from drafter.proposer import _entries_of
from engine.runner.layout import Layout
from engine.runner.step import _draw_settings
from engine.step.batch import ForwardBatch
from engine.step.tree import VerifyResult
from kernels.packing.nodes import NodeTrees
from tests.engine.runner.test_layout import VOCAB, Case, case_of, random_result
from tests.kernels import triton_env

kernel = triton_env.load("kernels.packing.triton_kernel")
entries = triton_env.load("kernels.packing.triton_entries")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]


def in_one_launch(case: Case, *, filtered: bool) -> tuple[Layout, Layout]:
    """The layout of a case made by the kernel and by torch."""
    usual = case.layout
    form = replace(usual.form, is_filtered=filtered)
    parts = (usual.inputs, usual.tree, form, usual.tables, usual.scratch, usual.max_len)
    return Layout.of(*parts, kernel.pack_nodes), Layout.of(*parts)


def tensors_of(batch: ForwardBatch) -> dict[str, Tensor]:
    """All of the batch that something reads; masks are those of used tokens."""
    meta = batch.attention
    found = {name: getattr(batch, name) for name in ("token_ids", "slots")}
    found |= {part.name: getattr(meta, part.name) for part in fields(meta)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@pytest.mark.skipif(not triton_env.INTERPRETED, reason="cases lie in host memory")
@pytest.mark.parametrize("filtered", [False, True])
def test_packed_nodes_are_those_of_torch(filtered: bool) -> None:
    for seed in range(12):
        got, expected = in_one_launch(case_of(seed, exact=False, decodes=True), filtered=filtered)
        if not got.form.only_roots:
            continue
        used, ours, theirs = expected.nodes.used, got.batch(), expected.batch()
        assert used is not None
        for name, value in tensors_of(theirs).items():
            assert torch.equal(tensors_of(ours)[name], value), name
        assert torch.equal(ours.positions[used], theirs.positions[used])
        assert int(ours.positions.min()) >= 0
        assert int(ours.positions.max()) < got.max_len
        for name in ("cu", "used"):
            assert torch.equal(getattr(got.nodes, name), getattr(expected.nodes, name)), name
        for name in ("row_of", "place"):
            assert torch.equal(getattr(got.nodes, name)[used], getattr(expected.nodes, name)[used])
        values = torch.arange(len(used)) * 7
        assert torch.equal(got.unpack_nodes(values), expected.unpack_nodes(values))
        ours_drawn, theirs_drawn = _draw_settings(got, None), _draw_settings(expected, None)
        for name in ("temperature", "seeds", "positions", "top_k", "top_p", "min_p"):
            one, other = getattr(ours_drawn, name), getattr(theirs_drawn, name)
            assert (one is None) == (other is None) == (not filtered and "_" in name)
            if one is not None:
                assert torch.equal(one[used], other[used]), name


@pytest.mark.skipif(not triton_env.INTERPRETED, reason="cases lie in host memory")
def test_packed_entries_are_those_of_torch() -> None:
    num_cut = 0
    for seed in range(16):
        case = case_of(seed, exact=False, decodes=True)
        got, expected = in_one_launch(case, filtered=False)
        if not got.form.only_roots:
            continue
        result, samples = random_result(random.Random(seed), case), got.inputs.samples
        committed = expected.committed(result)
        drawn = result.emitted.clone()
        drawn[~samples, 0] = VOCAB  # what is drawn there does not count
        accepted = torch.where(samples, result.num_accepted, 1)
        ours = got.packed_entries(VerifyResult(result.path, accepted, drawn), entries.pack_entries)
        for part in fields(committed):
            one, other = getattr(ours, part.name), getattr(committed, part.name)
            if isinstance(other, Tensor):
                assert torch.equal(one, other), part.name
            elif part.name != "packed":
                assert one == other, part.name
        for name, value in _entries_of(committed)._asdict().items():
            used = committed.cu.diff() > 0 if name == "last" else slice(None)
            assert torch.equal(getattr(_entries_of(ours), name)[used], value[used]), name
        num_cut += int((committed.cu.diff() < got.inputs.lens + result.num_accepted).sum())
    assert num_cut > 0


def test_rows_without_nodes_are_passed_over() -> None:
    device, count = triton_env.DEVICE, 37
    sizes = torch.arange(count, device=device) % 4
    column = torch.arange(count, device=device)[:, None].expand(-1, 3).contiguous()
    tables = torch.full((count, 9), 2**30, dtype=torch.int32, device=device)
    tables[:, 0] = torch.arange(count, device=device)
    rates = torch.ones(count, device=device)
    trees = NodeTrees(
        starts=torch.full((count,), 5, device=device),
        limits=sizes,
        sizes=sizes.clamp(min=1),
        tokens=column * 10 + torch.arange(3, device=device),
        depths=torch.arange(3, device=device).expand(count, 3),
        ancestors=torch.full((count, 3), 7, device=device),
        tables=tables,
        temperatures=rates,
        seeds=torch.arange(count, device=device),
        top_k=None,
        top_p=None,
        min_p=None,
        num_nodes=111,
        block_size=16,
        first_scratch=1600,
        max_len=100,
    )
    packed = kernel.pack_nodes(trees)
    nodes = [(row, node) for row in range(count) for node in range(int(sizes[row]))]
    expected = [10 * row + node for row, node in nodes]
    assert packed.tokens[: len(nodes)].tolist() == expected
    assert packed.slots[: len(nodes)].tolist() == [16 * row + 5 + node for row, node in nodes]
    assert packed.used.sum() == len(nodes)
    assert int(packed.cu[-1]) == len(nodes)
    assert packed.slots[len(nodes) :].min() >= 1600
    assert packed.inside.sum() == len(nodes)
    assert packed.seeds[: len(nodes)].tolist() == [row for row, _ in nodes]
