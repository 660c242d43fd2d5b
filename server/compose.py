"""Joins the parts into an engine: the one module that knows kernels, models and drafters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.schema import Config
from engine.core import EngineCore
from engine.kv.manager import KVManager
from engine.kv.storage import KVStorage
from engine.messages import EngineInfo
from engine.models.arch import LlamaArch
from engine.models.llama import Llama
from engine.parallel.group import TPGroup
from engine.runner.forward import ForwardContext
from engine.runner.input_builder import InputBuilder
from engine.runner.model_runner import ModelRunner, RunnerParts
from engine.sampling.sampler import Sampler
from engine.scheduler.scheduler import Scheduler, SchedulerLimits
from engine.spec.proposer import RootProposer
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target model and the facts of it that the engine needs."""

    model: Llama
    arch: LlamaArch
    eos_token_ids: frozenset[int]


def assemble(config: Config, target: Target, ops: Ops, device: torch.device) -> EngineCore:
    """Put an engine together. `config` must be resolved: no size left open."""
    num_blocks, max_model_len = config.cache.num_blocks, config.model.max_model_len
    assert num_blocks is not None
    assert max_model_len is not None
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    kv = KVManager(num_blocks, config.cache.block_size, config.cache.prefix_caching)
    scheduler = Scheduler(limits, kv, target.eos_token_ids)
    runner = ModelRunner(_runner_parts(config, target, ops, device, num_blocks, max_model_len))
    info = EngineInfo(
        vocab_size=target.arch.vocab_size,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        eos_token_ids=sorted(target.eos_token_ids),
        ops=ops.backends,
        device=str(device),
    )
    return EngineCore(scheduler, runner, info)


def _runner_parts(
    config: Config,
    target: Target,
    ops: Ops,
    device: torch.device,
    num_blocks: int,
    max_model_len: int,
) -> RunnerParts:
    arch, block_size = target.arch, config.cache.block_size
    storage = KVStorage.allocate(
        arch.num_layers,
        num_blocks,
        block_size,
        arch.num_kv_heads,
        arch.head_dim,
        torch_dtype(config.model.dtype),
        device,
    )
    blocks_per_seq = -(-max_model_len // block_size)
    return RunnerParts(
        model=target.model,
        context=ForwardContext(ops, storage, TPGroup()),
        inputs=InputBuilder(config.scheduler.max_num_seqs, blocks_per_seq, block_size, device),
        sampler=Sampler(ops),
        proposer=RootProposer(),
        vocab_size=arch.vocab_size,
        eos_token_ids=target.eos_token_ids,
    )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that the configuration names."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
