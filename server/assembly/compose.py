"""Joins the parts into an engine: what `rank.py` builds on every rank, and the scheduler, planner
and followers of rank 0."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from configs.resolve import HostConfig, ResolvedConfig
from configs.schema import Config
from engine.capture import CaptureWriter
from engine.core import EngineCore, Peers
from engine.grammar.gate import Gate
from engine.grammar.grammars import Grammars
from engine.kv.manager import KVManager
from engine.messages import EngineInfo, OperationBackend
from engine.models.footprint import bytes_by_form
from engine.models.freed_memory import return_freed_memory
from engine.models.place import Place
from engine.parallel.distributed import DistributedGroup
from engine.parallel.lockstep import GroupExecutor
from engine.runner.measuring import StepMeter
from engine.runner.runner import ModelRunner, StepSettings
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Lookup
from engine.step.executor import Executor
from engine.step.group import TPGroup
from kernels.native.build import NativeUnavailableError, build_library
from server.assembly.drafting import Drafting, LoadedDraft, Target
from server.assembly.ranks.followers import Followers, device_of
from server.assembly.ranks.rank import (
    Rank,
    build_rank,
    runner_parts,
    step_settings,
    threads_per_rank,
)
from server.assembly.roles.peers import peers_of
from server.assembly.roles.role import Role
from server.assembly.running_requests import Recorded
from server.assembly.swaps import DraftSwapper

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine, the swapper of its draft head, and its other ranks."""

    core: EngineCore
    swapper: DraftSwapper
    followers: Followers
    group: TPGroup

    def close(self) -> None:
        """End the other ranks. No step may follow this call."""
        self.followers.stop(self.group)


def build_engine(config: HostConfig) -> EngineCore:
    """An engine that keeps its draft head; see `build_swappable_engine`. Other ranks end with this
    process."""
    return build_swappable_engine(config).core


def build_swappable_engine(
    config: HostConfig,
    folder: Path | None = None,
    capture: CaptureWriter | None = None,
    role: Role | None = None,
) -> Engine:
    """Load the model that `config` names and put an engine around it. Its ranks meet in `folder`,
    or in one of their own. `capture` is shown every sequence that ends. `role`: among engines that
    hand prompts over; None for one that does all.

    Raises:
        FileNotFoundError, ValueError: the model or the configuration is at fault.
        OSError: there is no process for a rank.
    """
    if config.parallel.roles is not None and role is None:
        raise ValueError(
            f"parallel.roles = {config.parallel.roles}: only aerie serve can have roles"
        )
    device = device_of(0, config)
    followers = Followers.start(config, folder)
    try:
        with followers.progress.step():
            group = followers.meet(config, device)
            eager = role is not None and role.computes_prompts
            rank = build_rank(config, group, device, eager=eager)
        engine = _engine(rank, followers, capture, folder, role)
    except BaseException:
        followers.stop()
        raise
    return_freed_memory()
    _log_ranks(config, group, rank)
    _log_steps(config, rank.place)
    followers.progress.limit = config.parallel.timeout
    return engine


def _engine(
    rank: Rank,
    followers: Followers,
    capture: CaptureWriter | None,
    folder: Path | None,
    role: Role | None,
) -> Engine:
    executor = _on_all_ranks(rank.executor, followers)
    drafting = rank.drafting
    if rank.draft is not None:
        meter = step_meter(rank.config, executor, rank.place)
        planner, _ = rank.trees.choose(rank.draft, lambda: meter, at_once=True)
        drafting = replace(drafting, planner=planner)
    steps = step_settings(rank.config, rank.place)
    core = _core(
        rank.config,
        rank.target,
        rank.place,
        drafting,
        _recorded(executor, folder),
        steps,
        capture,
        rank.grammars,
        None if role is None else peers_of(role, rank.runner, rank.config.parallel.timeout),
    )

    def scratch(draft: LoadedDraft) -> StepMeter:
        followers.orders.open_scratch()
        config, own = rank.scratch(draft)
        return step_meter(config, _on_all_ranks(own, followers, scratch=True), rank.place)

    return Engine(
        core, DraftSwapper(core, rank, followers.orders, scratch), followers, rank.place.group
    )


def _recorded(executor: Executor, folder: Path | None) -> Executor:
    """With a record of what runs in `folder`, for the HTTP process."""
    if folder is None:
        return executor
    try:
        return Recorded(executor, folder)
    except OSError as error:
        logger.warning("requests that may kill the engine will not be known: %s", error)
        return executor


def _on_all_ranks(own: Executor, followers: Followers, *, scratch: bool = False) -> Executor:
    if not followers.processes:
        return own
    return GroupExecutor(own, followers.orders, followers.progress, scratch=scratch)


def step_meter(config: ResolvedConfig, executor: Executor, place: Place) -> StepMeter:
    """Measures steps of `executor`, whose blocks must be free."""
    padding = step_settings(config, place).padding(config.scheduler.max_num_seqs)
    return StepMeter(
        executor,
        config.cache.num_blocks,
        config.cache.block_size,
        config.scheduler.max_num_seqs,
        config.scheduler.max_num_batched_tokens,
        config.model.max_model_len,
        padding,
    )


def _log_ranks(config: HostConfig, group: TPGroup, rank: Rank) -> None:
    if not isinstance(group, DistributedGroup):
        return
    copies = ", each held by several ranks" if group.size > rank.target.arch.num_kv_heads else ""
    whole = config.parallel.experts == "expert"
    logger.info(
        "%d ranks over %s, %d threads each: split are the attention and KV heads%s, the "
        "feed-forward%s and the vocabulary; the draft head is %s",
        group.size,
        group.backend,
        threads_per_rank(config),
        copies,
        " (experts are whole, each on one rank)" if whole else "",
        "absent" if rank.draft is None else config.speculation.draft_parallel,
    )


def runs_ahead(config: Config, steps: StepSettings) -> bool:
    """Whether a step may be launched before the outcome of the previous one is known.

    Raises:
        ValueError: it is configured, but not possible.
    """
    wanted = config.scheduler.run_ahead
    if wanted and steps.exact:
        raise ValueError(
            "scheduler.run_ahead is true, but a CPU carries out steps as they are launched; it "
            "must be false or unset"
        )
    return steps.graphs if wanted is None else wanted


def _log_steps(config: Config, place: Place) -> None:
    settings = step_settings(config, place)
    how = "exact sizes" if settings.exact else "CUDA graphs" if settings.graphs else "padded, eager"
    found = config.speculation.looks_up, runs_ahead(config, settings)
    lookup, ahead = ("on" if one else "off" for one in found)
    logger.info("steps: %s; lookup: %s; run-ahead: %s", how, lookup, ahead)


def prepare_kernels(config: HostConfig) -> str:
    """Compile the native kernels where they can be; says what the engine will use."""
    try:
        return str(build_library(config.files.dir))
    except NativeUnavailableError as error:
        return f"none ({error}); plain torch will be used, which is much slower"


def assemble(
    config: ResolvedConfig,
    target: Target,
    place: Place,
    drafting: Drafting | None = None,
    steps: StepSettings | None = None,
    grammars: Grammars | None = None,
) -> EngineCore:
    """Put an engine of one rank together. `steps`: how they run, None for what is best on the
    device. `grammars`: None if requests may have none."""
    drafting = drafting or Drafting()
    steps = steps or step_settings(config, place)
    parts = runner_parts(config, target, place, drafting.proposer, grammars)
    runner = ModelRunner(replace(parts, steps=steps))
    return _core(config, target, place, drafting, runner, steps, grammars=grammars)


def _core(
    config: ResolvedConfig,
    target: Target,
    place: Place,
    drafting: Drafting,
    executor: Executor,
    steps: StepSettings,
    capture: CaptureWriter | None = None,
    grammars: Grammars | None = None,
    peers: Peers | None = None,
) -> EngineCore:
    cache = config.cache
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=config.model.max_model_len,
        token_time=config.scheduler.token_time,
    )
    scheduler = Scheduler(
        limits,
        KVManager(cache.num_blocks, cache.block_size, cache.prefix_caching),
        target.eos_token_ids,
        vocab_size=target.arch.vocab_size,
        on_finish=None if capture is None else capture.take,
        grammars=grammars,
    )
    info = EngineInfo(
        vocab_size=target.arch.vocab_size,
        max_model_len=config.model.max_model_len,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        hidden_size=target.arch.hidden_size,
        eos_token_ids=sorted(target.eos_token_ids),
        ops={
            name: OperationBackend(backend.name, backend.reason)
            for name, backend in place.ops.backends.items()
        },
        device=str(place.device),
        weights=bytes_by_form(target.model),
        cache_dtype=config.cache.dtype if place.cache else config.model.dtype,
    )
    return EngineCore(
        scheduler,
        executor,
        info,
        drafting.policy(Lookup() if config.speculation.looks_up else None),
        run_ahead=runs_ahead(config, steps),
        captured=capture,
        gate=Gate(grammars),
        peers=peers,
    )
