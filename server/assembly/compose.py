"""Joins the parts into an engine: what `rank.py` builds on every rank, and the scheduler, the
planner and the followers of rank 0."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import Config, KernelsConfig
from engine.core import EngineCore
from engine.kv.manager import KVManager
from engine.messages import EngineInfo
from engine.parallel.distributed import DistributedGroup
from engine.parallel.lockstep import GroupExecutor
from engine.parallel.plan_codec import PlanEncoder
from engine.parallel.shard import WHOLE
from engine.runner.model_runner import ModelRunner
from engine.runner.warmup import PlanExecutor, WarmUp
from engine.scheduler.scheduler import Scheduler, SchedulerLimits
from engine.speculation.lookup import Lookup
from engine.step.group import TPGroup
from kernels.native.build import NativeUnavailableError, build_library
from kernels.ops import Ops
from server.assembly.drafting import Drafting, LoadedDraft, Target
from server.assembly.followers import Followers, device_of
from server.assembly.rank import (
    Place,
    Rank,
    build_rank,
    round_settings,
    runner_parts,
    threads_per_rank,
)
from server.assembly.swaps import DraftSwapper

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine, what replaces its draft head while it runs, and its other ranks."""

    core: EngineCore
    swapper: DraftSwapper
    followers: Followers
    group: TPGroup

    def close(self) -> None:
        """End the other ranks. No step may follow."""
        self.followers.stop(self.group)


def build_engine(config: Config) -> EngineCore:
    """An engine that keeps its draft head; see `build_swappable_engine`. Other ranks end with this
    process."""
    return build_swappable_engine(config).core


def build_swappable_engine(config: Config, folder: Path | None = None) -> Engine:
    """Load the model that `config` (resolved for its host) names and put an engine around it. Its
    ranks meet in `folder`, or in one of their own.

    Raises:
        FileNotFoundError, ValueError: the model or the configuration is at fault.
        NativeUnavailableError: native kernels were asked for and cannot be built.
        OSError: there is no process for a rank.
    """
    device = device_of(0, config)
    followers = Followers.start(config, folder)
    try:
        with followers.progress.step():
            group = followers.meet(config, device)
            rank = build_rank(config, group, device)
        engine = _engine(rank, followers)
    except BaseException:
        followers.stop()
        raise
    _log_ranks(config, group, rank)
    _log_steps(config, rank.place)
    followers.progress.limit = config.parallel.timeout
    return engine


def _engine(rank: Rank, followers: Followers) -> Engine:
    executor = _on_all_ranks(rank.executor, rank.config, followers)
    core = _core(rank.config, rank.target, rank.place, rank.drafting, executor)
    if rank.draft is not None:
        measure = warm_up(rank.config, executor)
        core.plan_with(rank.trees.planner(rank.draft, lambda: measure, at_once=True))

    def scratch(draft: LoadedDraft) -> WarmUp:
        followers.orders.open_scratch()
        config, own = rank.scratch(draft)
        return warm_up(config, _on_all_ranks(own, config, followers, scratch=True))

    return Engine(
        core, DraftSwapper(core, rank, followers.orders, scratch), followers, rank.place.group
    )


def _on_all_ranks(
    own: PlanExecutor, config: Config, followers: Followers, *, scratch: bool = False
) -> PlanExecutor:
    if not followers.processes:
        return own
    encoder = PlanEncoder(config.cache.block_size, scratch=scratch)
    return GroupExecutor(own, encoder, followers.broadcast, followers.progress)


def warm_up(config: Config, executor: PlanExecutor) -> WarmUp:
    """Measures steps of `executor`, whose blocks must be free. `config` must be resolved."""
    assert config.cache.num_blocks is not None
    assert config.model.max_model_len is not None
    return WarmUp(
        executor,
        config.cache.num_blocks,
        config.cache.block_size,
        config.scheduler.max_num_seqs,
        config.scheduler.max_num_batched_tokens,
        config.model.max_model_len,
    )


def _log_ranks(config: Config, group: TPGroup, rank: Rank) -> None:
    if not isinstance(group, DistributedGroup):
        return
    copies = ", each held by several ranks" if group.size > rank.target.arch.num_kv_heads else ""
    logger.info(
        "%d ranks over %s, %d threads each: split are the attention and KV heads%s, the "
        "feed-forward and the vocabulary; the draft head is %s",
        group.size,
        group.backend,
        threads_per_rank(config),
        copies,
        "absent" if rank.draft is None else config.speculation.draft_parallel,
    )


def looks_up(config: Config, place: Place) -> bool:
    """Whether drafts from the text itself are wanted. They do not go through decode rounds: where
    those are CUDA graphs, a step without one would cost more than lookups bring."""
    if config.speculation.lookup is not None:
        return config.speculation.lookup
    rounds = round_settings(config, place)
    return rounds is None or not rounds.graphs


def runs_ahead(config: Config, place: Place) -> bool:
    """Whether a decode round is launched before the outcome of the one before is known.

    Raises:
        ValueError: it is asked for, and cannot be.
    """
    wanted, obstacle = config.scheduler.run_ahead, _against_running_ahead(config, place)
    if wanted and obstacle is not None:
        raise ValueError(f"scheduler.run_ahead is true, but {obstacle}")
    if wanted is not None:
        return wanted
    rounds = round_settings(config, place)
    return obstacle is None and rounds is not None and rounds.graphs


def _against_running_ahead(config: Config, place: Place) -> str | None:
    """What makes the host take part in every step, None if nothing does."""
    if round_settings(config, place) is None:
        return "decode steps on a CPU go through the host; it must be false or unset"
    if config.parallel.tensor > 1:
        return "parallel.tensor is more than 1: followers take one step at a time"
    if looks_up(config, place):
        return "lookup is on, which needs to know all tokens: set speculation.lookup=false"
    return None


def _log_steps(config: Config, place: Place) -> None:
    rounds = round_settings(config, place)
    how = "through the host" if rounds is None else "CUDA graphs" if rounds.graphs else "eager"
    found = looks_up(config, place), runs_ahead(config, place)
    lookup, ahead = ("on" if one else "off" for one in found)
    logger.info("decode rounds: %s; lookup: %s; run-ahead: %s", how, lookup, ahead)


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


def assemble(
    config: Config,
    target: Target,
    ops: Ops,
    device: torch.device,
    drafting: Drafting | None = None,
) -> EngineCore:
    """Put an engine of one rank together. `config` must be resolved: no size left open."""
    drafting = drafting or Drafting()
    place = Place(TPGroup(), WHOLE, device, ops)
    runner = ModelRunner(runner_parts(config, target, place, drafting.proposer))
    return _core(config, target, place, drafting, runner)


def _core(
    config: Config, target: Target, place: Place, drafting: Drafting, executor: PlanExecutor
) -> EngineCore:
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
        lookup=Lookup() if looks_up(config, place) else None,
    )
    info = EngineInfo(
        vocab_size=target.arch.vocab_size,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        eos_token_ids=sorted(target.eos_token_ids),
        ops=place.ops.backends,
        device=str(place.device),
        draft=drafting.facts,
    )
    core = EngineCore(scheduler, executor, info, drafting.planner)
    if runs_ahead(config, place):
        assert isinstance(executor, ModelRunner), "one rank, nothing around its runner"
        core.launch_with(executor)
    return core
