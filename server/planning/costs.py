"""What single operations cost on a GPU, in microseconds, split by what they wait for."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from configs.planning import Calibration, Gpu
from server.planning.products import Product

MICRO = 1e6
ACTIVATION = 2  # bytes of a bfloat16 activation
LOGIT = 4  # bytes of a float32 logit
LIMITS = ("memory", "compute", "network", "launch", "host")


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds by cause; their sum is the time."""

    memory: float = 0.0
    compute: float = 0.0
    network: float = 0.0
    launch: float = 0.0  # what a kernel takes at least, its launch included
    host: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(factor * part for part in astuple(self)))

    @property
    def total(self) -> float:
        return self.memory + self.compute + self.network + self.launch + self.host

    @property
    def limit(self) -> str:
        """The cause that takes most."""
        parts = self.by_limit()
        return max(parts, key=lambda name: parts[name])

    def by_limit(self) -> dict[str, float]:
        """Microseconds by name of the cause."""
        return dict(zip(LIMITS, astuple(self), strict=True))


def overlapped(memory_us: float, compute_us: float) -> Cost:
    """Of reading and multiplying at the same time: the cube root of the sum of their cubes. That
    is the larger of both where they differ much, and a quarter more than either where they are
    equal and get in each other's way. Each counts as much of it as its cube is of the sum."""
    cubes = memory_us**3, compute_us**3
    if not any(cubes):
        return Cost()
    square = math.pow(sum(cubes), 2 / 3)
    return Cost(memory=cubes[0] / square, compute=cubes[1] / square)


@dataclass(frozen=True, slots=True)
class Machine:
    """`ranks` GPUs that work together."""

    gpu: Gpu
    calibration: Calibration
    ranks: int = 1

    def product(self, product: Product, num_tokens: float) -> Cost:
        """All layers' products of one kind, on one GPU."""
        bits, per_layer = product.kept, product.inputs * product.outputs
        tokens = product.tokens(num_tokens)
        moved = product.touched(round(num_tokens)) * per_layer * bits.bytes_per_weight
        moved += tokens * (product.inputs + product.outputs) * ACTIVATION
        peak = (
            self.gpu.fp8_flops_per_second if bits.fp8_products else self.gpu.bf16_flops_per_second
        )
        compute = 2 * tokens * per_layer / (peak * self.calibration.compute_share)
        rounding = self.calibration.kernel_us if bits.fp8_products else 0.0
        launch = Cost(launch=self.calibration.product_us + rounding)
        return (overlapped(self._read_us(moved), compute * MICRO) + launch) * product.count

    def kernels(self, number: float) -> Cost:
        """Of small kernels."""
        return Cost(launch=number * self.calibration.kernel_us)

    def stream(self, num_bytes: float) -> Cost:
        """Of element-wise work on so many bytes, beside its kernels."""
        return Cost(memory=self._read_us(num_bytes))

    def attention(
        self, layers: int, rows: int, num_bytes: float, flops: float, num_nodes: int = 1
    ) -> Cost:
        """Of `layers` layers that read `num_bytes` of keys and values of `rows` rows together, each
        with a tree of `num_nodes`."""
        peak = self.gpu.memory_bytes_per_second * self.calibration.cache_share
        compute = self.gpu.bf16_flops_per_second * self.calibration.attention_compute_share
        spent = overlapped(num_bytes / peak * MICRO, flops / compute * MICRO)
        found = self.calibration
        least = found.attention_us + rows * found.attention_row_us
        least += (num_nodes - 1) * found.attention_node_us
        return spent + Cost(launch=layers * least)

    def all_reduce(self, number: int, num_bytes: float) -> Cost:
        """Of `number` sums (or gathers) over all GPUs, of `num_bytes` each."""
        if self.ranks == 1:
            return Cost()
        share = 2 * (self.ranks - 1) / self.ranks
        rate = self.gpu.link_bytes_per_second * self.calibration.link_share
        each = self.calibration.all_reduce_us + num_bytes * share / rate * MICRO
        return Cost(network=number * each)

    def host(self, rows: int, num_nodes: int) -> Cost:
        """Of the host, as far as the GPU has to wait for it."""
        found = self.calibration
        each = found.host_row_us + (num_nodes - 1) * found.host_node_us
        return Cost(host=found.host_us + rows * each)

    def _read_us(self, num_bytes: float) -> float:
        rate = self.gpu.memory_bytes_per_second * self.calibration.memory_share
        return num_bytes / rate * MICRO
