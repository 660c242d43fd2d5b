"""Draft heads: load one, put a proposer around it, choose its trees."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from configs.schema import Config
from configs.trees import load_tree
from drafter.checkpoint import load_head, read_head_config
from drafter.head_files import open_tensors
from drafter.heads.interface import DraftContext, DraftHead
from drafter.manifest import D2T, T2D
from drafter.proposer import DraftProposer
from engine.checkpoints.arch import LlamaArch
from engine.kv.sizing import free_bytes
from engine.kv.storage import SCRATCH_BLOCKS, KVStorage, bytes_per_block
from engine.messages import DraftFacts
from engine.models.llama import Llama
from engine.parallel.shard import WHOLE, Shard
from engine.runner.warmup import WarmUp
from engine.speculation.measuring import MeasuringPlanner
from engine.speculation.planner import AdaptivePlanner, FixedPlanner, Planner, StepCosts
from engine.speculation.proposer import Proposer, RootProposer
from engine.step.group import TPGroup
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape
from kernels.ops import Ops
from kernels.registry import build_ops

AUTO = "auto"


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
    facts: DraftFacts | None = None  # of the head, if there is one


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A head in memory."""

    head: DraftHead
    facts: DraftFacts

    @property
    def form(self) -> Hashable:
        """Heads of one form cost the same."""
        return (self.facts.kind, self.facts.draft_vocab_size, self.head.arch, self.head.tap_layers)


@dataclass(frozen=True, slots=True)
class HeadLoader:
    """Loads heads for one target."""

    target: Target
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    max_len: int  # positions that can be drafted at
    shard: Shard = WHOLE  # of the target
    replicated: bool = False  # whether every rank holds all of a head's layers

    def beside_the_engine(self, config: Config) -> HeadLoader:
        """A loader for another thread than the engine's. Native operations run one at a time, so
        what loading calls gets a pool of its own, of one thread."""
        assert config.files.dir is not None
        own = build_ops(config.kernels.backend, self.device, self.dtype, 1, config.files.dir)
        assert own.backends == self.ops.backends, "weights would be packed for other kernels"
        ops = replace(self.ops, pack_linear=own.pack_linear, embedding=own.embedding)
        return replace(self, ops=ops)

    def load(self, path: Path) -> LoadedDraft:
        """ValueError that names the file at fault, and in it the tensor or the key."""
        facts = self.facts(path)
        head = load_head(
            path,
            self.target.arch,
            self.target.model.embedding.weight,
            self.target.model.head.weight,
            self.ops,
            self.dtype,
            self.device,
            self.max_len,
            self.shard,
            replicated=self.replicated,
        )
        return LoadedDraft(head, facts)

    def facts(self, path: Path) -> DraftFacts:
        """What the files in `path` say without their weights. Raises as `load`."""
        config = read_head_config(path, self.target.arch)
        tensors = open_tensors(path).items()
        return DraftFacts(
            path=str(path),
            kind=config.kind,
            num_layers=config.arch.num_layers,
            draft_vocab_size=config.draft_vocab_size,
            num_parameters=sum(math.prod(t.shape) for name, t in tensors if name not in (D2T, T2D)),
        )

    def check_room(self, path: Path, config: Config) -> None:
        """ValueError unless a head and its pages fit into the memory that is free now."""
        arch = read_head_config(path, self.target.arch).arch
        assert config.cache.num_blocks is not None
        own = WHOLE if self.replicated else self.shard
        num_kv_heads = own.num_kv_heads(arch.num_kv_heads)
        block = (config.cache.block_size, num_kv_heads, arch.head_dim, self.dtype)
        pages = config.cache.num_blocks * bytes_per_block(arch.num_layers, *block)
        weights = self.facts(path).num_parameters * self.dtype.itemsize // own.size
        free = rank_free_bytes(self.device, self.shard)
        if weights + pages > free:
            raise ValueError(
                f"the head needs {weights} bytes for its weights and {pages} for its entries in "
                f"{config.cache.num_blocks} cache blocks; {free} bytes are free"
            )


def drafting_with(
    config: Config,
    draft: LoadedDraft,
    ops: Ops,
    device: torch.device,
    group: TPGroup,
    *,
    late: bool = False,
) -> Drafting:
    """A proposer with pages of its own, and no trees yet. `late`: tokens are in the cache already
    of which this head never made entries; they read as zeros."""
    arch = draft.head.arch
    pages = allocate(arch, config, device, draft.head.shard, zeroed=late)
    proposer = DraftProposer(
        draft.head,
        DraftContext(ops, pages, group),
        config.scheduler.max_num_seqs,
        arch.hidden_size,
        config.speculation.window,
        config.speculation.shared_noise,
    )
    return Drafting(proposer, facts=draft.facts)


class TreeChooser:
    """Chooses how the trees of a head are planned, and remembers what was measured."""

    def __init__(self, config: Config) -> None:
        self._config = config.speculation
        self._costs: dict[Hashable, StepCosts] = {}

    def shapes(self, facts: DraftFacts) -> list[TreeShape]:
        """The configured tree, or the candidates of `auto`. ValueError for trees that the head
        cannot fill."""
        if self._config.tree != AUTO:
            shapes, setting = [tree_shape(self._config.tree)], "speculation.tree"
        else:
            shapes = [tree_shape(name) for name in self._config.candidates]
            setting = "speculation.candidates"
            for shape in shapes:
                _check_static(shape)
        for shape in shapes:
            _check_vocabulary(shape, facts, setting)
        return shapes

    def planner(
        self, draft: LoadedDraft, warm_up: Callable[[], WarmUp], *, at_once: bool
    ) -> Planner:
        """For `auto`, measure what the candidates cost here and let that decide; `at_once`, or step
        by step while the engine serves."""
        shapes = self.shapes(draft.facts)
        if self._config.tree != AUTO:
            return FixedPlanner(*shapes)
        measure = warm_up()
        fitting = [shape for shape in shapes if measure.fits(shape)]
        if not fitting:
            return FixedPlanner()

        def decide(costs: StepCosts) -> Planner:
            self._costs[draft.form] = costs
            return AdaptivePlanner(fitting, costs)

        if draft.form in self._costs:
            return decide(self._costs[draft.form])
        if at_once:
            return decide(measure.measure([ROOT, *fitting]))
        return MeasuringPlanner(measure.steps([ROOT, *fitting]), decide)


def _check_static(shape: TreeShape) -> None:
    if isinstance(shape, DynamicShape):
        raise ValueError(
            f"speculation.candidates names {shape.name!r}: auto chooses among static trees; a "
            "dynamic one can be set as speculation.tree"
        )


def _check_vocabulary(shape: TreeShape, facts: DraftFacts, setting: str) -> None:
    if isinstance(shape, StaticShape):
        name, width = "most children of a node", max(Counter(shape.parents[1:]).values(), default=0)
    else:
        name, width = "top_k", shape.top_k
    if width > facts.draft_vocab_size:
        raise ValueError(
            f"{setting} names {shape.name!r}, whose {name} is {width}: the draft vocabulary of "
            f"{facts.path} has {facts.draft_vocab_size} tokens, and no more can be told apart"
        )


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


def allocate(
    arch: LlamaArch, config: Config, device: torch.device, shard: Shard, *, zeroed: bool = False
) -> KVStorage:
    """Pages for a rank's part of every layer of a model, the scratch block behind the others.
    `config` must be resolved."""
    assert config.cache.num_blocks is not None
    return KVStorage.allocate(
        arch.num_layers,
        config.cache.num_blocks + SCRATCH_BLOCKS,
        config.cache.block_size,
        shard.num_kv_heads(arch.num_kv_heads),
        arch.head_dim,
        torch_dtype(config.model.dtype),
        device,
        zeroed=zeroed,
    )


def rank_free_bytes(device: torch.device, shard: Shard) -> int:
    """Memory that this rank may take: on a CPU, its share of what all of them have together."""
    return free_bytes(device) // (shard.size if device.type == "cpu" else 1)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that the configuration names."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
