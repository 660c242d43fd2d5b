"""Joins the parts into an engine: the one module that knows kernels, models and drafters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from configs.resolve import ModelFacts, context_length, resolve_model
from configs.schema import Config
from configs.trees import load_tree
from drafter.checkpoint import load_head
from drafter.heads.interface import DraftContext, DraftHead
from drafter.proposer import DraftProposer
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
from engine.runner.warmup import WarmUp
from engine.sampling.sampler import Sampler
from engine.scheduler.scheduler import Scheduler, SchedulerLimits
from engine.spec.planner import AdaptivePlanner, FixedPlanner, Planner
from engine.spec.proposer import Proposer, RootProposer
from engine.spec.shape import ROOT, DynamicShape, StaticShape, TreeShape
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
    target = Target(model, arch, eos_token_ids)
    head = _load_head(config, target, ops, device, max_len)
    archs = [arch] if head is None else [arch, head.arch]
    config = resolve_model(config, _model_facts(config, archs, device))
    if head is None:
        return assemble(config, target, ops, device)
    drafting = _drafting(config, head, ops, device)
    return _choose_trees(config, assemble(config, target, ops, device, drafting))


def _load_head(
    config: Config, target: Target, ops: Ops, device: torch.device, max_len: int
) -> DraftHead | None:
    """The configured draft head, with the target's embedding and LM head where it has none."""
    if config.speculation.draft is None:
        if config.speculation.tree not in ("auto", ROOT.name):
            raise ValueError(
                f"speculation.tree is {config.speculation.tree!r}, but there is no draft head: set "
                "speculation.draft"
            )
        return None
    return load_head(
        Path(config.speculation.draft).expanduser(),
        target.arch,
        target.model.embedding.weight,
        target.model.head.weight,
        ops,
        torch_dtype(config.model.dtype),
        device,
        max_len,
    )


def _drafting(config: Config, head: DraftHead, ops: Ops, device: torch.device) -> Drafting:
    """A proposer with pages of its own; trees as configured, or none yet for `auto`."""
    num_blocks = config.cache.num_blocks
    assert num_blocks is not None
    pages = _allocate(head.arch, num_blocks, config, device)
    proposer = DraftProposer(
        head,
        DraftContext(ops, pages),
        config.scheduler.max_num_seqs,
        head.arch.hidden_size,
        config.speculation.window,
        config.speculation.shared_noise,
    )
    name = config.speculation.tree
    return Drafting(proposer, FixedPlanner(ROOT if name == "auto" else tree_shape(name)))


def _choose_trees(config: Config, core: EngineCore) -> EngineCore:
    """For `auto`, measure what the candidates cost here and let that decide."""
    if config.speculation.tree != "auto":
        return core
    assert config.cache.num_blocks is not None
    assert config.model.max_model_len is not None
    shapes = [tree_shape(name) for name in config.speculation.candidates]
    for shape in shapes:
        if isinstance(shape, DynamicShape):
            raise ValueError(
                f"speculation.candidates names {shape.name!r}: auto chooses among static trees; a "
                "dynamic one can be set as speculation.tree"
            )
    warm_up = WarmUp(
        core.executor,
        config.cache.num_blocks,
        config.cache.block_size,
        config.scheduler.max_num_seqs,
        config.scheduler.max_num_batched_tokens,
        config.model.max_model_len,
    )
    fitting = [shape for shape in shapes if warm_up.fits(shape)]
    if fitting:
        core.plan_with(AdaptivePlanner(fitting, warm_up.measure([ROOT, *fitting])))
    return core


def tree_shape(name: str) -> TreeShape:
    """The shape that the configuration names. ValueError for a bad one."""
    if name == ROOT.name:
        return ROOT
    tree = load_tree(name)
    if tree.parents is not None:
        return StaticShape(name, tree.parents)
    assert tree.num_nodes is not None
    assert tree.max_depth is not None
    assert tree.top_k is not None
    return DynamicShape(name, tree.num_nodes, tree.max_depth, tree.top_k)


def _allocate(arch: LlamaArch, num_blocks: int, config: Config, device: torch.device) -> KVStorage:
    """Pages for every layer of a model."""
    return KVStorage.allocate(
        arch.num_layers,
        num_blocks,
        config.cache.block_size,
        arch.num_kv_heads,
        arch.head_dim,
        torch_dtype(config.model.dtype),
        device,
    )


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
    storage = _allocate(arch, num_blocks, config, device)
    return RunnerParts(
        model=target.model,
        context=ForwardContext(ops, storage, TPGroup(), proposer.tap),
        inputs=InputBuilder(config.scheduler.max_num_seqs, max_model_len, block_size, device),
        sampler=Sampler(ops),
        proposer=proposer,
        vocab_size=arch.vocab_size,
        eos_token_ids=target.eos_token_ids,
    )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that the configuration names."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
