"""Runs the body of a step: directly on a CPU; on a GPU with static buffers, captured as CUDA graphs
or launched kernel by kernel."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from engine.copies import Fetch, join, pack, view
from engine.runner.forms import StepForm
from engine.runner.inputs import StepInputs
from engine.runner.laps import Laps, NoLaps
from engine.runner.step import StepBody, StepOutputs

WARM_UPS = 2  # launches before a capture, which compile kernels and allocate workspaces
SEEN_OFTEN = 3  # a form that was not prepared is captured at this launch

logger = logging.getLogger(__name__)
Captured = TypeVar("Captured")
Outputs = Callable[[], StepOutputs]  # waits for the step and returns its outputs on the host


class StepRunner(Protocol):
    """Runs steps of any form, in order."""

    def launch(self, inputs: StepInputs, form: StepForm, laps: Laps) -> Outputs:
        """Takes host inputs. Does not wait for the device."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class HostSteps:
    """Runs steps on the CPU: a step has finished when `launch` returns."""

    body: StepBody

    def launch(self, inputs: StepInputs, form: StepForm, laps: Laps) -> Outputs:
        outputs = self.body.run(inputs, form, laps)
        return lambda: outputs


class StaticStep:
    """A step of one form: inputs go to the device in one copy, outputs come back in one."""

    def __init__(self, body: StepBody, form: StepForm, like: StepInputs) -> None:
        """`like`: host inputs; all inputs have its shapes."""
        self._body = body
        self._form = form
        device = body.state.tables.device
        self._pinned = device.type == "cuda"
        packed, firsts = pack(_parts(like), pinned=self._pinned)
        self._there = packed.to(device)
        views = (view(self._there, *at) for at in zip(firsts, _parts(like), strict=True))
        self._inputs = StepInputs(*views)
        self._outputs: StepOutputs | None = None

    def launch(self, inputs: StepInputs) -> Outputs:
        """Takes host inputs. Waits neither for this step nor for earlier ones: the device runs
        copies and steps in the order of launches."""
        packed, _ = pack(_parts(inputs), pinned=self._pinned)
        self._there.copy_(packed, non_blocking=True)
        fetch = Fetch(self._launch())
        assert self._outputs is not None
        likes = self._outputs.parts()
        return lambda: _unpacked(fetch.wait(), likes)

    def _launch(self) -> Tensor:
        self._outputs = self._body.run(self._inputs, self._form, NoLaps())
        return join(self._outputs.parts())


def capture(launch: Callable[[], Captured], pool: Any) -> tuple[torch.cuda.CUDAGraph, Captured]:
    """What `launch` queues on the device, as a graph, and its result, which each replay writes
    anew. It is called WARM_UPS times before the capture. `pool`: handle of the graph's memory.

    Raises:
        RuntimeError: out of memory, or something cannot be captured.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Thread-local, because another thread may be loading a draft head.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = launch()
    return graph, result


class GraphedStep(StaticStep):
    """A static step, captured once as a CUDA graph and replayed."""

    def __init__(self, body: StepBody, form: StepForm, like: StepInputs, pool: Any) -> None:
        """`like`: inputs with padding rows only, so that the launches before the capture change
        no state. `pool`: handle of the memory that all graphs share; one runs at a time."""
        super().__init__(body, form, like)
        started, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        self._graph, self._joined = capture(super()._launch, pool)
        self.seconds = time.perf_counter() - started
        self.num_bytes = max(0, free - torch.cuda.mem_get_info()[0])

    def _launch(self) -> Tensor:
        self._graph.replay()
        return self._joined


class DeviceSteps:
    """Runs steps of padded forms on a GPU; with `graphs`, captures them as CUDA graphs."""

    def __init__(
        self, body: StepBody, idle: Callable[[StepForm], StepInputs], *, graphs: bool
    ) -> None:
        """`idle` makes host inputs with padding rows only."""
        self._body = body
        self._idle = idle
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._steps: dict[StepForm, StaticStep] = {}
        self._asked: Counter[StepForm] = Counter()
        self.seconds = 0.0  # spent on capturing
        self.num_bytes = 0  # taken by graphs

    def launch(self, inputs: StepInputs, form: StepForm, laps: Laps) -> Outputs:  # noqa: ARG002
        self._asked[form] += 1
        if form not in self._steps or self._asked[form] == SEEN_OFTEN:
            self._steps[form] = self._make(form, captured=self._asked[form] >= SEEN_OFTEN)
        return self._steps[form].launch(inputs)

    @property
    def captures(self) -> bool:
        """Whether graphs are on."""
        return self._pool is not None

    def prepare(self, form: StepForm) -> None:
        """Capture a form that is likely to occur, if graphs are on."""
        if self.captures:
            self._asked[form] = SEEN_OFTEN
            self._steps[form] = self._make(form, captured=True)

    def _make(self, form: StepForm, *, captured: bool) -> StaticStep:
        # In the middle of a masked step, the host looks at the trees.
        if self._pool is None or not captured or form.is_masked:
            return self._steps.get(form) or StaticStep(self._body, form, self._idle(form))
        try:
            graphed = GraphedStep(self._body, form, self._idle(form), self._pool)
        except RuntimeError:  # out of memory, or something that cannot be captured
            logger.exception("no CUDA graph for %s: these steps run without one", form)
            return StaticStep(self._body, form, self._idle(form))
        self.seconds += graphed.seconds
        self.num_bytes += graphed.num_bytes
        logger.info(
            "captured a CUDA graph: %d rows, %d tokens, tree %s%s; %.1f s, %.0f MiB in all",
            form.num_rows,
            form.num_tokens,
            form.shape.name,
            ", filtered" if form.is_filtered else "",
            self.seconds,
            self.num_bytes / 2**20,
        )
        return graphed


def _unpacked(here: Tensor, likes: list[Tensor]) -> StepOutputs:
    """Host outputs with the shapes and dtypes of `likes`."""
    parts, first = [], 0
    for like in likes:
        parts.append(view(here, first, like))
        first += like.numel() * like.itemsize
    return StepOutputs(*parts)


def _parts(inputs: StepInputs) -> list[Tensor]:
    return [getattr(inputs, field.name) for field in dataclasses.fields(inputs)]
