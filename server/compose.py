"""Joins the parts into an engine: the one module that knows kernels, models and drafters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from configs.resolve import ModelFacts, context_length, resolve_model
from configs.schema import Config
from engine.core import EngineCore
from engine.kv.manager import KVManager
from engine.kv.sizing import free_bytes
from engine.kv.storage import KVStorage, bytes_per_block
from engine.messages import EngineInfo
from engine.models.arch import LlamaArch
from engine.models.checkpoint import open_checkpoint
from engine.models.llama import Llama, LlamaLoader
from engine.models.source import resolve_source
from engine.parallel.group import TPGroup
from engine.runner.forward import ForwardContext
from engine.runner.input_builder import InputBuilder
from engine.runner.model_runner import ModelRunner, RunnerParts
from engine.sampling.sampler import Sampler
from engine.scheduler.scheduler import Scheduler, SchedulerLimits
from engine.spec.planner import FixedPlanner, Planner
from engine.spec.proposer import Proposer, RootProposer
from kernels.native.build import NativeUnavailableError, build_library
from kernels.ops import Ops
from kernels.registry import build_ops


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target model and the facts of it that the engine needs."""

    model: Llama
    arch: LlamaArch
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who proposes trees, and who chooses their shape."""

    proposer: Proposer = field(default_factory=RootProposer)
    planner: Planner = field(default_factory=FixedPlanner)


def build_engine(config: Config) -> EngineCore:
    """Load the model that `config` (resolved for its host) names and put an engine around it.

    Raises:
        FileNotFoundError, ValueError: the model or the configuration is at fault.
        NativeUnavailableError: native kernels were asked for and cannot be built.
    """
    assert config.files.dir is not None
    assert config.kernels.threads is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch_dtype(config.model.dtype)
    threads = config.kernels.threads
    files = resolve_source(config.model.source, config.model.revision)
    checkpoint = open_checkpoint(files)
    arch = checkpoint.arch
    eos_token_ids = _known_ids(checkpoint.eos_token_ids, arch)
    max_len = context_length(config, arch.max_position_embeddings)
    ops = build_ops(config.kernels.backend, device, dtype, threads, config.files.dir)
    # Native operations have their own threads; two pools would fight for the cores.
    torch.set_num_threads(1 if "native" in ops.backends["linear"] else threads)
    model = LlamaLoader(arch, checkpoint.tensor, ops, dtype, device, max_len).load()
    config = resolve_model(config, _model_facts(config, arch, device))
    return assemble(config, Target(model, arch, eos_token_ids), ops, device)


def prepare_kernels(config: Config) -> str:
    """Compile the native kernels where they can be; says what the engine will use."""
    assert config.files.dir is not None
    try:
        return str(build_library(config.files.dir))
    except NativeUnavailableError as error:
        return f"none ({error}); plain torch will be used, which is much slower"


def _known_ids(eos_token_ids: Collection[int], arch: LlamaArch) -> frozenset[int]:
    for token_id in eos_token_ids:
        if token_id >= arch.vocab_size:
            raise ValueError(
                f"eos_token_id {token_id} is not in the model's vocabulary of {arch.vocab_size}"
            )
    return frozenset(eos_token_ids)


def _model_facts(config: Config, arch: LlamaArch, device: torch.device) -> ModelFacts:
    return ModelFacts(
        context_length=arch.max_position_embeddings,
        bytes_per_block=bytes_per_block(
            arch.num_layers,
            config.cache.block_size,
            arch.num_kv_heads,
            arch.head_dim,
            torch_dtype(config.model.dtype),
        ),
        free_bytes=free_bytes(device),
    )


def assemble(
    config: Config,
    target: Target,
    ops: Ops,
    device: torch.device,
    drafting: Drafting | None = None,
) -> EngineCore:
    """Put an engine together. `config` must be resolved: no size left open."""
    drafting = drafting or Drafting()
    num_blocks, max_model_len = config.cache.num_blocks, config.model.max_model_len
    assert num_blocks is not None
    assert max_model_len is not None
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=max_model_len,
        lookahead=drafting.proposer.lookahead,
        lookback=drafting.proposer.lookahead,
    )
    kv = KVManager(num_blocks, config.cache.block_size, config.cache.prefix_caching)
    scheduler = Scheduler(limits, kv, target.eos_token_ids, vocab_size=target.arch.vocab_size)
    runner = ModelRunner(_runner_parts(config, target, ops, device, drafting.proposer))
    info = EngineInfo(
        vocab_size=target.arch.vocab_size,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        eos_token_ids=sorted(target.eos_token_ids),
        ops=ops.backends,
        device=str(device),
    )
    return EngineCore(scheduler, runner, info, drafting.planner)


def _runner_parts(
    config: Config, target: Target, ops: Ops, device: torch.device, proposer: Proposer
) -> RunnerParts:
    num_blocks, max_model_len = config.cache.num_blocks, config.model.max_model_len
    assert num_blocks is not None
    assert max_model_len is not None
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
        context=ForwardContext(ops, storage, TPGroup(), proposer.tap),
        inputs=InputBuilder(config.scheduler.max_num_seqs, blocks_per_seq, block_size, device),
        sampler=Sampler(ops),
        proposer=proposer,
        vocab_size=arch.vocab_size,
        eos_token_ids=target.eos_token_ids,
    )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that the configuration names."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
