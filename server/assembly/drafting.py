"""Draft heads: load a head, build its proposer, choose its trees."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.resolve import HostConfig, ResolvedConfig
from configs.schema import AuxLayers, Config
from configs.trees import StaticTree, load_tree
from drafter.checkpoint import load_head, read_head_config
from drafter.head_files import open_tensors
from drafter.heads.building import HeadBuilder, TargetWeights
from drafter.heads.interface import DraftContext, DraftHead
from drafter.manifest import D2T, T2D
from drafter.proposer import DraftProposer
from engine.checkpoints.arch import LlamaArch
from engine.kv.sizing import free_bytes
from engine.kv.storage import SCRATCH_BLOCKS, KVStorage, bytes_per_block
from engine.messages import DraftFacts
from engine.models.interface import LoadedModel
from engine.models.place import Place
from engine.runner.measuring import StepMeter
from engine.speculation.costs import StepCosts
from engine.speculation.lookup import Lookup
from engine.speculation.planner import AdaptivePlanner, FixedPlanner, Planner
from engine.speculation.policy import DraftPolicy, Measuring
from engine.speculation.proposer import Proposer, RootProposer
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape
from server.assembly.kept_costs import KeptCosts
from server.assembly.operations import configured_ops

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target model and the facts that the engine needs."""

    model: LoadedModel
    arch: LlamaArch
    eos_token_ids: frozenset[int]

    @property
    def weights(self) -> TargetWeights:
        """What a head may share."""
        return TargetWeights(self.arch, self.model.embedding.weight, self.model.head.weight)


@dataclass(frozen=True, slots=True)
class Drafting:
    """The proposer of trees and the planner of their shapes."""

    proposer: Proposer = field(default_factory=RootProposer)
    planner: Planner = field(default_factory=FixedPlanner)
    facts: DraftFacts | None = None  # of the head, if any
    measuring: Measuring | None = None  # steps to measure before trees can be chosen

    def policy(self, lookup: Lookup | None) -> DraftPolicy:
        """The policy for the core. `lookup`: prompt lookup, if on."""
        lookahead = self.proposer.lookahead
        return DraftPolicy(self.planner, lookahead, lookup, self.facts, self.measuring)


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A head in memory."""

    head: DraftHead
    facts: DraftFacts

    @property
    def form(self) -> Hashable:
        """Heads with equal forms take equal time."""
        return (self.facts.kind, self.facts.draft_vocab_size, self.head.arch, self.head.tap_layers)


@dataclass(frozen=True, slots=True)
class HeadLoader:
    """Loads heads for one target."""

    target: Target
    place: Place  # the target's
    max_len: int  # positions that can be drafted at
    replicated: bool = False  # whether every rank holds all of a head's layers
    aux: AuxLayers = "auto"  # what a head's ids of target layers mean

    def beside_the_engine(self, config: HostConfig) -> HeadLoader:
        """A loader for another thread than the engine's. Native operations run one at a time, so
        what loading calls gets a pool of its own, of one thread."""
        place, ops = self.place, self.place.ops
        if ops.backends["linear"].name == "reference":
            return self  # plain torch; to try for native operations again would take long
        own = configured_ops(config, place.device, place.dtype, 1)
        for name in ("linear", "embedding"):
            assert own.backends[name] == ops.backends[name], "weights would be packed otherwise"
        ops = replace(ops, pack_linear=own.pack_linear, embedding=own.embedding)
        return replace(self, place=replace(place, ops=ops))

    def load(self, path: Path) -> LoadedDraft:
        """Load a head. ValueError that names the invalid file and its tensor or key."""
        facts = self.facts(path)
        head = load_head(path, self._builder, self.aux)
        self.place.await_weights()
        return LoadedDraft(head, facts)

    def facts(self, path: Path) -> DraftFacts:
        """Facts of the head in `path`, without reading weights. Raises as `load`."""
        config = read_head_config(path, self.target.arch, self.aux)
        tensors = open_tensors(path).items()
        return DraftFacts(
            path=str(path),
            kind=config.kind,
            num_layers=config.arch.num_layers,
            draft_vocab_size=config.draft_vocab_size,
            num_parameters=sum(math.prod(t.shape) for name, t in tensors if name not in (D2T, T2D)),
            tap_layers=config.tap_layers(self.target.arch),
            max_depth=config.max_depth,
        )

    def check_room(self, path: Path, config: ResolvedConfig) -> None:
        """ValueError unless a head and its pages fit into the memory that is free now."""
        arch = read_head_config(path, self.target.arch, self.aux).arch
        own = self._builder.layers_place
        pages = config.cache.num_blocks * block_bytes(arch, config, own)
        weights = self.facts(path).num_parameters * own.dtype.itemsize // own.shard.size
        free = rank_free_bytes(self.place)
        if weights + pages > free:
            raise ValueError(
                f"the head needs {weights} bytes for its weights and {pages} for its entries in "
                f"{config.cache.num_blocks} cache blocks; {free} bytes are free"
            )

    @property
    def _builder(self) -> HeadBuilder:
        return HeadBuilder(self.target.weights, self.place, self.max_len, self.replicated)


def drafting_with(
    config: ResolvedConfig,
    draft: LoadedDraft,
    place: Place,
    *,
    late: bool = False,
    eager: bool = False,
) -> Drafting:
    """A proposer with its own pages, and no trees yet. `late`: the cache already holds tokens for
    which this head has no entries; these read as zeros. `eager`: as in `DraftProposer`."""
    arch = draft.head.arch
    pages = allocate(arch, config, place.of_head(draft.head.shard), zeroed=late)
    proposer = DraftProposer(
        draft.head,
        DraftContext(place.ops, pages, place.group),
        config.scheduler.max_num_seqs,
        arch.hidden_size,
        config.speculation.window,
        config.speculation.shared_noise,
        eager=eager,
    )
    return Drafting(proposer, facts=draft.facts)


class TreeChooser:
    """Chooses how the trees of a head are planned, and remembers what was measured."""

    def __init__(self, config: Config, kept: KeptCosts | None = None) -> None:
        """`kept`: costs of earlier starts."""
        self._config = config.speculation
        self._kept = kept
        self._costs: dict[Hashable, StepCosts] = {}

    def shapes(self, facts: DraftFacts) -> list[TreeShape]:
        """The configured tree, or the candidates of `auto`. ValueError for trees too wide for the
        draft vocabulary."""
        if self._config.tree != AUTO:
            shapes, setting = [tree_shape(self._config.tree)], "speculation.tree"
        else:
            shapes = [tree_shape(name) for name in self._config.candidates]
            setting = "speculation.candidates"
            for shape in shapes:
                _static(shape)
        for shape in shapes:
            _check_vocabulary(shape, facts, setting)
            _check_depth(shape, facts, setting)
        return shapes

    def choose(
        self, draft: LoadedDraft, meter_of: Callable[[], StepMeter], *, at_once: bool
    ) -> tuple[Planner, Measuring | None]:
        """A planner, and the steps to measure before trees can be chosen. `auto` decides by the
        times of the candidates on this machine; they are measured `at_once`, or later by the core,
        step by step while it serves."""
        shapes = self.shapes(draft.facts)
        if self._config.tree != AUTO:
            return FixedPlanner(shapes[0]), None
        meter = meter_of()
        fitting = [shape for shape in map(_static, shapes) if meter.fits(shape)]
        if not fitting:
            return FixedPlanner(), None

        def decide(costs: StepCosts) -> Planner:
            self._costs[draft.form] = costs
            self._keep(draft, costs)
            return AdaptivePlanner(
                fitting, costs, meter.padding, lambda costs: self._keep(draft, costs)
            )

        known = self._known(draft)
        if known is not None and (not at_once or meter.agrees(known, fitting[0])):
            return decide(known), None
        few = list(dict.fromkeys([ROOT, fitting[0], fitting[-1]]))
        if at_once:
            return decide(meter.measure(few)), None
        return FixedPlanner(), Measuring(meter.steps(few), decide)

    def _known(self, draft: LoadedDraft) -> StepCosts | None:
        """Costs with such a head, of this engine or of an earlier start."""
        if draft.form not in self._costs and self._kept is not None:
            return self._kept.load(draft.form)
        return self._costs.get(draft.form)

    def _keep(self, draft: LoadedDraft, costs: StepCosts) -> None:
        if self._kept is not None:
            self._kept.save(draft.form, costs)


def _static(shape: TreeShape) -> StaticShape:
    if not isinstance(shape, StaticShape):
        raise ValueError(
            f"speculation.candidates names {shape.name!r}: auto chooses among static trees; a "
            "dynamic one can be set as speculation.tree"
        )
    return shape


def _check_vocabulary(shape: TreeShape, facts: DraftFacts, setting: str) -> None:
    if shape.most_children > facts.draft_vocab_size:
        raise ValueError(
            f"{setting} names {shape.name!r}, in which a node has up to {shape.most_children} "
            f"children: the draft vocabulary of {facts.path} has {facts.draft_vocab_size} tokens, "
            "and no more can be told apart"
        )


def _check_depth(shape: TreeShape, facts: DraftFacts, setting: str) -> None:
    if facts.max_depth is not None and shape.max_depth > facts.max_depth:
        raise ValueError(
            f"{setting} names {shape.name!r}, which is {shape.max_depth} tokens deep: the head "
            f"{facts.path} drafts at most {facts.max_depth} at once"
        )


def tree_shape(name: str) -> TreeShape:
    """The tree shape of a name in the configuration. ValueError for an invalid one."""
    if name == ROOT.name:
        return ROOT
    tree = load_tree(name)
    if isinstance(tree, StaticTree):
        return StaticShape(name, tree.parents)
    return DynamicShape(name, tree.num_nodes, tree.max_depth, tree.top_k)


def allocate(
    arch: LlamaArch, config: ResolvedConfig, place: Place, *, zeroed: bool = False
) -> KVStorage:
    """Pages for a rank's part of every layer of a model, the scratch block after the others."""
    return KVStorage.allocate(
        arch.num_layers,
        config.cache.num_blocks + SCRATCH_BLOCKS,
        config.cache.block_size,
        place.shard.num_kv_heads(arch.num_kv_heads),
        arch.head_dim,
        place.cache_dtype,
        place.device,
        zeroed=zeroed,
    )


def block_bytes(arch: LlamaArch, config: Config, place: Place) -> int:
    """What a block of a rank's part of every layer of a model takes."""
    num_kv_heads = place.shard.num_kv_heads(arch.num_kv_heads)
    size = config.cache.block_size
    return bytes_per_block(arch.num_layers, size, num_kv_heads, arch.head_dim, place.cache_dtype)


def rank_free_bytes(place: Place) -> int:
    """Memory that this rank may take: on a CPU, its share of what all of them have together."""
    return free_bytes(place.device) // (place.shard.size if place.device.type == "cpu" else 1)
