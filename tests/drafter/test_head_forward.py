"""A loaded head, run in chunks over pages, computes the formulas of its paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drafter.checkpoint import load_head
from drafter.heads.building import LoadedHead
from drafter.heads.interface import DraftBatch, DraftContext, DraftHead
from engine.kv.storage import KVStorage
from engine.step.group import TPGroup
from kernels.ops import AttentionMeta, Ops
from tests.drafter.head_formulas import HeadFormulas
from tests.drafter.published_heads import (
    CPU,
    HIDDEN,
    LAYOUTS,
    VOCAB,
    Layout,
    TargetWeights,
)

BLOCK, NUM_BLOCKS, MAX_LEN = 4, 24, 96
TOLERANCE = 2e-4  # float32 through up to three layers against float64
TABLES = torch.tensor([[7, 3, 20, 11, 1, 15, 9, 2], [4, 12, 8, 22, 5, 0, 17, 6]], dtype=torch.int32)
CHUNKS = [(5, 1), (1, 9), (13, 4), (1, 1)]  # entries of both rows in one forward


@pytest.fixture(params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    found: Ops = request.getfixturevalue(f"{request.param}_ops")
    return found


@dataclass
class Entry:
    """A row's entries so far: inputs and outputs of the head."""

    ids: list[Tensor]
    features: list[Tensor]
    states: list[Tensor]

    @property
    def next_position(self) -> int:
        return 1 + sum(len(ids) for ids in self.ids)


class PagedHead:
    """A head with pages full of NaN, so that reading an unwritten slot shows."""

    def __init__(self, head: LoadedHead, ops: Ops, group: TPGroup | None = None) -> None:
        self.head: DraftHead = head
        arch = head.arch
        heads = head.shard.num_kv_heads(arch.num_kv_heads)
        pages = (NUM_BLOCKS, BLOCK, heads, arch.head_dim)
        kv = KVStorage.allocate(arch.num_layers, *pages, torch.float32, CPU)
        for pages in (*kv.keys, *kv.values):
            pages.fill_(torch.nan)
        self.ctx = DraftContext(ops, kv, group or TPGroup())
        self.rows = [Entry([], [], []) for _ in TABLES]

    def forward(self, features: Tensor, ids: list[Tensor]) -> Tensor:
        """Append entries with packed features to each row; return their packed states."""
        starts = [row.next_position for row in self.rows]
        lens = [len(part) for part in ids]
        positions = [torch.arange(a, a + n) for a, n in zip(starts, lens, strict=True)]
        slots = [
            table[at // BLOCK].long() * BLOCK + at % BLOCK
            for table, at in zip(TABLES, positions, strict=True)
        ]
        batch = DraftBatch(
            token_ids=torch.cat(ids),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            attention=AttentionMeta(
                cu_q=torch.tensor([0, *lens]).cumsum(0).int(),
                prefix_lens=torch.tensor(starts, dtype=torch.int32),
                first_keys=torch.ones(len(ids), dtype=torch.int32),
                block_tables=TABLES,
                ancestors=torch.zeros(sum(lens), dtype=torch.int64),
                max_q=max(lens),
                max_context=max(a + n for a, n in zip(starts, lens, strict=True)),
            ),
        )
        kept = features.clone()
        states = self.head.forward(features, batch, self.ctx)
        assert torch.equal(features, kept)  # the caller's features stay as they are
        parts_of_rows = zip(ids, features.split(lens), states.split(lens), strict=True)
        for row, parts in zip(self.rows, parts_of_rows, strict=True):
            row.ids.append(parts[0])
            row.features.append(parts[1])
            row.states.append(parts[2])
        return states


def load(layout: Layout, folder: Path, target: TargetWeights) -> LoadedHead:
    return load_head(layout.write(folder), target.builder(max_len=MAX_LEN))


def run_chunks(paged: PagedHead, generator: torch.Generator) -> None:
    """Feed target features in chunks, then three entries that take the state before as feature."""
    for lens in CHUNKS:
        ids = [torch.randint(VOCAB, (n,), generator=generator) for n in lens]
        taps = tuple(
            torch.randn(sum(lens), HIDDEN, generator=generator) for _ in paged.head.tap_layers
        )
        paged.forward(paged.head.fuse(taps, paged.ctx), ids)
    for _ in range(3):
        ids = [torch.randint(VOCAB, (1,), generator=generator) for _ in paged.rows]
        paged.forward(torch.cat([row.states[-1][-1:] for row in paged.rows]), ids)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_chunks_over_pages_equal_the_formulas_over_the_whole(
    name: str, ops: Ops, tmp_path: Path
) -> None:
    layout, target = LAYOUTS[name], TargetWeights.of(ops)
    paged = PagedHead(load(layout, tmp_path, target), ops)
    run_chunks(paged, torch.Generator().manual_seed(6))
    formulas = HeadFormulas(layout, target)
    for row in paged.rows:
        ids, states = torch.cat(row.ids), torch.cat(row.states)
        positions = torch.arange(1, 1 + len(ids))
        expected = formulas.states(torch.cat(row.features), ids, positions)
        assert states.dtype == ops.activation_dtype
        torch.testing.assert_close(states.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
        logits = paged.head.logits(states, paged.ctx)
        assert (logits.dtype, logits.shape) == (torch.float32, (len(ids), layout.draft_vocab))
        expected = formulas.logits(expected)
        torch.testing.assert_close(logits.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_fuse_equals_the_formula(name: str, ops: Ops, tmp_path: Path) -> None:
    layout, target = LAYOUTS[name], TargetWeights.of(ops)
    paged = PagedHead(load(layout, tmp_path, target), ops)
    generator = torch.Generator().manual_seed(7)
    taps = tuple(torch.randn(9, HIDDEN, generator=generator) for _ in paged.head.tap_layers)
    expected = HeadFormulas(layout, target).fuse(taps)
    got = paged.head.fuse(taps, paged.ctx)
    assert got.shape == (9, layout.hidden)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_entries_are_written_to_their_slots_and_nowhere_else(
    name: str, ops: Ops, tmp_path: Path
) -> None:
    paged = PagedHead(load(LAYOUTS[name], tmp_path, TargetWeights.of(ops)), ops)
    run_chunks(paged, torch.Generator().manual_seed(8))
    written = torch.zeros(NUM_BLOCKS * BLOCK, dtype=torch.bool)
    for table, row in zip(TABLES, paged.rows, strict=True):
        at = torch.arange(1, row.next_position)  # position 0 has no entry
        written[table[at // BLOCK].long() * BLOCK + at % BLOCK] = True
    for pages in (*paged.ctx.kv.keys, *paged.ctx.kv.values):
        flat = pages.view(NUM_BLOCKS * BLOCK, -1)
        assert torch.equal(flat.isfinite().all(dim=-1), written)
        assert torch.equal(flat.isnan().all(dim=-1), ~written)
