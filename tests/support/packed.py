"""Run a loaded model on packed batches without a scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from engine.runner.input_builder import InputBuilder
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.kv.storage import KVStorage
from engine.models.llama import Llama, LlamaLoader
from engine.models.loading import ReadTensor
from engine.models.place import Place
from engine.step.batch import ForwardContext
from engine.step.group import TPGroup
from engine.step.plan import RowPlan, StepPlan
from engine.step.tree import DraftTree
from kernels.ops import Ops

BLOCK = 16
CPU = torch.device("cpu")


@dataclass
class PackedModel:
    """A model with its own pages, filled with NaN so that reading an unwritten slot shows."""

    model: Llama
    ops: Ops
    dtype: torch.dtype
    num_blocks: int = 64
    context: ForwardContext = field(init=False)
    inputs: InputBuilder = field(init=False)

    def __post_init__(self) -> None:
        arch = self.model.arch
        kv = KVStorage.allocate(
            arch.num_layers,
            self.num_blocks,
            BLOCK,
            arch.num_kv_heads,
            arch.head_dim,
            self.dtype,
            CPU,
        )
        for pages in (*kv.keys, *kv.values):
            pages.fill_(torch.nan)
        self.context = ForwardContext(self.ops, kv, TPGroup())
        self.inputs = InputBuilder(16, self.num_blocks * BLOCK, BLOCK)

    @torch.inference_mode()
    def run(self, *rows: RowPlan) -> list[Tensor]:
        """Logits [len, V] of every row's tokens."""
        roots = torch.tensor([row.token_ids[-1] for row in rows if row.samples])
        batch = self.inputs.build(StepPlan(rows=rows), DraftTree.roots(roots))
        logits = self.model.logits(self.model.forward(batch, self.context), self.context)
        return list(logits.split([len(row.token_ids) for row in rows]))

    def admit(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.inputs.admit(request_id)


def load_packed(
    arch: LlamaArch, read: ReadTensor, ops: Ops, dtype: torch.dtype, max_len: int = 1024
) -> PackedModel:
    return PackedModel(LlamaLoader(arch, read, Place(ops, dtype, CPU), max_len).load(), ops, dtype)
