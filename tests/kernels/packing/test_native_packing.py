"""Nodes, and what rows commit, packed in C++, equal what torch packs, step by step."""

from __future__ import annotations

import random
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter.proposer import _entries_of
from engine.runner.layout import Layout
from engine.runner.step import _draw_settings
from engine.step.tree import VerifyResult
from kernels.ops import Ops
from tests.engine.runner.test_layout import VOCAB, case_of, random_result


@pytest.mark.parametrize("exact", [True, False])
def test_packed_nodes_are_those_of_torch(native: Ops, exact: bool) -> None:
    widths = set()
    for seed in range(40):
        usual = case_of(seed, exact=exact, decodes=True).layout
        if not usual.form.only_roots:
            continue
        form = replace(usual.form, is_filtered=seed % 2 == 0)
        parts = (usual.inputs, usual.tree, form, usual.tables, usual.scratch, usual.max_len)
        ours, theirs = Layout.of(*parts, native.pack_nodes), Layout.of(*parts)
        assert ours.packed is not None
        assert theirs.packed is None
        widths.add(theirs.nodes.width)
        used = slice(None) if theirs.nodes.used is None else theirs.nodes.used
        assert_alike(used, batch_parts(ours), batch_parts(theirs))
        draws = (asdict(_draw_settings(layout, None)) for layout in (ours, theirs))
        assert_alike(used, *draws)
        assert torch.equal(ours.nodes.cu, theirs.nodes.cu)
        for name in ("row_of", "place"):
            one, other = getattr(ours.nodes, name), getattr(theirs.nodes, name)
            assert torch.equal(one[used], other[used]), name
        values = torch.arange(len(ours.nodes.row_of)) * 7
        assert torch.equal(ours.unpack_nodes(values), theirs.unpack_nodes(values))
    assert None in widths  # rows with different trees
    assert 1 in widths or not exact  # lone roots


def batch_parts(layout: Layout) -> dict[str, object]:
    batch = layout.batch()
    meta = batch.attention
    own = {name: getattr(batch, name) for name in ("token_ids", "positions", "slots")}
    return own | {part.name: getattr(meta, part.name) for part in fields(meta)}


def assert_alike(used: Any, ours: dict[str, object], theirs: dict[str, object]) -> None:
    """Parts that are equal; of values for each node, those that are `used`."""
    num_nodes = len(theirs["positions"])  # type: ignore[arg-type]
    for name, value in theirs.items():
        found = ours[name]
        if isinstance(value, Tensor):
            assert isinstance(found, Tensor), name
            some = used if len(value) == num_nodes else slice(None)
            assert torch.equal(found[some], value[some]), name
        else:
            assert found == value, name


def test_packed_entries_are_those_of_torch(native: Ops) -> None:
    assert native.pack_entries is not None
    num_cases = num_cut = 0
    for seed in range(24):
        case = case_of(seed, exact=True, decodes=True)
        layout, samples = case.layout, case.layout.inputs.samples
        if not layout.form.only_roots:
            continue
        num_cases += 1
        result = random_result(random.Random(seed), case)
        drawn = result.emitted.clone()
        drawn[~samples, 0] = VOCAB  # what is drawn there does not count
        accepted = torch.where(samples, result.num_accepted, 1)
        walked = VerifyResult(result.path, accepted, drawn)
        committed, ours = (
            layout.committed(result),
            layout.packed_entries(walked, native.pack_entries),
        )
        for part in fields(committed):
            one, other = getattr(ours, part.name), getattr(committed, part.name)
            if isinstance(other, Tensor):
                assert torch.equal(one, other), part.name
            elif part.name == "max_context":
                assert int(committed.positions.max()) < one <= other
            elif part.name != "packed":
                assert one == other, part.name
        for name, value in _entries_of(committed)._asdict().items():
            used = committed.cu.diff() > 0 if name == "last" else slice(None)
            assert torch.equal(getattr(_entries_of(ours), name)[used], value[used]), name
        num_cut += int((committed.cu.diff() < layout.inputs.lens + result.num_accepted).sum())
    assert num_cases > 3
    assert num_cut > 0
