"""Which tuning of the attention kernel is fastest for one row of a model on this device.

Only the device can tell: it depends on how long loads, launches and barriers take there.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from kernels.attention.triton_kernel import BLOCK_SIZE, attention, plans_of
from kernels.attention.triton_plan import SHORT_STEPS, TUNINGS, Tuning
from kernels.ops import AttentionMeta

CONTEXTS = (300, 8192)
TABLE_POSITIONS = 8192  # that tables have room for: plans are made for them
POOL_BYTES = 2**27  # of keys, and as many of values: more than a cache holds
CALLS, REPLAYS = 32, 5
AGREEMENT = 2e-2  # how far results may be apart; softmax weights are rounded to bfloat16

Run = Callable[[], object]
Timer = Callable[[Sequence[Run]], float]  # seconds of one of these runs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention of a model on one rank."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of queries
    cache: torch.dtype  # of keys and values


@dataclass(slots=True)
class Choice:
    """Seconds of every tuning that gives the results of the first, for each context."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The one whose times, relative to the best of each context, have the least sum."""
        best = [min(times) for times in zip(*self.seconds.values(), strict=True)]
        ratios = {
            name: sum(time / least for time, least in zip(times, best, strict=True))
            for name, times in self.seconds.items()
        }
        return min(ratios, key=ratios.__getitem__)

    def __str__(self) -> str:
        parts = [
            f"{name} {' and '.join(f'{1e6 * time:.1f}' for time in times)} us"
            for name, times in self.seconds.items()
        ]
        return ", ".join(parts)


def choose_tuning(
    heads: Heads,
    device: torch.device,
    timer: Timer | None = None,
    contexts: Sequence[int] = CONTEXTS,
    pool_bytes: int = POOL_BYTES,
) -> Choice:
    """Time all tunings that cut one row differently, on made-up keys, and log the times. A tuning
    that cannot run or gives other results is left out with a warning.

    Args:
        timer: for tests; by default, a CUDA graph of the runs.
        contexts: lengths to time, at most TABLE_POSITIONS.
    """
    timer = timer or graph_seconds
    lab = _Lab.of(heads, device, pool_bytes)
    choice = Choice()
    for name, tuning in lab.different().items():
        try:
            if name != SHORT_STEPS.name and not lab.agrees(tuning, contexts):
                logger.warning("attention: %s gives other results here; it is not used", name)
                continue
            choice.seconds[name] = [timer(lab.runs(tuning, context)) for context in contexts]
        except (RuntimeError, triton.TritonError):
            if name == SHORT_STEPS.name:
                raise
            logger.warning("attention: %s cannot run here; it is not used", name, exc_info=True)
    lengths = " and ".join(map(str, contexts))
    logger.info("attention: %s; one row, %s positions: %s", choice.name, lengths, choice)
    return choice


def graph_seconds(runs: Sequence[Run]) -> float:
    """Seconds of one of these runs in a CUDA graph of all."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / 1e3 / len(runs)


@dataclass(frozen=True, slots=True)
class _Lab:
    """A query and a pool of keys and values, of which each run reads other blocks."""

    q: Tensor  # [1, heads, D]
    keys: Tensor  # [blocks, BLOCK_SIZE, kv_heads, D]
    values: Tensor

    @classmethod
    def of(cls, heads: Heads, device: torch.device, pool_bytes: int) -> _Lab:
        per_block = BLOCK_SIZE * heads.kv_heads * heads.head_dim
        blocks = max(pool_bytes // (per_block * heads.cache.itemsize), 1)
        generator = torch.Generator(device).manual_seed(1)

        def made(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        shape = blocks, BLOCK_SIZE, heads.kv_heads, heads.head_dim
        return cls(
            made(1, heads.heads, heads.head_dim, dtype=heads.dtype),
            made(*shape, dtype=heads.cache),
            made(*shape, dtype=heads.cache),
        )

    def different(self) -> dict[str, Tuning]:
        """The tunings, without those that cut one row as an earlier one does."""
        found: dict[str, Tuning] = {}
        plans = []
        for name, tuning in TUNINGS.items():
            plan = plans_of(self.q, self.keys, self._meta(1, 0), tuning)
            if plan not in plans:
                plans.append(plan)
                found[name] = tuning
        return found

    def agrees(self, tuning: Tuning, contexts: Sequence[int]) -> bool:
        """Whether results are those of SHORT_STEPS, which have run most."""
        for context in contexts:
            meta = self._meta(context, 0)
            one, other = (self._attend(meta, which).float() for which in (SHORT_STEPS, tuning))
            if not torch.allclose(one, other, atol=AGREEMENT, rtol=AGREEMENT):
                return False
        return True

    def runs(self, tuning: Tuning, context: int) -> list[Run]:
        metas = [self._meta(context, first) for first in range(CALLS)]
        return [lambda meta=meta: self._attend(meta, tuning) for meta in metas]  # type: ignore[misc]

    def _attend(self, meta: AttentionMeta, tuning: Tuning) -> Tensor:
        return attention(
            self.q, self.keys, self.values, meta, self.q.shape[2] ** -0.5, tuning=tuning
        )

    def _meta(self, context: int, number: int) -> AttentionMeta:
        """One row of `context` positions, in the `number`-th blocks of the pool."""
        device, used = self.q.device, -(-context // BLOCK_SIZE)
        order = torch.arange(TABLE_POSITIONS // BLOCK_SIZE, device=device) + number * used
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        return AttentionMeta(
            cu_q=torch.arange(2, dtype=torch.int32, device=device),
            prefix_lens=zero + context - 1,
            first_keys=zero,
            block_tables=(order * 769 % len(self.keys)).int()[None],  # scattered
            ancestors=torch.zeros(1, dtype=torch.int64, device=device),
            max_q=1,
            max_context=TABLE_POSITIONS,
        )
