"""One launch of a Triton kernel as a value: run it, or compile it for Hopper without a GPU.

Every `kernels/<operation>/triton_kernel.py` lists in `launches()` the launches of the models we
know, over tensors of the `meta` device. The engine's function builds them, so the tests compile
for sm_90a what the engine launches.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SM90 = GPUTarget("cuda", 90, 32)  # Triton compiles it as sm_90a
SM90_SHARED_BYTES = 227 * 1024  # most that one program can have
WIDEST_LOAD = 128  # bits of one load of one thread
_DIVISIBLE = 16  # Triton specialises kernels for integers and addresses divisible by this
_POINTEES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
# Whether launches overlap here, because an operation of `overlapped` is running
_OVERLAPS: ContextVar[bool] = ContextVar("overlaps", default=False)


def overlapped(operation: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The operation with launches that overlap with the kernels before them, as
    kernels/triton_overlap.py explains."""

    @functools.wraps(operation, updated=())
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        token = _OVERLAPS.set(True)
        try:
            return operation(*args, **options)
        finally:
            _OVERLAPS.reset(token)

    return run


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its arguments, grid and options.

    `arguments` holds every parameter of the kernel that has no default: tensors, numbers and
    compile-time constants. `grid` may depend only on shapes and host integers.
    """

    name: str  # unique: the operation and the parameters that distinguish its configurations
    kernel: Any  # result of @triton.jit
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    wgmma: bool = False  # its matrix products are large enough for Hopper's wgmma instruction
    min_load_bits: int = 0  # its widest load from global memory must be at least this wide

    def run(self) -> None:
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.options())

    def options(self) -> dict[str, Any]:
        """Compiler options. They set fused multiply-add, because Triton's default varies."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            "launch_pdl": _OVERLAPS.get(),
        }


def pointers(prefix: str, data: Any) -> dict[str, Tensor | None]:
    """The tensors of a dataclass as arguments of a kernel, by name."""
    values = {part.name: getattr(data, part.name) for part in fields(data)}
    return {
        f"{prefix}{name}_ptr": value
        for name, value in values.items()
        if value is None or isinstance(value, Tensor)
    }


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources and instructions of a kernel that ptxas compiled."""

    registers: int  # per thread
    spill_bytes: int  # local memory per thread for registers that did not fit
    spill_accesses: int  # loads and stores of local memory
    shared_bytes: int  # per program
    wgmma: int  # instructions
    mma: int  # matrix instructions of older GPUs
    load_bits: dict[str, int]  # width of a load from global memory -> instructions
    waits: int  # instructions that wait for the kernel before (kernels/triton_overlap.py)

    @property
    def widest_load(self) -> int:
        return max(map(int, self.load_bits), default=0)


def compile_for_sm90a(launch: Launch) -> Resources:
    """Compile a launch for Hopper; no GPU is needed.

    Raises:
        triton.CompilationError and other errors of the compiler.
    """
    assert isinstance(launch.kernel, JITFunction), "interpreted kernels cannot be compiled"
    compiled = triton.compile(_source(launch), target=SM90, options=launch.options())
    return _resources(compiled.asm["cubin"], compiled.metadata.shared)


def problems(launch: Launch, found: Resources) -> list[str]:
    """Faults of a compiled launch, one a line; empty if there are none."""
    lines = []
    if found.spill_bytes or found.spill_accesses:
        lines.append(f"spills {found.spill_bytes} bytes, {found.spill_accesses} accesses")
    if found.shared_bytes > SM90_SHARED_BYTES:
        lines.append(f"{found.shared_bytes} bytes of shared memory, at most {SM90_SHARED_BYTES}")
    if launch.wgmma and not found.wgmma:
        lines.append(f"no wgmma, {found.mma} older matrix instructions")
    if found.widest_load < launch.min_load_bits:
        lines.append(f"widest load {found.widest_load} bits, not {launch.min_load_bits}")
    if found.waits != 1:
        lines.append(f"waits for the kernel before {found.waits} times, not once")
    return [f"{launch.name}: {line}" for line in lines]


def _source(launch: Launch) -> ASTSource:
    """The arguments, typed and specialised as Triton does at launch: the integer 1 and None become
    constants, and divisibility by 16 is recorded."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        kind = "constexpr" if parameter.is_constexpr else _kind(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif _is_divisible(value, parameter):
            attributes[index,] = [["tt.divisibility", _DIVISIBLE]]
    unknown = launch.arguments.keys() - signature.keys()
    assert not unknown, f"{launch.name} has no parameters {sorted(unknown)}"
    return ASTSource(launch.kernel, signature, constants, attributes)


def _kind(value: Any, parameter: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _POINTEES[value.dtype]
    if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
        return "constexpr"
    if parameter.annotation_type:
        return str(parameter.annotation_type)
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), f"{parameter.name} is {value!r}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_divisible(value: Any, parameter: Any) -> bool:
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    if isinstance(value, Tensor):
        return value.storage_offset() * value.itemsize % _DIVISIBLE == 0
    return type(value) is int and value % _DIVISIBLE == 0


def _resources(cubin: bytes, shared_bytes: int) -> Resources:
    usage, sass = _disassemble(cubin)
    registers, stack, local = (
        int(number) for number in re.findall(r"\b(?:REG|STACK|LOCAL):(\d+)", usage)
    )
    instructions = list(_instructions(sass))
    count = {prefix: sum(i.startswith(prefix) for i in instructions) for prefix in _COUNTED}
    widths: dict[str, int] = {}
    for instruction in instructions:
        if instruction.startswith(("LDG.", "LDGSTS.")):
            bits = str(_load_bits(instruction))
            widths[bits] = widths.get(bits, 0) + 1
    return Resources(
        registers=registers,
        spill_bytes=stack + local,
        spill_accesses=count["STL"] + count["LDL"],
        shared_bytes=shared_bytes,
        wgmma=count["HGMMA"] + count["QGMMA"] + count["IGMMA"],
        mma=count["HMMA"] + count["QMMA"] + count["IMMA"],
        load_bits=dict(sorted(widths.items())),
        waits=count["ACQBULK"],
    )


_COUNTED = ("STL", "LDL", "HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "ACQBULK")


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The kernel's resource usage and its machine code, both as text."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return usage, sass


def _instructions(sass: str) -> Iterator[str]:
    """Names of the instructions, such as `LDG.E.128`, in order."""
    pattern = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    yield from pattern.findall(sass)


def _load_bits(instruction: str) -> int:
    """Bits that one thread loads: 32 if the name gives no width."""
    for part in instruction.split("."):
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
        if part in ("64", "128"):
            return int(part)
    return 32
