"""Which tokens a step committed, and where the hidden state in front of each lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.runner.input_builder import InputBuilder
from engine.speculation.proposer import Committed
from engine.step.batch import ForwardBatch
from engine.step.plan import RowOutcome, RowPlan


def collect_committed(
    rows: Sequence[RowPlan],
    emitted: Sequence[RowOutcome],
    batch: ForwardBatch,
    path: Tensor | None,
    inputs: InputBuilder,
) -> Committed:
    """All tokens that follow a computed and accepted one.

    For a chunk of a prompt these are the tokens behind each of its own; for a row that drew, the
    accepted ones and the bonus token too. A token beyond the length limit or without a slot is left
    out: nothing will ever follow it.

    Args:
        emitted: of the rows that drew, in order.
        path: [B', max_depth + 1] their accepted nodes, -1 behind the end.
    """
    paths = iter([] if path is None else path.tolist())
    outcomes = iter(emitted)
    features: list[int] = []
    tokens: list[int] = []
    positions: list[int] = []
    counts: list[int] = []
    for row, first in zip(rows, batch.attention.cu_q.tolist()[:-1], strict=True):
        known = row.token_ids[1:]
        seen = list(range(first, first + len(row.token_ids)))
        if row.samples:
            root = seen[-1]
            seen += [root + node for node in next(paths) if node > 0]
            known = [*known, *next(outcomes).emitted]
        elif row.next_token is not None:
            known = [*known, row.next_token]
        room = min(len(row.block_ids) * inputs.block_size, inputs.max_len) - row.start - 1
        count = min(len(known), room)
        features += seen[:count]
        tokens += known[:count]
        positions += range(row.start + 1, row.start + 1 + count)
        counts.append(count)
    row_of = np.repeat(np.arange(len(rows)), counts)
    at = np.array(positions, dtype=np.int64)
    tables = inputs.tables(rows)
    return Committed(
        lines=torch.from_numpy(inputs.lines(rows)),
        cu=torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int32)),
        features=torch.from_numpy(np.array(features, dtype=np.int64)),
        tokens=torch.from_numpy(np.array(tokens, dtype=np.int64)),
        positions=torch.from_numpy(at),
        slots=torch.from_numpy(inputs.slots(tables, row_of, at)),
        block_tables=torch.from_numpy(tables),
    )
