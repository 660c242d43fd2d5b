"""From a step plan (host integers) and its draft trees to packed tensors of the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.step.batch import ForwardBatch
from engine.step.plan import RowPlan, StepPlan
from engine.step.tree import DraftTree
from kernels.ops import AttentionMeta

Ints = NDArray[np.int64]


@dataclass(slots=True)
class TableRow:
    """A running sequence's line of the block table, and how many of its blocks are final: those in
    front of the first token of its last plan."""

    index: int
    num_final: int = 0


class InputBuilder:
    """Keeps the block tables of running sequences, so that a step writes only new blocks."""

    def __init__(self, max_num_seqs: int, max_len: int, block_size: int) -> None:
        """`max_len`: positions of one sequence."""
        self._tables = np.zeros((max_num_seqs, -(-max_len // block_size)), dtype=np.int32)
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._rows: dict[str, TableRow] = {}
        self.block_size = block_size
        self.max_len = max_len

    def admit(self, request_id: str) -> int:
        """Give a sequence a line of the table, which starts empty; returns its number."""
        self._rows[request_id] = TableRow(self._free.pop())
        return self._rows[request_id].index

    def line(self, request_id: str) -> int:
        """The line that the sequence was given."""
        return self._rows[request_id].index

    def release(self, request_id: str) -> None:
        self._free.append(self._rows.pop(request_id).index)

    def lines(self, rows: Sequence[RowPlan]) -> Ints:
        """The line of each row, [B]."""
        return np.array([self._rows[row.request_id].index for row in rows], dtype=np.int64)

    def tables(self, rows: Sequence[RowPlan]) -> NDArray[np.int32]:
        """Block tables of the rows, [B, widest]; takes note of blocks that are new in the plan.
        Blocks behind the computed tokens may have been replaced since the last plan."""
        for row in rows:
            line, now = self._rows[row.request_id], row.start // self.block_size
            first = min(line.num_final, now)
            self._tables[line.index, first : len(row.block_ids)] = row.block_ids[first:]
            line.num_final = now
        widest = max(len(row.block_ids) for row in rows)
        return self._tables[self.lines(rows), :widest]

    def slots(self, tables: NDArray[np.int32], row_of: Ints, positions: Ints) -> Ints:
        """Slots of cache positions [T] of the rows `row_of` [T]."""
        block, offset = np.divmod(positions, self.block_size)
        return tables[row_of, block].astype(np.int64) * self.block_size + offset

    def build(self, plan: StepPlan, tree: DraftTree) -> ForwardBatch:
        """Pack the plan's rows, with the nodes of `tree` (of the host) behind the rows that draw,
        in order. The plan must have at least one row."""
        layout = _Layout.of(plan.rows, tree.sizes.numpy())
        token_ids = np.empty(layout.num_tokens, dtype=np.int64)
        for row, first in zip(plan.rows, layout.cu_q[:-1], strict=True):
            token_ids[first : first + len(row.token_ids)] = row.token_ids
        positions = layout.starts[layout.row_of] + layout.local
        ancestors = np.zeros(layout.num_tokens, dtype=np.int64)
        tables = self.tables(plan.rows)
        slots = self.slots(tables, layout.row_of, positions)
        if tree.max_depth:
            trees, nodes = layout.tree_of_node, layout.node_of_node
            at = layout.sampled
            token_ids[at] = tree.tokens.numpy()[trees, nodes]
            positions[at] += tree.depths.numpy()[trees, nodes] - nodes
            grown = tree.sizes.numpy()[trees] > 1
            ancestors[at[grown]] = tree.ancestors.numpy()[trees, nodes][grown]
        return ForwardBatch(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            attention=AttentionMeta(
                cu_q=torch.from_numpy(layout.cu_q.astype(np.int32)),
                prefix_lens=torch.from_numpy(layout.starts.astype(np.int32)),
                first_keys=torch.zeros(len(plan.rows), dtype=torch.int32),
                block_tables=torch.from_numpy(tables),
                ancestors=torch.from_numpy(ancestors),
                max_q=int(layout.lens.max()),
                max_context=int((layout.starts + layout.lens).max()),
            ),
            sampled=torch.from_numpy(layout.sampled),
            tree_of_node=torch.from_numpy(layout.tree_of_node),
            node_of_node=torch.from_numpy(layout.node_of_node),
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything lies among the T packed tokens: each row's own tokens, then the nodes below
    its last one, which is the root."""

    starts: Ints  # [B] cache position of each row's first token
    lens: Ints  # [B] tokens and nodes
    cu_q: Ints  # [B + 1]
    row_of: Ints  # [T]
    local: Ints  # [T] place within the row
    sampled: Ints  # [R] index among T of every node that draws, roots included
    tree_of_node: Ints  # [R] which tree
    node_of_node: Ints  # [R] which node of it

    @property
    def num_tokens(self) -> int:
        return int(self.cu_q[-1])

    @classmethod
    def of(cls, rows: Sequence[RowPlan], sizes: Ints) -> _Layout:
        samples = np.array([row.samples for row in rows])
        lens = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
        roots = lens[samples] - 1  # within the row
        lens[samples] += sizes - 1
        starts = np.array([row.start for row in rows], dtype=np.int64)
        cu_q = _offsets(lens)
        row_of = np.repeat(np.arange(len(rows)), lens)
        tree_of_node = np.repeat(np.arange(len(sizes)), sizes)
        node_of_node = np.arange(len(tree_of_node)) - _offsets(sizes)[tree_of_node]
        first_nodes = cu_q[:-1][samples] + roots
        return cls(
            starts=starts,
            lens=lens,
            cu_q=cu_q,
            row_of=row_of,
            local=np.arange(int(cu_q[-1])) - cu_q[row_of],
            sampled=first_nodes[tree_of_node] + node_of_node,
            tree_of_node=tree_of_node,
            node_of_node=node_of_node,
        )


def _offsets(lens: Ints) -> Ints:
    """[n + 1] running sums from 0."""
    return np.concatenate(([0], np.cumsum(lens))).astype(np.int64)
