"""Times CUDA work by the device's own clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

Run = Callable[[], object]
Timer = Callable[[Run], float]  # seconds of one run
Event = Any  # torch.cuda.Event, which has no types
Span = tuple[Event, Event]

WARM_UPS = 3  # runs before timing or capture, which compile kernels and allocate workspaces
RUNS = 20  # in one graph
REPLAYS = 9
FLUSH_BYTES = 2**28  # read between two runs: several times the L2 cache
SHORTEST = 1e-9  # seconds; keeps a difference of two times positive


def graph_seconds(run: Run) -> float:
    """Seconds of one run in a CUDA graph, as the engine's steps run, with a cold cache. In a graph,
    the host's launch times do not count.

    The cache is flushed by reading, so that a run does not wait for old writes. The time to flush
    is measured with a second graph and subtracted.
    """
    torch.compiler.reset()  # torch compiles only a few shapes per function, then gives up
    other = torch.ones(FLUSH_BYTES // 4, device="cuda")
    read = torch.empty((), device="cuda")

    def flush() -> None:
        torch.sum(other, dim=0, out=read)

    def flush_and_run() -> None:
        flush()
        run()

    for _ in range(WARM_UPS):
        flush_and_run()
    whole, flushes = (_replay_seconds(each) for each in (flush_and_run, flush))
    return seconds_per_run(whole, flushes)


def seconds_per_run(whole: Sequence[float], flushes: Sequence[float], runs: int = RUNS) -> float:
    """Seconds of one of `runs` runs in a graph, from the medians of replays with and without
    them."""
    return max((statistics.median(whole) - statistics.median(flushes)) / runs, SHORTEST)


def eager_seconds(run: Run) -> float:
    """Seconds of one run launched by the host: for work much longer than a launch."""
    for _ in range(WARM_UPS):
        run()
    return statistics.median(_seconds(run, REPLAYS))


def _replay_seconds(run: Run) -> list[float]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RUNS):
            run()
    graph.replay()
    return _seconds(graph.replay, REPLAYS)


def _seconds(run: Run, repeats: int) -> list[float]:
    spans = []
    for _ in range(repeats):
        span = new_span()
        span[0].record()
        run()
        span[1].record()
        spans.append(span)
    return [ms / 1000 for ms in durations_ms(spans)]


def new_span() -> Span:
    """Two events, for a begin and an end."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return begin, end


def durations_ms(spans: Sequence[Span]) -> list[float]:
    """Milliseconds from begin to end of every span. Waits until the device has passed them all."""
    _wait_for(spans)
    return [float(begin.elapsed_time(end)) for begin, end in spans]


def pauses_ms(spans: Sequence[Span]) -> list[float]:
    """Milliseconds from the end of every span to the begin of the next. Waits likewise."""
    _wait_for(spans)
    return list(_pauses(spans))


def _pauses(spans: Sequence[Span]) -> Iterator[float]:
    for (_, end), (begin, _) in pairwise(spans):
        yield float(end.elapsed_time(begin))


def _wait_for(spans: Sequence[Span]) -> None:
    for _, end in spans:
        end.synchronize()
