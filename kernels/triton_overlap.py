"""Kernels that start while the kernel before them still runs (programmatic dependent launch).

From the last instruction of a kernel to the first of the next a GPU takes about a microsecond, half
the time of a small kernel. Launched with `overlapped`, a kernel is made ready before. Every kernel
therefore begins with `await_inputs()`, but for what the end of this text allows, which does two
things:

1. It lets the next kernel of the stream be made ready. That happens once all programs of this one
   have said so, so it takes no place that a program of this kernel still needs.
2. It waits until the kernel before this one has ended and all that it wrote can be seen.

Before that, a kernel must read nothing that another kernel writes, and write nothing. Then the
order is the same as without overlap: a kernel ends only after its own wait, so once the kernel
before has ended, all kernels before that one have, too. Kernels that know nothing of this, such as
torch's, start when all before them have ended, and those after them wait for their end. Edges
between the kernels of a CUDA graph keep this, and a graph starts after all that was launched before
it.

A kernel may load constants, such as the weights of a norm, between `begin_early()`, which is only
the first part, and `await_inputs()`. Whoever loads such constants must wait for the device
(`Place.await_weights`).

In Triton's interpreter, and on GPUs older than Hopper, both do nothing.
"""

from __future__ import annotations

from typing import Any

from triton.language import core
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CAPABILITY = (9, 0)  # of the GPUs that can do this, from Hopper on


def _in_kernels(function: Any) -> Any:
    """`function` as a part of Triton's language. Triton passes `_semantic` while it compiles; the
    interpreter calls the function as it is."""
    setattr(function, core.TRITON_BUILTIN, True)
    return function


@_in_kernels
def begin_early(_semantic: Any = None) -> None:
    """Let the next kernel be made ready while this one runs."""
    if _can_overlap(_semantic):
        gdc_launch_dependents(_semantic=_semantic)


@_in_kernels
def await_inputs(_semantic: Any = None) -> None:
    """Let the next kernel be made ready, and wait for all that this kernel reads."""
    if _can_overlap(_semantic):
        gdc_launch_dependents(_semantic=_semantic)
        gdc_wait(_semantic=_semantic)


def _can_overlap(semantic: Any) -> bool:
    """Whether the instructions exist where the kernel is compiled for."""
    if semantic is None:  # interpreted
        return False
    target = str(getattr(semantic.builder.options, "arch", "")).removeprefix("sm")
    major, minor = CAPABILITY
    return target.isdigit() and int(target) >= 10 * major + minor
