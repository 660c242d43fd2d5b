"""Run a loaded model on packed batches without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.kv.scratch import Scratch
from engine.kv.storage import KVStorage
from engine.models.interface import LoadedModel
from engine.models.llama import LlamaLoader
from engine.models.loading import ReadTensor
from engine.models.place import Place
from engine.parallel.shard import WHOLE, Shard
from engine.runner.forms import Sizes
from engine.runner.inputs import InputBuilder
from engine.runner.layout import Layout
from engine.sampling.lines import LineSettings
from engine.step.batch import ForwardContext
from engine.step.group import TPGroup
from engine.step.plan import Admission, RowPlan, StepPlan
from engine.step.tree import DraftTree
from kernels.ops import Ops
from tests.support.engines.in_process import ask

BLOCK = 16
CPU = torch.device("cpu")


@dataclass
class PackedModel:
    """A model with its own pages, filled with NaN, so that reading an unwritten slot shows."""

    model: LoadedModel
    ops: Ops
    dtype: torch.dtype
    num_blocks: int = 64
    num_lines: int = 16
    group: TPGroup = field(default_factory=TPGroup)
    shard: Shard = WHOLE  # of the model
    context: ForwardContext = field(init=False)
    inputs: InputBuilder = field(init=False)
    tables: Tensor = field(init=False)  # [lines + 1, columns], kept from run to run

    def __post_init__(self) -> None:
        arch = self.model.arch
        kv = KVStorage.allocate(
            arch.num_layers,
            self.num_blocks + 1,
            BLOCK,
            self.shard.num_kv_heads(arch.num_kv_heads),
            arch.head_dim,
            self.dtype,
            CPU,
        )
        for pages in (*kv.keys, *kv.values):
            pages.fill_(torch.nan)
        self.context = ForwardContext(self.ops, kv, self.group)
        settings = LineSettings(self.num_lines, arch.vocab_size, frozenset())
        for line in range(self.num_lines):
            settings.admit(Admission(line, ask(f"{line}", [1])))
        self.inputs = InputBuilder(
            Sizes(exact=True, max_num_seqs=self.num_lines),
            settings,
            self.num_blocks * BLOCK,
            BLOCK,
            scratch_block=self.num_blocks,
        )
        columns = self.inputs.num_columns
        self.tables = torch.full((self.num_lines + 1, columns), self.num_blocks, dtype=torch.int32)

    @torch.inference_mode()
    def run(self, *rows: RowPlan) -> list[Tensor]:
        """Logits [len, V] of every row's tokens."""
        plan, builder = StepPlan(rows=rows), self.inputs
        form, changes = builder.form(plan), builder.changes(rows)
        inputs = builder.inputs(plan, form, changes)
        self.tables.view(-1)[inputs.table_places] = inputs.table_blocks
        layout = Layout.of(
            inputs,
            DraftTree.roots(torch.tensor([row.token_ids[-1] for row in rows])),
            form,
            self.tables[inputs.lines, : form.num_columns],
            Scratch(self.num_blocks, BLOCK),
            builder.max_len,
        )
        local = self.model.logits(self.model.forward(layout.batch(), self.context), self.context)
        logits = self.group.all_gather(local)[:, : self.model.arch.vocab_size]
        return list(logits.split([len(row.token_ids) for row in rows]))


def whole(line: int, token_ids: Sequence[int], blocks: Sequence[int], start: int = 0) -> RowPlan:
    """A row of these tokens, with all its blocks."""
    return RowPlan(
        line=line,
        start=start,
        token_ids=tuple(token_ids),
        first_block=0,
        new_blocks=tuple(blocks),
        samples=True,
    )


def load_packed(
    arch: LlamaArch, read: ReadTensor, ops: Ops, dtype: torch.dtype, max_len: int = 1024
) -> PackedModel:
    return PackedModel(LlamaLoader(arch, read, Place(ops, dtype, CPU), max_len).load(), ops, dtype)
