"""The memory needed on each GPU, counted from configuration files without loading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from configs.resolve import HostConfig, ModelFacts, context_length, resolve_model
from drafter.checkpoint import read_head_config
from drafter.heads.building import HeadBuilder, LoadedHead, TargetWeights
from drafter.heads.config import HeadConfig
from drafter.manifest import D2T, head_tensors
from drafter.source import resolve_draft
from engine.checkpoints.arch import LlamaArch, Shape
from engine.checkpoints.checkpoint import read_arch
from engine.checkpoints.manifest import expected_tensors
from engine.checkpoints.stored import ReadStored, Stored
from engine.kv.storage import SCRATCH_BLOCKS
from engine.models.families import load_target
from engine.models.footprint import GIB, held_bytes
from engine.models.interface import LoadedModel
from engine.models.place import Place
from engine.parallel.shard import Shard, check_degree, kv_copies
from kernels.registry import reference_ops
from server.assembly.drafting import block_bytes, torch_dtype
from server.assembly.rank import largest_step

META = torch.device("meta")
RESERVED = GIB  # for CUDA, its graphs and NCCL: an estimate
SEQUENCE = 8192  # tokens


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the GPU of rank 0, which holds the most."""

    num_gpus: int
    gpu: int
    target_weights: int
    draft_weights: int
    target_kv: int
    draft_kv: int
    step: int  # activations and logits
    kv_copies: int  # GPUs that hold each KV head of the target
    block_size: int  # tokens
    num_blocks: int

    @property
    def weights(self) -> int:
        return self.target_weights + self.draft_weights

    @property
    def total(self) -> int:
        """Including the reserve."""
        return self.weights + self.target_kv + self.draft_kv + self.step + RESERVED

    @property
    def num_sequences(self) -> int:
        """How many sequences of `SEQUENCE` tokens fit at once."""
        return self.num_blocks // -(-SEQUENCE // self.block_size)

    def lines(self) -> list[str]:
        """The plan as text."""
        entries = {
            "target weights": self.target_weights,
            "draft weights": self.draft_weights,
            "target KV": self.target_kv,
            "draft KV": self.draft_kv,
            "activations and logits": self.step,
            "CUDA, NCCL (estimate)": RESERVED,
            "free": self.gpu - self.total,
        }
        copies = f", each KV head on {self.kv_copies}" if self.kv_copies > 1 else ""
        gpus = "1 GPU" if self.num_gpus == 1 else f"each of {self.num_gpus} GPUs"
        return [
            f"bytes on {gpus} of {self.gpu / GIB:.1f} GiB{copies}",
            *(f"  {name:<36}{size:>16,}  {size / GIB:7.2f} GiB" for name, size in entries.items()),
            f"{self.num_blocks} cache blocks of {self.block_size} tokens: "
            f"{self.num_sequences} sequences of {SEQUENCE} tokens at once",
        ]


def plan_memory(config: HostConfig, gpu_bytes: int) -> MemoryPlan:
    """What `config` puts on GPUs of `gpu_bytes` each. Reads no weight.

    Raises:
        FileNotFoundError: the model or its draft head has no config.json.
        ValueError: the model does not fit, or cannot be cut for this number of GPUs.
    """
    arch = read_arch(config.model.source, config.model.revision)
    check_degree(arch, config.parallel.tensor)
    path = resolve_draft(config.speculation.draft, config.model.source, config_only=True)
    head = None if path is None else read_head_config(path, arch)
    return plan_of(config, arch, head, gpu_bytes)


def plan_of(
    config: HostConfig, arch: LlamaArch, head: HeadConfig | None, gpu_bytes: int
) -> MemoryPlan:
    """`plan_memory` of shapes that are known."""
    outline = _Outline(config, arch)
    model = outline.target()
    target_weights = held_bytes(model)
    draft_weights, draft_block = 0, 0
    if head is not None:
        draft = outline.head(head, model)
        draft_weights = held_bytes(model, draft) - target_weights
        draft_block = block_bytes(head.arch, config, replace(outline.place, shard=draft.shard))
    target_block = block_bytes(arch, config, outline.place)
    step = largest_step(arch, config, outline.place)
    free = gpu_bytes - RESERVED - step - target_weights - draft_weights
    if free <= 0:
        raise ValueError(
            f"{(target_weights + draft_weights) / GIB:.1f} GiB of weights on each of "
            f"{config.parallel.tensor} GPUs, and {(RESERVED + step) / GIB:.1f} GiB for CUDA, NCCL "
            f"and activations, do not fit into {gpu_bytes / GIB:.1f} GiB: a larger parallel.tensor "
            "puts less on each"
        )
    facts = ModelFacts(arch.max_position_embeddings, target_block + draft_block, free)
    num_blocks = resolve_model(config, facts).cache.num_blocks
    if num_blocks * facts.bytes_per_block > free:
        raise ValueError(
            f"cache.num_blocks = {num_blocks}: its {num_blocks * facts.bytes_per_block / GIB:.1f} "
            f"GiB do not fit into the {free / GIB:.1f} GiB that weights leave of "
            f"{gpu_bytes / GIB:.1f} GiB"
        )
    return MemoryPlan(
        num_gpus=config.parallel.tensor,
        gpu=gpu_bytes,
        target_weights=target_weights,
        draft_weights=draft_weights,
        target_kv=(num_blocks + SCRATCH_BLOCKS) * target_block,
        draft_kv=(num_blocks + SCRATCH_BLOCKS) * draft_block,
        step=step,
        kv_copies=kv_copies(arch.num_kv_heads, config.parallel.tensor),
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
    )


@dataclass(frozen=True, slots=True)
class _Outline:
    """Models of a rank on the meta device, built by the same loaders as real ones."""

    config: HostConfig
    arch: LlamaArch

    @property
    def place(self) -> Place:
        """Rank 0's; there are no others to compute with."""
        dtype = torch_dtype(self.config.model.dtype)
        shard = Shard(0, self.config.parallel.tensor)
        return Place(reference_ops(META, dtype), dtype, META, shard)

    @property
    def max_len(self) -> int:
        return context_length(self.config, self.arch.max_position_embeddings)

    def target(self) -> LoadedModel:
        place = self.place
        read = _empty(expected_tensors(self.arch), place.dtype)
        return load_target(self.arch, read, place, self.max_len)

    def head(self, config: HeadConfig, model: LoadedModel) -> LoadedHead:
        """Tensors that a head may share with the target count as shared."""
        replicated = self.config.speculation.draft_parallel == "replicated"
        shapes = head_tensors(config, self.arch, ()).required
        weights, same_ids = _empty(shapes, self.place.dtype), torch.zeros(config.draft_vocab_size)

        def read(name: str) -> Stored:
            return same_ids if name == D2T else weights(name)

        shared = TargetWeights(self.arch, model.embedding.weight, model.head.weight)
        builder = HeadBuilder(shared, self.place, self.max_len, replicated)
        return builder.build(config, shapes, read)


def _empty(shapes: Mapping[str, Shape], dtype: torch.dtype) -> ReadStored:
    return lambda name: torch.empty(shapes[name], dtype=dtype, device=META)
