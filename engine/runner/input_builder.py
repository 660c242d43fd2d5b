"""From a step plan (host integers) to packed tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.runner.forward import ForwardBatch
from engine.scheduler.plan import RowPlan, StepPlan
from kernels.ops import AttentionMeta


@dataclass(slots=True)
class TableRow:
    """A running sequence's line of the block table, and how much of it is filled."""

    index: int
    num_blocks: int = 0


class InputBuilder:
    """Keeps the block tables of running sequences, so that a step writes only new blocks."""

    def __init__(
        self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int, device: torch.device
    ) -> None:
        self._tables = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._rows: dict[str, TableRow] = {}
        self._block_size = block_size
        self._device = device

    def admit(self, request_id: str) -> None:
        """Give a sequence a line of the table; it starts empty."""
        self._rows[request_id] = TableRow(self._free.pop())

    def release(self, request_id: str) -> None:
        self._free.append(self._rows.pop(request_id).index)

    def build(self, plan: StepPlan) -> ForwardBatch:
        """Pack the plan's rows. The plan must have at least one."""
        lens = np.array([len(row.token_ids) for row in plan.rows], dtype=np.int64)
        starts = np.array([row.start for row in plan.rows], dtype=np.int64)
        cu_q = np.zeros(len(lens) + 1, dtype=np.int64)
        np.cumsum(lens, out=cu_q[1:])
        num_tokens = int(cu_q[-1])
        row_of = np.repeat(np.arange(len(lens)), lens)  # [T]
        positions = np.arange(num_tokens) - cu_q[row_of] + starts[row_of]
        tables = self._block_tables(plan.rows)  # [B, max_blocks]
        block, offset = np.divmod(positions, self._block_size)
        token_ids = chain.from_iterable(row.token_ids for row in plan.rows)
        samples = np.array([row.samples for row in plan.rows])
        return ForwardBatch(
            token_ids=self._to_device(np.fromiter(token_ids, dtype=np.int64, count=num_tokens)),
            positions=self._to_device(positions),
            slots=self._to_device(
                tables[row_of, block].astype(np.int64) * self._block_size + offset
            ),
            attention=AttentionMeta(
                cu_q=self._to_device(cu_q.astype(np.int32)),
                prefix_lens=self._to_device(starts.astype(np.int32)),
                first_keys=torch.zeros(len(lens), dtype=torch.int32, device=self._device),
                block_tables=self._to_device(tables),
                ancestors=torch.zeros(num_tokens, dtype=torch.int64, device=self._device),
                max_q=int(lens.max()),
                max_context=int((starts + lens).max()),
            ),
            sampled=self._to_device((cu_q[1:] - 1)[samples]),
        )

    def _block_tables(self, rows: tuple[RowPlan, ...]) -> NDArray[np.int32]:
        lines = []
        for row in rows:
            line, num_blocks = self._rows[row.request_id], len(row.block_ids)
            if num_blocks > line.num_blocks:
                new = row.block_ids[line.num_blocks :]
                self._tables[line.index, line.num_blocks : num_blocks] = new
                line.num_blocks = num_blocks
            lines.append(line.index)
        widest = max(len(row.block_ids) for row in rows)
        return self._tables[lines, :widest]

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
