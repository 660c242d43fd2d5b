"""Counts what a step would launch on a GPU, from a run on the CPU with interpreted kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.runner.forms import StepForm
from engine.runner.graphs import StaticStep
from kernels.triton_launch import Launch

# Operations that only look at a tensor in another way, or that make memory
NO_KERNEL = (
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "expand",
    "flatten",
    "new_empty",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "squeeze",
    "t.",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
)
PRODUCTS = ("linear", "mm", "addmm", "matmul")


@dataclass(eq=False)
class Count(TorchDispatchMode):
    """Kernels of one step: our own by name, products, and other operations of torch by name."""

    form: StepForm
    launches: Counter[str] = field(default_factory=Counter)
    products: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name.split(".")[0] in PRODUCTS:
            self.products += 1
        elif not name.startswith(NO_KERNEL):
            self.others[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Count]]:
    """The counts of all steps in the block."""
    counts: list[Count] = []
    launch_step, run = StaticStep._launch, Launch.run
    running: list[Count] = []

    def noting(self: Launch) -> None:
        if not running:
            run(self)
            return
        count = running.pop()
        count.launches[self.name.split("[")[0]] += 1
        count.__exit__(None, None, None)  # the interpreter itself uses torch
        run(self)
        count.__enter__()
        running.append(count)

    def counting(self: StaticStep) -> Tensor:
        counts.append(Count(self._form))
        with counts[-1]:
            running.append(counts[-1])
            joined = launch_step(self)
            running.pop()
        return joined

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", noting)
        patch.setattr(StaticStep, "_launch", counting)
        yield counts
