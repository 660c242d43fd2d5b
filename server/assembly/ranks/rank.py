"""What every rank of an engine holds: its part of the model, its pages, its runner."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from configs.resolve import (
    HostConfig,
    ModelFacts,
    ResolvedConfig,
    context_length,
    resolve_model,
)
from configs.schema import CacheConfig, Config, SpeculationConfig, WeightForm
from drafter.source import resolve_draft
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoints.source import resolve_source
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.grammars import Grammars
from engine.kv.sizing import check_reserve
from engine.models.families import load_target
from engine.models.footprint import step_bytes
from engine.models.freed_memory import freed_at_once
from engine.models.place import Place
from engine.parallel.agreement import check_all, smallest
from engine.parallel.lockstep import DriftCheck
from engine.parallel.shard import Shard
from engine.runner.measuring import blocks_per_row, run_largest
from engine.runner.runner import ModelRunner, RunnerParts, StepSettings
from engine.speculation.proposer import Proposer
from engine.step.batch import ForwardContext
from engine.step.executor import Executor
from engine.step.group import TPGroup
from engine.step.shape import ROOT
from kernels.linear.scaled import FP8
from kernels.native.build import build_library, cpu_name
from kernels.ops import CacheScales, Ops
from server.assembly.drafting import (
    AUTO,
    Drafting,
    HeadLoader,
    LoadedDraft,
    Target,
    TreeChooser,
    allocate,
    block_bytes,
    drafting_with,
    rank_free_bytes,
)
from server.assembly.kept_costs import KeptCosts
from server.assembly.operations import configured_ops, torch_dtype
from server.text.chat_codec import ChatCodec, load_codec
from server.text.tokens.tokenizer_files import has_tokenizer

logger = logging.getLogger(__name__)
SCRATCH_ROWS = 16  # most sequences per step when measuring beside a serving engine
BAD_SETUP = (ValueError, OSError, RuntimeError, MemoryError)


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank, ready to run plans."""

    config: ResolvedConfig
    place: Place
    target: Target
    loader: HeadLoader  # for a thread beside the steps
    trees: TreeChooser
    draft: LoadedDraft | None
    drafting: Drafting
    runner: ModelRunner
    grammars: Grammars | None  # on rank 0, if the model has a tokenizer

    @property
    def executor(self) -> Executor:
        """Runs plans on this rank; compares with the other ranks if configured."""
        return self._checked(self.runner)

    def load_draft(self, path: Path) -> tuple[LoadedDraft, Drafting]:
        """Load a head for `ModelRunner.draft_with`; on one thread at a time.

        Raises:
            ValueError, OSError: the head does not fit the target or the free memory.
        """
        self.loader.check_room(path, self.config)
        draft = self.loader.load(path)
        return draft, drafting_with(self.config, draft, self.place, late=True)

    def prepare_swap(self, draft: LoadedDraft | None, drafting: Drafting) -> Iterator[None]:
        """Capture the steps with another head, or with none, one with each item; then
        `ModelRunner.draft_with` finds them."""
        shapes = [] if draft is None else self.trees.shapes(draft.facts)
        return self.runner.prepare_swap(drafting.proposer, shapes)

    def scratch(self, draft: LoadedDraft) -> tuple[ResolvedConfig, Executor]:
        """Runs made-up plans in a few pages of their own, beside an engine that serves."""
        config = _with_few_pages(self.config)
        drafting = drafting_with(config, draft, self.place)
        runner = ModelRunner(runner_parts(config, self.target, self.place, drafting.proposer))
        return config, self._checked(runner)

    def _checked(self, runner: ModelRunner) -> Executor:
        check_every, group = self.config.parallel.check_every, self.place.group
        if group.size == 1 or check_every == 0:
            return runner
        return DriftCheck(runner, group, check_every)


@freed_at_once()
def build_rank(
    config: HostConfig, group: TPGroup, device: torch.device, *, eager: bool = False
) -> Rank:
    """Load this rank's part of what `config` names. All ranks call it, and all of them raise if one
    of them has to. `eager`: the draft head takes all prompts at once, for other engines.

    Raises:
        FileNotFoundError, ValueError: the model or the configuration is at fault.
    """
    try:
        loaded = _load(config, group, device)
    except BAD_SETUP as error:
        if group.size > 1:
            check_all(str(error) or type(error).__name__, group)
        raise
    check_all(None, group)
    place, target, draft = loaded.place, loaded.target, loaded.draft
    resolved = resolve_model(config, _model_facts(config, target, place, draft))
    drafting = Drafting()
    if draft is not None:
        drafting = drafting_with(resolved, draft, place, eager=eager)
    runner = ModelRunner(runner_parts(resolved, target, place, drafting.proposer, loaded.grammars))
    _check_reserve(runner, resolved, target, place)
    runner.prepare([] if draft is None else loaded.trees.shapes(draft.facts))
    return Rank(
        config=resolved,
        place=place,
        target=target,
        loader=loaded.loader.beside_the_engine(config),
        trees=loaded.trees,
        draft=draft,
        drafting=drafting,
        runner=runner,
        grammars=loaded.grammars,
    )


class _Loaded(NamedTuple):
    """What a rank has before it knows how many blocks there will be; see `Rank`."""

    place: Place
    target: Target
    loader: HeadLoader
    trees: TreeChooser
    draft: LoadedDraft | None
    grammars: Grammars | None


def _load(config: HostConfig, group: TPGroup, device: torch.device) -> _Loaded:
    """The part of `build_rank` that needs no other rank."""
    files = resolve_source(config.model.source, config.model.revision)
    checkpoint = open_checkpoint(files)
    arch = checkpoint.arch
    codec = load_codec(config) if has_tokenizer(files) else None
    eos_token_ids = _known_ids(checkpoint.eos_token_ids, arch) | _text_endings(codec, arch)
    # It is built while the weights are loaded.
    grammars = None if codec is None or group.rank else _grammars(codec, arch, eos_token_ids)
    max_len = context_length(config, arch.max_position_embeddings)
    place = _place(config, group, device)
    model = load_target(arch, checkpoint.stored, place, max_len, cache_scales(checkpoint, place))
    target = Target(model, arch, eos_token_ids)
    replicated = config.speculation.draft_parallel == "replicated"
    head_place = place_of_head(config.speculation, place)
    whole, aux = replicated and group.size > 1, config.speculation.aux_layers
    loader = HeadLoader(target, head_place, max_len, whole, aux)
    kept = KeptCosts(config.files.dir, _identity(config, files.version(), target, head_place))
    trees = TreeChooser(config, kept)
    draft = _load_draft(config, loader, trees)
    return _Loaded(place, target, loader, trees, draft, grammars)


def _identity(config: HostConfig, weights: str, target: Target, head_place: Place) -> str:
    """All that the seconds of a step depend on, except the head. `weights`: changes with their
    files."""
    model, ops, device = config.model, head_place.ops, head_place.device
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    backends = sorted((name, backend.name) for name, backend in ops.backends.items())
    library = build_library(config.files.dir).name if ("linear", "native") in backends else ""
    parts = (
        (target.arch, weights),
        (model.weights, model.input_bits, model.dtype, config.cache.dtype),
        (head_place.weights, head_place.mlp_weights),
        (backends, library, config.kernels.graphs, config.kernels.overlap),
        (str(device), processor, threads_per_rank(config), config.parallel.tensor),
        (config.speculation.draft_parallel, config.parallel.experts, config.speculation.window),
        config.scheduler.max_num_seqs,
    )
    return repr(parts)


def _place(config: HostConfig, group: TPGroup, device: torch.device) -> Place:
    threads, dtype = threads_per_rank(config), torch_dtype(config.model.dtype)
    ops = configured_ops(config, device, dtype, threads)
    # Native operations have their own threads; two pools would compete for the cores.
    torch.set_num_threads(1 if ops.backends["linear"].name == "native" else threads)
    form = weight_form(config.model.weights, "model.weights", ops)
    return Place(
        ops,
        dtype,
        device,
        Shard(group.rank, group.size),
        group,
        form,
        cache=cache_type(config.cache, ops, device),
        experts=config.parallel.experts,
    )


def cache_type(config: CacheConfig, ops: Ops, device: torch.device) -> torch.dtype | None:
    """What keys and values of the target are kept in, None for `model.dtype`. ValueError for a GPU
    that does not know it."""
    if config.dtype == "auto":
        return None
    if device.type != "cpu" and "fp8" not in ops.reads:
        raise ValueError(
            "cache.dtype = fp8 needs Triton kernels and a GPU of compute capability 8.9 or more; "
            "auto is possible"
        )
    return FP8


def cache_scales(checkpoint: Checkpoint, place: Place) -> dict[int, CacheScales]:
    """Those of the checkpoint, if keys and values are kept in FP8."""
    if place.cache_dtype is not FP8:
        return {}
    scales = checkpoint.cache_scales()
    if place.shard.rank == 0:
        found = f"the checkpoint's scales for {len(scales)} layers" if scales else "no scales"
        logger.info("keys and values are kept in FP8, with %s", found)
    return scales


def place_of_head(speculation: SpeculationConfig, place: Place) -> Place:
    """Where and in which forms a draft head is kept. ValueError for a form that cannot be read."""
    own, setting = replace(place, cache=None), "speculation.draft_weights"
    best: WeightForm = "q8" if "q8" in place.ops.reads else "plain"
    if speculation.draft_weights == "auto":
        return replace(own, weights=best)
    if speculation.draft_weights == "q4_mlp":
        return replace(own, weights=best, mlp_weights=weight_form("q4", setting, place.ops))
    return replace(own, weights=weight_form(speculation.draft_weights, setting, place.ops))


def weight_form(wanted: WeightForm, setting: str, ops: Ops) -> WeightForm:
    """`wanted`. ValueError if it needs kernels that `ops` does not have."""
    if wanted in ("q8", "q4") and wanted not in ops.reads:
        backend = ops.backends["linear"]
        raise ValueError(
            f"{setting} = {wanted!r} needs native kernels on a CPU (q4: or Triton kernels), but "
            f"linear layers run on {backend}; stored and plain are possible"
        )
    return wanted


def threads_per_rank(config: HostConfig) -> int:
    """Ranks share the machine's cores."""
    return max(1, config.kernels.threads // config.parallel.tensor)


def _load_draft(config: Config, loader: HeadLoader, trees: TreeChooser) -> LoadedDraft | None:
    """The configured draft head, after checking that its vocabulary suffices for the trees."""
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


def _known_ids(eos_token_ids: Collection[int], arch: LlamaArch) -> frozenset[int]:
    for token_id in eos_token_ids:
        if token_id >= arch.vocab_size:
            raise ValueError(
                f"eos_token_id {token_id} is not in the model's vocabulary of {arch.vocab_size}"
            )
    return frozenset(eos_token_ids)


def _text_endings(codec: ChatCodec | None, arch: LlamaArch) -> frozenset[int]:
    """What tokenizer and chat template end an answer with; config.json often lacks these ids."""
    ids = () if codec is None else codec.ending_ids()
    return frozenset(token_id for token_id in ids if token_id < arch.vocab_size)


def _grammars(codec: ChatCodec, arch: LlamaArch, eos_token_ids: frozenset[int]) -> Grammars:
    def build() -> GrammarCompiler:
        return GrammarCompiler.of(codec.tokenizer.to_json(), arch.vocab_size, eos_token_ids)

    return Grammars(build, eos_token_ids)


def _model_facts(
    config: Config, target: Target, place: Place, draft: LoadedDraft | None
) -> ModelFacts:
    """Facts of the target and of what shares its block tables; of the rank with least memory."""
    block = block_bytes(target.arch, config, place)
    if draft is not None:
        block += block_bytes(draft.head.arch, config, place.of_head(draft.head.shard))
    step = largest_step(target.arch, config, place)
    free = max(0, smallest(rank_free_bytes(place), place.group) - step)
    return ModelFacts(target.arch.max_position_embeddings, block, free)


def largest_step(arch: LlamaArch, config: Config, place: Place) -> int:
    """Bytes kept for a step when the cache is sized."""
    scheduler = config.scheduler
    return step_bytes(
        arch,
        place.shard.size,
        place.ops.activation_dtype,
        scheduler.max_num_seqs,
        scheduler.max_num_batched_tokens,
    )


def _check_reserve(
    runner: ModelRunner, config: ResolvedConfig, target: Target, place: Place
) -> None:
    size, scheduler = config.cache.block_size, config.scheduler
    room = min(config.model.max_model_len, config.cache.num_blocks * size)
    num_tokens = min(scheduler.max_num_batched_tokens, room)
    check_reserve(
        lambda: run_largest(runner, num_tokens, size),
        largest_step(target.arch, config, place),
        place.device,
    )


def _with_few_pages(config: ResolvedConfig) -> ResolvedConfig:
    max_num_seqs = min(config.scheduler.max_num_seqs, SCRATCH_ROWS)
    per_row = blocks_per_row(config.model.max_model_len, config.cache.block_size)
    num_blocks = min(config.cache.num_blocks, max_num_seqs * per_row)
    return config.model_copy(
        update={
            "cache": config.cache.model_copy(update={"num_blocks": num_blocks}),
            "scheduler": config.scheduler.model_copy(update={"max_num_seqs": max_num_seqs}),
        }
    )


def runner_parts(
    config: ResolvedConfig,
    target: Target,
    place: Place,
    proposer: Proposer,
    grammars: Grammars | None = None,
) -> RunnerParts:
    """What a `ModelRunner` is made of."""
    storage = allocate(target.arch, config, place)
    return RunnerParts(
        model=target.model,
        context=ForwardContext(place.ops, storage, place.group, proposer.tap),
        proposer=proposer,
        vocab_size=target.arch.vocab_size,
        eos_token_ids=target.eos_token_ids,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_len=config.model.max_model_len,
        steps=step_settings(config, place),
        grammars=grammars,
    )


def step_settings(config: Config, place: Place) -> StepSettings:
    """How steps run: on a CPU with exact sizes, which computes least; on a CUDA device padded, as
    CUDA graphs unless these are off or the kernels are the references, which wait for the
    device."""
    if place.device.type == "cpu":
        return StepSettings(exact=True)
    capturable = place.device.type == "cuda" and place.ops.backends["attention"].name == "triton"
    return StepSettings(exact=False, graphs=capturable and config.kernels.graphs == "auto")
