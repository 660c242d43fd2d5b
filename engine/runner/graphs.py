"""How the body of a step is run: at once on a CPU; elsewhere on buffers that stay where they are,
held by CUDA graphs or launched one by one."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.runner.inputs import StepForm, StepInputs
from engine.runner.laps import Laps, NoLaps
from engine.runner.step import StepBody, StepOutputs
from engine.transfer import Fetch, join, pack, view

WARM_UPS = 2  # launches before a graph is captured: kernels are compiled, workspaces made
SEEN_OFTEN = 3  # a form that nobody prepared is captured when it is asked for so many times

logger = logging.getLogger(__name__)
Outputs = Callable[[], StepOutputs]  # waits for the step, and gives its outputs on the host


class StepRunner(Protocol):
    """Runs steps of any form, in order."""

    def launch(self, inputs: StepInputs, form: StepForm, laps: Laps) -> Outputs:
        """`inputs` of the host. Does not wait for a device."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class HostSteps:
    """The device is the host: a step is over when it is launched."""

    body: StepBody

    def launch(self, inputs: StepInputs, form: StepForm, laps: Laps) -> Outputs:
        outputs = self.body.run(inputs, form, laps)
        return lambda: outputs


class StaticStep:
    """One form of the step: inputs go to the device in one copy, outputs come back in one."""

    def __init__(self, body: StepBody, form: StepForm, like: StepInputs) -> None:
        """`like`: inputs of the host; all inputs have its shapes."""
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
        """`inputs` of the host. Does not wait, neither for this step nor for one before: the device
        takes copies and steps in the order in which it was told of them."""
        packed, _ = pack(_parts(inputs), pinned=self._pinned)
        self._there.copy_(packed, non_blocking=True)
        fetch = Fetch(self._launch())
        assert self._outputs is not None
        likes = self._outputs.parts()
        return lambda: _unpacked(fetch.wait(), likes)

    def _launch(self) -> Tensor:
        self._outputs = self._body.run(self._inputs, self._form, NoLaps())
        return join(self._outputs.parts())


class GraphedStep(StaticStep):
    """The same, captured once and replayed."""

    def __init__(self, body: StepBody, form: StepForm, like: StepInputs, pool: Any) -> None:
        """`like`: inputs without a row, so that the launches before the capture change nothing.
        `pool`: handle of the memory that all graphs share; one runs at a time."""
        super().__init__(body, form, like)
        started, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                super()._launch()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may be loading a head.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._joined = super()._launch()
        self.seconds = time.perf_counter() - started
        self.num_bytes = max(0, free - torch.cuda.mem_get_info()[0])

    def _launch(self) -> Tensor:
        self._graph.replay()
        return self._joined


class DeviceSteps:
    """Steps of a padded form: launched one by one, or, with `graphs`, captured."""

    def __init__(
        self, body: StepBody, idle: Callable[[StepForm], StepInputs], *, graphs: bool
    ) -> None:
        """`idle` makes inputs of the host that have no row."""
        self._body = body
        self._idle = idle
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._steps: dict[StepForm, StaticStep] = {}
        self._asked: Counter[StepForm] = Counter()
        self.seconds = 0.0  # spent on capturing
        self.num_bytes = 0  # that graphs take

    def launch(self, inputs: StepInputs, form: StepForm, laps: Laps) -> Outputs:  # noqa: ARG002
        self._asked[form] += 1
        if form not in self._steps or self._asked[form] == SEEN_OFTEN:
            self._steps[form] = self._make(form, captured=self._asked[form] >= SEEN_OFTEN)
        return self._steps[form].launch(inputs)

    def prepare(self, form: StepForm) -> None:
        """Capture a form that is likely to come, if there are graphs."""
        if self._pool is not None:
            self._asked[form] = SEEN_OFTEN
            self._steps[form] = self._make(form, captured=True)

    def _make(self, form: StepForm, *, captured: bool) -> StaticStep:
        if self._pool is None or not captured:
            return self._steps.get(form) or StaticStep(self._body, form, self._idle(form))
        try:
            graphed = GraphedStep(self._body, form, self._idle(form), self._pool)
        except RuntimeError:  # out of memory, or something that cannot be captured
            logger.exception("no CUDA graph for %s: such steps run without one", form)
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
    """Outputs on the host, of the shapes and dtypes of `likes`."""
    parts, first = [], 0
    for like in likes:
        parts.append(view(here, first, like))
        first += like.numel() * like.itemsize
    return StepOutputs(*parts)


def _parts(inputs: StepInputs) -> list[Tensor]:
    return [getattr(inputs, field.name) for field in dataclasses.fields(inputs)]
