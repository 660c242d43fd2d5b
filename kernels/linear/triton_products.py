"""Which kernel computes products with plain weights on a CUDA device: cuBLAS, or ours for few rows.

For each shape of a weight, `Products.choose` measures cuBLAS and the plans of triton_skinny.py. The
fastest computes up to 16 rows; cuBLAS computes more. There is one choice for 1 to 16 rows, so with
a plan a row's result does not depend on how many others there are, as long as these are not more.
cuBLAS chooses kernels of its own by the number of rows: with it, the last bits may differ.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.compiler.errors import TritonError

from kernels.activation.triton_kernel import silu_and_mul
from kernels.linear.kept_plans import CUBLAS, Choice, KeptPlans, Shape
from kernels.linear.triton_kernel import linear
from kernels.linear.triton_skinny import (
    MOST_ROWS,
    PLANS,
    Plan,
    gated_linear_few,
    launch,
    linear_few,
    skinny_linear_kernel,
)
from kernels.ops import Backend, LinearWeight
from kernels.triton_launch import overlapped

SKINNY = "triton-skinny"
MEASURED_ROWS = (1, 8)  # the plan with the smallest sum of times is chosen
_ENOUGH_BYTES = 2**29  # of weights that a measurement reads: several times the L2 cache
_REPLAYS = 5
_ERROR = 2.0**-6  # of a result, as a share of the largest

Run = Callable[[], object]
logger = logging.getLogger(__name__)


class Products:
    """The operations `linear` and `gated_linear` of a device."""

    def __init__(self, wanted: str, device: torch.device, folder: Path | None) -> None:
        """`wanted`: "auto", "cublas" or "skinny". `folder`: keeps what was measured, for the next
        start; None: nothing is kept."""
        self._wanted = wanted
        self._device = device
        self._folder = folder
        self.overlaps = False
        self._choices: dict[Shape, Choice] = {}

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """x [T, K] -> [T, N] in x's dtype."""
        plan = self._plan(x, weight, gated=False)
        return linear(x, weight) if plan is None else linear_few(x, weight, plan)

    def gated_linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """x [T, K] -> [T, N / 2] in x's dtype: silu of the first half of the outputs times the
        second."""
        plan = self._plan(x, weight, gated=True)
        return _gated_cublas(x, weight) if plan is None else gated_linear_few(x, weight, plan)

    def choose(self, weights: Iterable[tuple[LinearWeight, bool]]) -> None:
        """Choose for all shapes of these weights that are not known yet; True: for `gated_linear`.
        The device must not run anything else."""
        if self._wanted == "cublas" or self._device.type != "cuda":
            return
        groups: dict[Shape, list[LinearWeight]] = {}
        for weight, gated in weights:
            if _can_be_skinny(weight):
                groups.setdefault(Shape.of(weight, gated=gated), []).append(weight)
        new = {shape: group for shape, group in groups.items() if shape not in self._choices}
        if new:
            (overlapped(self._choose) if self.overlaps else self._choose)(new)

    def backends(self) -> dict[str, Backend]:
        """What was chosen, by operation and shape."""
        return {
            str(shape): Backend("cublas" if choice.plan == CUBLAS else SKINNY, str(choice))
            for shape, choice in self._choices.items()
        }

    def _plan(self, x: Tensor, weight: LinearWeight, *, gated: bool) -> Plan | None:
        """None: cuBLAS."""
        if self._wanted == "cublas" or len(x) > MOST_ROWS or weight.layout is not None:
            return None
        choice = self._choices.get(Shape.of(weight, gated=gated))
        if choice is not None:
            return _BY_NAME.get(choice.plan)
        return PLANS[0] if self._wanted == "skinny" else None

    def _choose(self, groups: Mapping[Shape, Sequence[LinearWeight]]) -> None:
        started = time.monotonic()
        names = [*([CUBLAS] if self._wanted == "auto" else []), *_BY_NAME]
        kept = KeptPlans(self._folder, _identity(self._device, overlaps=self.overlaps), names)
        known = kept.load()
        new = {shape: group for shape, group in groups.items() if shape not in known}
        if new:
            compile_plans(new)
            known |= {shape: self._measured(shape, group) for shape, group in new.items()}
            kept.save(known)
            torch.cuda.empty_cache()
        self._choices |= {shape: known[shape] for shape in groups}
        lines = "; ".join(f"{shape}: {self._choices[shape]}" for shape in groups)
        how = f"measured in {time.monotonic() - started:.1f} s" if new else "as measured before"
        logger.info("products of up to %d rows, %s: %s", MOST_ROWS, how, lines)

    def _measured(self, shape: Shape, group: Sequence[LinearWeight]) -> Choice:
        """The fastest plan for some weights of a shape, by its mean over MEASURED_ROWS."""
        weights = _up_to(_ENOUGH_BYTES, group)
        like = {"dtype": weights[0].data.dtype, "device": weights[0].data.device}
        inputs = [torch.randn(rows, shape.inputs, **like) for rows in MEASURED_ROWS]
        micros = {}
        for name in (CUBLAS, *_BY_NAME):
            times = [attempt(name, x, weights, gated=shape.gated) for x in inputs]
            if None not in times:
                micros[name] = sum(filter(None, times)) / len(times)
        allowed = [name for name in micros if self._wanted == "auto" or name != CUBLAS]
        return Choice(min(allowed or [CUBLAS], key=micros.__getitem__), micros)


_BY_NAME = {plan.name: plan for plan in PLANS}


def _can_be_skinny(weight: LinearWeight) -> bool:
    """Whether the kernel reads 128 bits at once."""
    halves = weight.data.dtype in (torch.bfloat16, torch.float16)
    return weight.layout is None and halves and weight.in_features % 16 == 0


def _gated_cublas(x: Tensor, weight: LinearWeight) -> Tensor:
    return silu_and_mul(linear(x, weight))


def attempt(name: str, x: Tensor, weights: Sequence[LinearWeight], *, gated: bool) -> float | None:
    """Microseconds of one product with each weight. None if the device cannot run the plan of that
    name, or gives something else than cuBLAS."""
    cublas = _gated_cublas if gated else linear
    if name == CUBLAS:
        return graph_micros(lambda: [cublas(x, each) for each in weights]) / len(weights)
    try:
        run, plan = gated_linear_few if gated else linear_few, _BY_NAME[name]
        if not _is_close(run(x, weights[0], plan), cublas(x, weights[0])):
            logger.warning("products: %s gives wrong results on this device", name)
            return None
        return graph_micros(lambda: [run(x, each, plan) for each in weights]) / len(weights)
    except (RuntimeError, TritonError) as error:
        logger.info("products: %s cannot run on this device: %s", name, error)
        return None


def _identity(device: torch.device, *, overlaps: bool) -> str:
    """All that the times depend on, except the shape."""
    name, kernel = torch.cuda.get_device_name(device), skinny_linear_kernel.cache_key
    return repr((name, torch.__version__, triton.__version__, kernel, overlaps))


def _up_to(num_bytes: int, weights: Sequence[LinearWeight]) -> Sequence[LinearWeight]:
    """As many of equal weights as have about this many bytes, at least one."""
    return weights[: max(1, num_bytes // weights[0].data.nbytes)]


def compile_plans(groups: Mapping[Shape, Sequence[LinearWeight]]) -> None:
    """All plans for these shapes, several at once; what cannot be compiled fails later, too."""
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for shape, weights in groups.items():
            weight = weights[0]
            like = {"dtype": weight.data.dtype, "device": weight.data.device}
            x, out = (torch.empty(1, width, **like) for width in (shape.inputs, shape.outputs))
            for plan in PLANS:
                launch(out, x, weight, plan, gated=shape.gated).compile()


def _is_close(got: Tensor, expected: Tensor) -> bool:
    """NaN is not close."""
    bound = _ERROR * expected.float().abs().max()
    return bool((got.float() - expected.float()).abs().max() <= bound)


def graph_micros(run: Run) -> float:
    """Of one run in a CUDA graph, as the engine's steps run: the shortest of a few."""
    run()  # allocates workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(_REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1000 * begin.elapsed_time(end))
    return min(found)
