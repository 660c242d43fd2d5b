"""Times the steps of an engine under a constant load."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.measuring.device_timing import Span, durations_ms, new_span, pauses_ms
from configs.resolve import ResolvedConfig
from engine.core import EngineCore
from engine.messages import Finished, Submit, Tokens
from engine.request import Request, SamplingParams
from engine.runner.graphs import GraphedStep

PROMPT = 128  # tokens of each decoding row
CHUNKS = 2  # chunks of each prompt that is computed beside them
WARM_UP, STEPS = 20, 60  # the warm-up includes captures: a form is captured at its third launch
MAX_TOKENS = 2000  # no row ends while steps are timed


@dataclass(frozen=True)
class Load:
    """What every step computes."""

    rows: int = 1  # decoding rows
    params: Mapping[str, Any] = field(default_factory=dict)  # of these rows; greedy
    chunk: int = 0  # tokens of a prompt beside them
    lookup: bool = False
    run_ahead: bool = False

    def settings(self, config: ResolvedConfig) -> ResolvedConfig:
        """`config` for this load."""
        scheduler: dict[str, object] = {"run_ahead": self.run_ahead}
        if self.chunk:
            scheduler["max_num_batched_tokens"] = self.rows + self.chunk
        changed = {
            "scheduler": config.scheduler.model_copy(update=scheduler),
            "speculation": config.speculation.model_copy(update={"lookup": self.lookup}),
        }
        return config.model_copy(update=changed)


def steps(core: EngineCore, load: Load) -> Iterator[float]:
    """Run steps and yield the seconds of each. The first ones compute the prompts."""
    vocab_size, numbers = core.info.vocab_size, itertools.count()

    def ask(name: str, length: int, params: SamplingParams) -> None:
        number = next(numbers)
        prompt = [5 + (11 * i + 37 * number) % (vocab_size - 5) for i in range(length)]
        core.add(Submit(Request(request_id=f"{name}-{number}", prompt_ids=prompt, params=params)))

    own = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, **load.params}
    for _ in range(load.rows):
        ask("row", PROMPT, SamplingParams(**own))
    decoding: set[str] = set()
    is_prompt_done = True
    while True:
        if load.chunk and is_prompt_done and len(decoding) == load.rows:
            ask("prompt", CHUNKS * load.chunk, SamplingParams(max_tokens=1, temperature=0.0))
            is_prompt_done = False
        started = time.perf_counter()
        events = core.step()
        yield time.perf_counter() - started
        for event in events:
            if isinstance(event, Finished):
                is_prompt_done = True
            elif isinstance(event, Tokens) and event.request_id.startswith("row"):
                decoding.add(event.request_id)


def time_steps(core: EngineCore, load: Load) -> dict[str, float]:
    """Medians over steps that are CUDA graphs. `device_ms`: time of the graph. `gap_us`: time that
    the host adds to a step. `idle_us`: from the end of one graph to the begin of the next, by the
    device's clock, including copies of inputs and outputs.

    Raises:
        RuntimeError: most steps were not CUDA graphs.
    """
    running = steps(core, load)
    with device_spans() as spans:
        for _ in itertools.islice(running, WARM_UP):
            spans.clear()
        walls = list(itertools.islice(running, STEPS))
    core.land()
    if len(spans) < STEPS // 2:
        raise RuntimeError(f"{len(spans)} of {STEPS} steps were replays of a CUDA graph: {load}")
    return _medians(walls, spans)


def _medians(walls: Sequence[float], spans: Sequence[Span]) -> dict[str, float]:
    wall, device = 1000 * statistics.median(walls), statistics.median(durations_ms(spans))
    idle = [1000 * pause for pause in pauses_ms(spans)]
    return {
        "step_ms": wall,
        "device_ms": device,
        "gap_us": 1000 * (wall - device),
        "idle_us": statistics.median(idle),
        "idle_us_p95": float(np.quantile(idle, 0.95)),
    }


@contextmanager
def device_spans() -> Iterator[list[Span]]:
    """Records CUDA events around every replay of a step."""
    spans: list[Span] = []
    launch = GraphedStep._launch

    def timed(self: GraphedStep) -> Tensor:
        begin, end = new_span()
        begin.record()
        joined = launch(self)
        end.record()
        spans.append((begin, end))
        return joined

    GraphedStep._launch = timed  # type: ignore[method-assign]
    try:
        yield spans
    finally:
        GraphedStep._launch = launch  # type: ignore[method-assign]
