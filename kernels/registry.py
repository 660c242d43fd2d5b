"""Fills the operation table: one backend per operation, chosen once and never replaced."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kernels.activation import reference as activation
from kernels.attention import reference as attention
from kernels.drafting import reference as drafting
from kernels.kv import reference as kv
from kernels.linear import reference as linear
from kernels.moe import reference as moe
from kernels.native.build import NativeUnavailableError, build_library
from kernels.native.drafting import NativeDrafting
from kernels.native.library import NativeLibrary
from kernels.native.ops import NativeOps
from kernels.native.packing import NativePacking
from kernels.norm import reference as norm
from kernels.ops import Backend, Ops
from kernels.rope import reference as rope
from kernels.sampling import reference as sampling
from kernels.sampling.draw import reference as draw_reference
from kernels.sampling.draw.torch_draw import TorchDraw
from kernels.sampling.edit import reference as edit_reference
from kernels.sampling.edit.torch_edit import edit_logits
from kernels.sampling.rank import noisy_reference as noisy
from kernels.sampling.rank.ranking import ComposedRanking
from kernels.sampling.score import reference as score_reference
from kernels.sampling.score.torch_score import TorchScore
from kernels.tree import reference as tree

DRAFTING_OPERATIONS = ("ready_roots", "lay_levels", "grow_level", "first_keys", "keep_states")
OPERATIONS = (
    "linear",
    "embedding",
    "rms_norm",
    "add_rms_norm",
    "rope_kv_write",
    "attention",
    "kv_move",
    "silu_and_mul",
    "moe",
    "argmax",
    "edit_logits",
    "draw",
    "are_sound",
    "add_noise",
    "rank_drafts",
    "score",
    "tree_select",
    "tree_ancestors",
    "tree_walk",
    *DRAFTING_OPERATIONS,
)
# The native backend runs these in plain torch
TORCH_OPERATIONS = ("edit_logits", "tree_select", "tree_ancestors", "grow_level")
FP8_CAPABILITY = (8, 9)  # of CUDA devices, from which on they multiply FP8 numbers
OVERLAPPING = "starts while the kernel before runs"
BACKENDS = ("auto", "reference", "native", "triton")


def build_ops(
    backend: str,
    device: torch.device,
    storage_dtype: torch.dtype,
    num_threads: int,
    cache_dir: Path,
    *,
    overlap: bool = True,
    input_bits: int = 16,
) -> Ops:
    """Choose a backend for every operation.

    Args:
        backend: "reference", "native" (C++, CPU only), "triton" (CUDA only) or "auto": native on a
            CPU, Triton on a CUDA device, and reference where these cannot run; `Ops.backends` then
            says why.
        storage_dtype: type of the weights and the KV cache.
        num_threads: CPU threads of the native operations.
        cache_dir: folder of the compiled native library.
        overlap: whether Triton kernels start while the kernel before them runs, on GPUs that can.
        input_bits: to how many bits native products with quantised weights round their inputs, with
            one scale for 32: 16, whose errors are about those of float32, or 8, which is faster.

    Raises:
        ValueError: unknown backend, "native" on a device other than a CPU, or "triton" on a device
            other than CUDA or without Triton installed.
        NativeUnavailableError: "native" was asked for and cannot be built here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kernels.backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return reference_ops(device, storage_dtype)
    if backend == "native" and device.type != "cpu":
        raise ValueError(f"kernels.backend 'native' is for CPUs, not for {device}")
    if backend == "triton" or device.type != "cpu":
        return _triton_or_reference(backend, device, storage_dtype, overlap=overlap)
    return _native_or_reference(backend, storage_dtype, num_threads, cache_dir, input_bits)


def _native_or_reference(
    backend: str, storage_dtype: torch.dtype, num_threads: int, cache_dir: Path, input_bits: int
) -> Ops:
    try:
        library = _open_library(cache_dir, num_threads)
    except NativeUnavailableError as error:
        if backend == "native":
            raise
        return reference_ops(torch.device("cpu"), storage_dtype, reason=str(error))
    return native_ops(NativeOps(library, storage_dtype, input_bits))


def _triton_or_reference(
    backend: str,
    device: torch.device,
    storage_dtype: torch.dtype,
    *,
    overlap: bool,
) -> Ops:
    reason = _why_not_triton(device)
    if reason is None:
        ops = triton_ops(storage_dtype, device)
        return _with_overlap(ops) if overlap and _can_overlap(device) else ops
    if backend == "triton":
        raise ValueError(f"kernels.backend 'triton' cannot be used: {reason}")
    return reference_ops(device, storage_dtype, reason)


def _why_not_triton(device: torch.device) -> str | None:
    """None if Triton's kernels can run: on CUDA devices, and in its interpreter (for tests)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton  # imported late: HTTP processes and machines without a GPU do not need it

    if device.type == "cuda" or triton.knobs.runtime.interpret:
        return None
    return f"Triton kernels are for CUDA devices, not for {device}"


def _can_overlap(device: torch.device) -> bool:
    from kernels.triton_overlap import CAPABILITY

    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def _with_overlap(ops: Ops) -> Ops:
    """The operations with launches that overlap; `Ops.backends` says so of Triton's."""
    from kernels.triton_launch import overlapped

    values = {field.name: getattr(ops, field.name) for field in fields(ops)}
    launching = {name: overlapped(value) for name, value in values.items() if callable(value)}
    backends = {
        name: Backend("triton", OVERLAPPING) if backend == Backend("triton") else backend
        for name, backend in ops.backends.items()
    }
    return replace(ops, **launching, backends=backends)


def _open_library(cache_dir: Path, num_threads: int) -> NativeLibrary:
    path = build_library(cache_dir)
    try:
        return NativeLibrary(path, num_threads)
    except OSError as error:  # a damaged file, or a folder mounted noexec
        raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from error


def separate_drafting(ops: Ops) -> Ops:
    """`ops`, but between the forwards of a draft head torch runs many small kernels, not Triton a
    few: for `kernels.fused_drafting=false`."""
    separate = Backend("reference", "kernels.fused_drafting is off")
    composed = Backend(ops.backends["score"].name, separate.reason)
    return replace(
        ops,
        **_drafting(drafting),
        rank_drafts=ComposedRanking(ops.add_noise, ops.argmax, ops.score),
        enter_head=None,
        backends=ops.backends
        | dict.fromkeys(DRAFTING_OPERATIONS, separate)
        | {"rank_drafts": composed},
    )


def _drafting(module: ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in DRAFTING_OPERATIONS}


def native_ops(native: NativeOps) -> Ops:
    """C++ kernels for all operations except logit edits and the growth of dynamic trees."""
    score, own = TorchScore(native.logsumexp), NativeDrafting(native.library)
    packing = NativePacking(native.library)
    return Ops(
        pack_linear=native.pack_linear,
        linear=native.linear,
        embedding=native.embedding,
        rms_norm=native.rms_norm,
        add_rms_norm=native.add_rms_norm,
        rope_kv_write=native.rope_kv_write,
        attention=native.attention,
        kv_move=native.kv_move,
        silu_and_mul=native.silu_and_mul,
        moe=native.moe,
        argmax=native.argmax,
        edit_logits=edit_logits,
        draw=TorchDraw(native.argmax, native.gumbel_argmax, native.draw),
        are_sound=native.are_sound,
        add_noise=native.add_noise,
        rank_drafts=ComposedRanking(native.add_noise, native.argmax, score),
        score=score,
        tree_select=tree.select,
        tree_ancestors=tree.ancestors,
        tree_walk=native.tree_walk,
        ready_roots=own.ready_roots,
        lay_levels=own.lay_levels,
        grow_level=drafting.grow_level,
        first_keys=own.first_keys,
        keep_states=own.keep_states,
        pack_nodes=packing.pack_nodes,
        pack_entries=packing.pack_entries,
        pack_layer=native.pack_layer,
        decoder_layers=native.decoder_layers,
        reads=frozenset({"q4", "q8"}),
        stacks_experts=False,
        activation_dtype=torch.float32,
        backends=dict.fromkeys(OPERATIONS, Backend("native"))
        | native.backends
        | dict.fromkeys(TORCH_OPERATIONS, Backend("reference")),
    )


def triton_ops(
    storage_dtype: torch.dtype,
    device: torch.device | None = None,
) -> Ops:
    """The Triton kernels for every operation, and cuBLAS for linear layers of plain weights."""
    from kernels.activation import triton_kernel as activation
    from kernels.attention import triton_kernel as attention
    from kernels.drafting import triton_entry as entry
    from kernels.drafting import triton_kernel as drafting
    from kernels.kv import triton_kernel as kv
    from kernels.linear import triton_kernel as linear
    from kernels.moe import triton_kernel as moe
    from kernels.norm import triton_kernel as norm
    from kernels.packing import triton_entries as entries
    from kernels.packing import triton_kernel as packing
    from kernels.packing import triton_rows as rows
    from kernels.packing import triton_settle as settling
    from kernels.rope import triton_kernel as rope
    from kernels.sampling import triton_kernel as sampling
    from kernels.sampling import triton_sound as sound
    from kernels.sampling.draw import triton_draw as drawing
    from kernels.sampling.edit import triton_edit as edit
    from kernels.sampling.rank import triton_noisy as noisy
    from kernels.sampling.rank import triton_rank as rank
    from kernels.sampling.score import triton_score as score
    from kernels.tree import triton_kernel as tree

    return Ops(
        pack_linear=linear.pack_linear,
        linear=linear.linear,
        embedding=functools.partial(linear.embedding, dtype=storage_dtype),
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rope_kv_write=rope.rope_kv_write,
        attention=attention.attention,
        kv_move=kv.KVMove(),
        silu_and_mul=activation.silu_and_mul,
        moe=moe.moe,
        argmax=sampling.argmax,
        edit_logits=edit.edit_logits,
        draw=drawing.draw,
        are_sound=sound.are_sound,
        add_noise=noisy.add_noise,
        rank_drafts=rank.rank_drafts,
        score=score.score,
        tree_select=tree.select,
        tree_ancestors=tree.ancestors,
        tree_walk=tree.walk,
        **_drafting(drafting),
        start_rows=rows.start_rows,
        enter_head=entry.enter_head,
        pack_nodes=packing.pack_nodes,
        settle=settling.settle,
        pack_entries=entries.pack_entries,
        reads=_triton_reads(device),
        stacks_experts=True,
        activation_dtype=storage_dtype,
        backends=dict.fromkeys(OPERATIONS, Backend("triton")) | {"linear": Backend("cublas")},
    )


def _triton_reads(device: torch.device | None) -> frozenset[str]:
    """Forms of quantised weights. Older GPUs cannot multiply in FP8."""
    is_old = torch.cuda.is_available() and device is not None and device.type == "cuda"
    is_old = is_old and torch.cuda.get_device_capability(device) < FP8_CAPABILITY
    return frozenset({"q4"} if is_old else {"q4", "fp8"})


def reference_ops(
    device: torch.device, storage_dtype: torch.dtype, reason: str | None = None
) -> Ops:
    """Plain torch for everything; `reason` says why, or is None if the user chose it. Activations
    are float32 on a CPU, elsewhere of the storage dtype."""
    on_cpu = device.type == "cpu"
    draw = TorchDraw(sampling.argmax, sampling.gumbel_argmax) if on_cpu else draw_reference.draw
    score = TorchScore(sampling.logsumexp) if on_cpu else score_reference.score
    return Ops(
        pack_linear=linear.pack_linear,
        linear=linear.linear,
        embedding=linear.embedding_float32 if on_cpu else linear.embedding_as_stored,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rope_kv_write=rope.rope_kv_write,
        attention=attention.attention,
        kv_move=kv.kv_move,
        silu_and_mul=activation.silu_and_mul,
        moe=moe.moe,
        argmax=sampling.argmax,
        edit_logits=edit_logits if on_cpu else edit_reference.edit_logits,
        draw=draw,
        are_sound=sampling.are_sound,
        add_noise=noisy.add_noise,
        rank_drafts=ComposedRanking(noisy.add_noise, sampling.argmax, score),
        score=score,
        tree_select=tree.select,
        tree_ancestors=tree.ancestors,
        tree_walk=tree.walk,
        **_drafting(drafting),
        reads=frozenset(),
        stacks_experts=True,
        activation_dtype=torch.float32 if on_cpu else storage_dtype,
        backends=dict.fromkeys(OPERATIONS, Backend("reference", reason)),
    )
