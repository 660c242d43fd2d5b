"""Engines of several ranks for many cases, whose processes are started once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.load import load_config
from configs.resolve import HostFacts, resolve_host
from engine.core import EngineCore
from engine.kv.manager import KVManager
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Lookup
from engine.speculation.planner import FixedPlanner, Planner
from engine.speculation.policy import DraftPolicy
from server.assembly.compose import Engine, build_swappable_engine
from tests.support.machine.threads import own_torch_threads
from tests.support.waiting import DEADLINE

NUM_BLOCKS = 256


@dataclass(frozen=True)
class Ranks:
    """An engine of several ranks, or of one; idle between cases."""

    engine: Engine

    @contextmanager
    def core(
        self,
        planner: Planner | None = None,
        *,
        num_blocks: int = NUM_BLOCKS,
        prefix_caching: bool = True,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 256,
        max_model_len: int = 256,
        lookup: bool = False,
    ) -> Iterator[EngineCore]:
        """A new scheduler, with an empty cache, for the same ranks."""
        own = self.engine.core
        limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens, max_model_len)
        scheduler = Scheduler(
            limits,
            KVManager(num_blocks, own.info.block_size, prefix_caching),
            frozenset(own.info.eos_token_ids),
            vocab_size=own.info.vocab_size,
        )
        policy = DraftPolicy(
            planner or FixedPlanner(),
            lookahead=own.policy.lookahead,
            lookup=Lookup() if lookup else None,
            facts=own.policy.facts,
        )
        # Ranks count their steps, so the same executor must continue.
        core = EngineCore(scheduler, own._executor, own.info, policy)
        yield core
        core.abort_all("the case is over")
        core.step()  # tells the ranks which rows have left


@contextmanager
def started(model: Path, cache: Path, *overrides: str) -> Iterator[Ranks]:
    """Ranks for the model in the directory `model`, in float32, one thread each."""
    settings = [
        f"model.source={model}",
        "model.dtype=float32",
        f"cache.num_blocks={NUM_BLOCKS}",
        "scheduler.max_num_batched_tokens=256",
        "scheduler.max_num_seqs=16",
        "speculation.tree=root",
        f"parallel.timeout={DEADLINE}",
        "parallel.check_every=3",
        *overrides,
    ]
    with own_torch_threads():
        engine = build_swappable_engine(
            resolve_host(load_config(None, settings), HostFacts(1, cache))
        )
        try:
            yield Ranks(engine)
        finally:
            engine.close()
