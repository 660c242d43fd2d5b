"""A complete engine whose ranks are threads: rank 0 sends orders over a board, the others follow.

Unlike ranks in processes, these can run padded steps, and run ahead, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import torch

from configs.resolve import HostConfig
from engine.completion import Completion
from engine.core import EngineCore
from engine.grammar.gate import Gate
from engine.kv.manager import KVManager
from engine.messages import EngineInfo, EngineStats
from engine.parallel.lockstep import GroupExecutor, Progress
from engine.parallel.orders import Order, Orders, RunStep
from engine.parallel.transport import Broadcast, Inbox
from engine.request import Request
from engine.runner.measuring import StepMeter
from engine.runner.runner import ModelRunner, StepSettings
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Lookup
from engine.speculation.planner import Planner
from engine.step.group import TPGroup
from engine.step.plan import StepPlan
from server.assembly.drafting import LoadedDraft
from server.assembly.ranks.rank import Rank, build_rank, runner_parts
from server.assembly.swaps import DraftSwapper
from server.process.follower import Follower
from tests.support.engines.in_process import generate
from tests.support.ranks.inboxes import connected
from tests.support.ranks.thread_group import run_ranks
from tests.support.waiting import DEADLINE

T = TypeVar("T")
EXACT, PADDED = StepSettings(exact=True), StepSettings(exact=False)


@dataclass(frozen=True)
class Way:
    """How an engine runs."""

    size: int = 1  # ranks
    steps: StepSettings = EXACT
    run_ahead: bool = False
    lookup: bool = False


@dataclass(frozen=True)
class Leader:
    """Rank 0 of a running engine."""

    core: EngineCore
    swapper: DraftSwapper


@dataclass(frozen=True)
class Heard:
    """The messages to clients and followers."""

    texts: dict[str, Completion]
    stats: EngineStats
    orders: list[list[Order]]  # of each follower

    @property
    def plans(self) -> list[StepPlan]:
        """The plans that the first follower was told to run."""
        return [order.plan for order in self.orders[0] if isinstance(order, RunStep)]


@dataclass
class NotingInbox:
    """An inbox that keeps a copy of its messages."""

    inbox: Inbox
    orders: list[Order] = field(default_factory=list)

    def receive(self) -> bytes | None:
        frame = self.inbox.receive()
        if frame is not None:
            self.orders.append(msgspec.msgpack.decode(frame, type=Order))
        return frame


def answer(
    config: HostConfig,
    way: Way,
    requests: list[Request],
    planner: Planner,
    per_step: int | None = None,
) -> Heard:
    """The messages of an engine whose ranks all run in this process."""

    def work(leader: Leader) -> tuple[dict[str, Completion], EngineStats]:
        texts = generate(leader.core, requests, per_step=per_step)
        return texts, leader.core.stats()

    (texts, stats), orders = lead(config, way, planner, work)
    return Heard(texts, stats, orders)


def lead(
    config: HostConfig, way: Way, planner: Planner, work: Callable[[Leader], T]
) -> tuple[T, list[list[Order]]]:
    """The result of `work` on rank 0, and the orders that each follower got."""
    broadcast, ends = connected(way.size - 1) if way.size > 1 else (Broadcast([]), [])
    inboxes = [NotingInbox(inbox) for inbox, _ in ends]
    orders = Orders(broadcast)

    def on_rank(group: TPGroup) -> list[T]:
        if group.rank:
            follower, (_, channel) = inboxes[group.rank - 1], ends[group.rank - 1]
            Follower(_rank(config, group, way), follower, channel).run()  # type: ignore[arg-type]
            return []
        try:
            return [work(_leader(_rank(config, group, way), orders, way, planner))]
        finally:
            orders.stop()

    try:
        (found,), *_ = [on_rank(TPGroup())] if way.size == 1 else run_ranks(way.size, on_rank)
    finally:
        broadcast.close()
        for inbox, _ in ends:
            inbox.close()
    return found, [inbox.orders for inbox in inboxes]


def _rank(config: HostConfig, group: TPGroup, way: Way) -> Rank:
    rank = build_rank(config, group, torch.device("cpu"))
    drafting = rank.drafting
    parts = runner_parts(rank.config, rank.target, rank.place, drafting.proposer, rank.grammars)
    return replace(rank, runner=ModelRunner(replace(parts, steps=way.steps)))


def _leader(rank: Rank, orders: Orders, way: Way, planner: Planner) -> Leader:
    executor = rank.executor
    if way.size > 1:
        executor = GroupExecutor(executor, orders, Progress(DEADLINE))
    policy = replace(rank.drafting, planner=planner).policy(Lookup() if way.lookup else None)
    gate = Gate(rank.grammars)
    core = EngineCore(
        _scheduler(rank), executor, _info(rank), policy, run_ahead=way.run_ahead, gate=gate
    )
    return Leader(core, DraftSwapper(core, rank, orders, _no_scratch))


def _scheduler(rank: Rank) -> Scheduler:
    settings, cache = rank.config.scheduler, rank.config.cache
    max_len = rank.config.model.max_model_len
    limits = SchedulerLimits(settings.max_num_seqs, settings.max_num_batched_tokens, max_len)
    kv = KVManager(cache.num_blocks, cache.block_size, cache.prefix_caching)
    target = rank.target
    return Scheduler(
        limits,
        kv,
        target.eos_token_ids,
        vocab_size=target.arch.vocab_size,
        grammars=rank.grammars,
    )


def _info(rank: Rank) -> EngineInfo:
    return EngineInfo(
        vocab_size=rank.target.arch.vocab_size,
        max_model_len=rank.config.model.max_model_len,
        num_blocks=rank.config.cache.num_blocks,
        block_size=rank.config.cache.block_size,
        hidden_size=rank.target.arch.hidden_size,
        eos_token_ids=sorted(rank.target.eos_token_ids),
        ops={},
        device="cpu",
    )


def _no_scratch(draft: LoadedDraft) -> StepMeter:
    raise AssertionError(f"{draft.facts.path} is measured, which no planner here asks for")
