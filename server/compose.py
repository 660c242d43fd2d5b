"""Joins the parts into an engine: kernels, a model, and what `server.drafting` knows of heads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from configs.resolve import ModelFacts, context_length, resolve_model
from configs.schema import Config, KernelsConfig
from drafter.source import resolve_draft
from engine.core import EngineCore
from engine.kv.manager import KVManager
from engine.kv.sizing import free_bytes
from engine.kv.storage import bytes_per_block
from engine.messages import EngineInfo
from engine.models.arch import LlamaArch
from engine.models.checkpoint import open_checkpoint
from engine.models.llama import LlamaLoader
from engine.models.source import resolve_source
from engine.parallel.group import TPGroup
from engine.runner.forward import ForwardContext
from engine.runner.input_builder import InputBuilder
from engine.runner.model_runner import ModelRunner, RunnerParts
from engine.runner.rounds import RoundSettings
from engine.runner.warmup import WarmUp, blocks_per_row
from engine.sampling.sampler import Sampler
from engine.scheduler.scheduler import Scheduler, SchedulerLimits
from engine.spec.lookup import Lookup
from engine.spec.proposer import Proposer
from engine.spec.shape import ROOT
from kernels.native.build import NativeUnavailableError, build_library
from kernels.ops import Ops
from kernels.registry import build_ops
from server.draft_swaps import DraftSwapper
from server.drafting import (
    AUTO,
    Drafting,
    HeadLoader,
    LoadedDraft,
    Target,
    TreeChooser,
    allocate,
    drafting_with,
    torch_dtype,
)

logger = logging.getLogger(__name__)

SCRATCH_ROWS = 16  # sequences that are measured together beside an engine that serves


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine, and what replaces its draft head while it runs."""

    core: EngineCore
    swapper: DraftSwapper


def build_engine(config: Config) -> EngineCore:
    """An engine that keeps its draft head; see `build_swappable_engine`."""
    return build_swappable_engine(config).core


def build_swappable_engine(config: Config) -> Engine:
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
    target = Target(model, arch, eos_token_ids)
    loader = HeadLoader(target, ops, dtype, device, max_len)
    trees = TreeChooser(config)
    draft = _load_draft(config, loader, trees)
    archs = [arch] if draft is None else [arch, draft.head.arch]
    config = resolve_model(config, _model_facts(config, archs, device))
    drafting = None if draft is None else drafting_with(config, draft, ops, device)
    core, runner = _assemble(config, target, ops, device, drafting or Drafting())
    runner.prepare([] if draft is None else trees.shapes(draft.facts))
    if draft is not None:
        core.plan_with(trees.planner(draft, lambda: warm_up(config, runner), at_once=True))
    swapper = DraftSwapper(
        config,
        core,
        runner,
        loader.beside_the_engine(config),
        trees,
        around=functools.partial(_drafting_late, config, ops, device),
        scratch=functools.partial(_scratch, config, target, ops, device),
    )
    return Engine(core, swapper)


def _load_draft(config: Config, loader: HeadLoader, trees: TreeChooser) -> LoadedDraft | None:
    """The configured draft head, once it is sure that it can fill the configured trees."""
    path = resolve_draft(config.speculation.draft, config.model.source)
    if path is None:
        if config.speculation.tree not in (AUTO, ROOT.name):
            raise ValueError(
                f"speculation.tree is {config.speculation.tree!r}, but there is no draft head: set "
                "speculation.draft"
            )
        return None
    trees.shapes(loader.facts(path))
    return loader.load(path)


def _drafting_late(config: Config, ops: Ops, device: torch.device, draft: LoadedDraft) -> Drafting:
    return drafting_with(config, draft, ops, device, late=True)


def warm_up(config: Config, runner: ModelRunner) -> WarmUp:
    """Measures steps of `runner`, whose blocks must be free. `config` must be resolved."""
    assert config.cache.num_blocks is not None
    assert config.model.max_model_len is not None
    return WarmUp(
        runner,
        config.cache.num_blocks,
        config.cache.block_size,
        config.scheduler.max_num_seqs,
        config.scheduler.max_num_batched_tokens,
        config.model.max_model_len,
    )


def _scratch(
    config: Config, target: Target, ops: Ops, device: torch.device, draft: LoadedDraft
) -> WarmUp:
    """Measures steps in a few pages of their own, beside an engine that serves."""
    max_num_seqs = min(config.scheduler.max_num_seqs, SCRATCH_ROWS)
    assert config.cache.num_blocks is not None
    assert config.model.max_model_len is not None
    per_row = blocks_per_row(config.model.max_model_len, config.cache.block_size)
    num_blocks = min(config.cache.num_blocks, max_num_seqs * per_row)
    config = config.model_copy(
        update={
            "cache": config.cache.model_copy(update={"num_blocks": num_blocks}),
            "scheduler": config.scheduler.model_copy(update={"max_num_seqs": max_num_seqs}),
        }
    )
    proposer = drafting_with(config, draft, ops, device).proposer
    return warm_up(config, ModelRunner(_runner_parts(config, target, ops, device, proposer)))


@contextmanager
def backend_can_be_had(kernels: KernelsConfig) -> Iterator[None]:
    """Kernels that were asked for and cannot be built are the configuration's fault: ValueError."""
    try:
        yield
    except NativeUnavailableError as error:
        raise ValueError(f"kernels.backend is {kernels.backend!r}: {error}") from error


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


def _model_facts(config: Config, archs: Sequence[LlamaArch], device: torch.device) -> ModelFacts:
    """Facts of the target (first) and of what shares its block tables."""
    dtype, block_size = torch_dtype(config.model.dtype), config.cache.block_size
    return ModelFacts(
        context_length=archs[0].max_position_embeddings,
        bytes_per_block=sum(
            bytes_per_block(arch.num_layers, block_size, arch.num_kv_heads, arch.head_dim, dtype)
            for arch in archs
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
    core, _ = _assemble(config, target, ops, device, drafting or Drafting())
    return core


def _assemble(
    config: Config, target: Target, ops: Ops, device: torch.device, drafting: Drafting
) -> tuple[EngineCore, ModelRunner]:
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
    scheduler = Scheduler(
        limits,
        kv,
        target.eos_token_ids,
        vocab_size=target.arch.vocab_size,
        lookup=Lookup() if config.speculation.lookup else None,
    )
    runner = ModelRunner(_runner_parts(config, target, ops, device, drafting.proposer))
    info = EngineInfo(
        vocab_size=target.arch.vocab_size,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        eos_token_ids=sorted(target.eos_token_ids),
        ops=ops.backends,
        device=str(device),
        draft=drafting.facts,
    )
    return EngineCore(scheduler, runner, info, drafting.planner), runner


def _runner_parts(
    config: Config, target: Target, ops: Ops, device: torch.device, proposer: Proposer
) -> RunnerParts:
    num_blocks, max_model_len = config.cache.num_blocks, config.model.max_model_len
    assert num_blocks is not None
    assert max_model_len is not None
    arch, block_size = target.arch, config.cache.block_size
    storage = allocate(arch, num_blocks, config, device)
    return RunnerParts(
        model=target.model,
        context=ForwardContext(ops, storage, TPGroup(), proposer.tap),
        inputs=InputBuilder(config.scheduler.max_num_seqs, max_model_len, block_size),
        sampler=Sampler(ops),
        proposer=proposer,
        vocab_size=arch.vocab_size,
        eos_token_ids=target.eos_token_ids,
        rounds=round_settings(config, ops, device),
    )


def round_settings(config: Config, ops: Ops, device: torch.device) -> RoundSettings | None:
    """How decode rounds run: on a CUDA device in one go, as CUDA graphs unless switched off or the
    kernels are references, which wait for the device; on a CPU the host takes part, which computes
    less."""
    if device.type == "cpu":
        return None
    capturable = device.type == "cuda" and ops.backends["attention"] == "triton"
    graphs = capturable and config.kernels.graphs == "auto"
    logger.info("decode rounds: %s", "CUDA graphs" if graphs else "eager")
    return RoundSettings(config.scheduler.max_num_seqs, graphs)
