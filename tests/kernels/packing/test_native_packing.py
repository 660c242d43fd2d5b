"""What rows commit, packed in C++, equals what torch packs, step by step."""

from __future__ import annotations

import random
from dataclasses import fields

import torch
from torch import Tensor

from drafter.proposer import _entries_of
from engine.step.tree import VerifyResult
from kernels.ops import Ops
from tests.engine.runner.test_layout import VOCAB, case_of, random_result


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
