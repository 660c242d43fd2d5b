"""Rounds on buffers that stay where they are, held by CUDA graphs or launched one by one."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.runner.decode_round import DecodeRound, RoundForm, RoundInputs, RoundOutputs
from engine.transfer import Fetch, join, pack, view

WARM_UPS = 2  # launches before a graph is captured: kernels are compiled, workspaces made

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchedRound:
    """A round that the device has been told to run, and then to bring back the outputs of."""

    fetch: Fetch
    likes: list[Tensor]  # of the outputs' shapes and dtypes

    def wait(self) -> RoundOutputs:
        """Outputs on the host, once the round is over."""
        here = self.fetch.wait()
        parts, first = [], 0
        for like in self.likes:
            parts.append(view(here, first, like))
            first += like.numel() * like.itemsize
        return RoundOutputs(*parts)


class StaticRound:
    """One form of the round: inputs go to the device in one copy, outputs come back in one."""

    def __init__(self, body: DecodeRound, form: RoundForm, idle: RoundInputs) -> None:
        """`idle`: inputs of the host, all of whose rows are none; all inputs have its shapes."""
        self._body = body
        self._form = form
        self._pinned = body.tables.device.type == "cuda"
        packed, firsts = pack(_parts(idle), pinned=self._pinned)
        self._there = packed.to(body.tables.device)
        views = (view(self._there, *at) for at in zip(firsts, _parts(idle), strict=True))
        self._inputs = RoundInputs(*views)
        self._outputs: RoundOutputs | None = None

    def launch(self, inputs: RoundInputs) -> LaunchedRound:
        """`inputs`: of the host. Does not wait, neither for this round nor for one before: the
        device takes copies and rounds in the order in which it was told of them."""
        packed, _ = pack(_parts(inputs), pinned=self._pinned)
        self._there.copy_(packed, non_blocking=True)
        fetch = Fetch(self._launch())
        assert self._outputs is not None
        return LaunchedRound(fetch, _parts(self._outputs))

    def _launch(self) -> Tensor:
        self._outputs = self._body.run(self._inputs, self._form)
        return join(_parts(self._outputs))


class GraphedRound(StaticRound):
    """The same, captured once and replayed."""

    def __init__(self, body: DecodeRound, form: RoundForm, idle: RoundInputs, pool: Any) -> None:
        """`pool`: handle of the memory that all graphs share; one runs at a time."""
        super().__init__(body, form, idle)
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


class RoundCache:
    """Rounds by form, each made when it is first asked for."""

    def __init__(self, body: DecodeRound, *, graphs: bool) -> None:
        self._body = body
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._rounds: dict[RoundForm, StaticRound] = {}
        self.seconds = 0.0  # spent on capturing
        self.num_bytes = 0  # that graphs take

    @property
    def graphs(self) -> bool:
        return self._pool is not None

    def get(self, form: RoundForm, idle: Callable[[], RoundInputs]) -> StaticRound:
        """`idle` makes inputs of the host, all of whose rows are none."""
        if form not in self._rounds:
            self._rounds[form] = self._make(form, idle())
        return self._rounds[form]

    def _make(self, form: RoundForm, idle: RoundInputs) -> StaticRound:
        if self._pool is None:
            return StaticRound(self._body, form, idle)
        try:
            graphed = GraphedRound(self._body, form, idle, self._pool)
        except RuntimeError:  # out of memory, or something that cannot be captured
            logger.exception("no CUDA graph for %s: such rounds run without one", form)
            return StaticRound(self._body, form, idle)
        self.seconds += graphed.seconds
        self.num_bytes += graphed.num_bytes
        logger.info(
            "captured a CUDA graph: %d rows, tree %s, %s; %d graphs, %.1f s, %.0f MiB in all",
            form.num_rows,
            form.shape.name,
            "filtered" if form.is_filtered else "sampled" if form.any_sampled else "greedy",
            len(self._rounds) + 1,
            self.seconds,
            self.num_bytes / 2**20,
        )
        return graphed


def _parts(bundle: RoundInputs | RoundOutputs) -> list[Tensor]:
    return [getattr(bundle, part.name) for part in dataclasses.fields(bundle)]
