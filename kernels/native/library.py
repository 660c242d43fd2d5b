"""The compiled kernels as Python sees them: one shared library and one pool of threads."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from torch import Tensor

P = ctypes.c_void_p  # a pointer
I = ctypes.c_int64  # noqa: E741
R = ctypes.c_float

# function -> argument types after the pool
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aerie_pack_bf16": (P, I, I, P),
    "aerie_pack_f32": (P, I, I, P),
    "aerie_linear_bf16": (P, I, I, P, I, P, P),
    "aerie_linear_f32": (P, I, I, P, I, P, P),
    "aerie_linear_bf16_amx": (P, I, I, P, I, P, P),
    "aerie_linear_bf16_dots": (P, I, I, P, I, P, P),
    "aerie_embedding_bf16": (P, I, P, I, P),
    "aerie_embedding_f32": (P, I, P, I, P),
    "aerie_pack_groups": (I, I, I, P, P, P, I, I, P),
    **dict.fromkeys(
        (f"aerie_linear_groups_{input_bits}" for input_bits in (8, 16)),
        (I, I, I, I, P, I, I, P, I, P, P, I),
    ),
    "aerie_embedding_groups": (I, I, I, I, P, I, P, I, P),
    "aerie_decoder_layers": (P, I, P, P, P, P, P, P, P),
    "aerie_rms_norm": (P, P, P, I, I, R, P),
    **dict.fromkeys(
        (f"aerie_rope_kv_write_{cache}" for cache in ("bf16", "f32", "fp8")),
        (P, I, I, I, I, P, P, P, P, P, R, R, P),
    ),
    **dict.fromkeys(
        (f"aerie_attention_{cache}" for cache in ("bf16", "bf16_amx", "bf16_dots", "f32", "fp8")),
        (P, P, P, P, P, P, I, P, P, I, I, I, I, I, R, R, P),
    ),
    "aerie_kv_move": (P, I, I, P, P, I),
    "aerie_silu_and_mul": (P, I, I, P),
    "aerie_route": (P, I, I, P, I, P, P),
    "aerie_add_noise": (P, P, P, P, P, P, P, I, I, P),
    "aerie_gumbel_argmax": (P, P, I, I, P),
    "aerie_argmax": (P, I, I, P),
    "aerie_draw": (P, P, P, P, I, I, P),
    "aerie_sound": (P, I, I, P),
    "aerie_first_keys": (P, P, P, I, I, I, P),
    "aerie_ready_roots": (P, P, P, P, P, P, I, I, I, I, P, P, P, P, P, P),
    "aerie_keep_states": (P, P, P, P, P, P, I, I),
    "aerie_lay_levels": (P, P, P, P, P, I, P, P, P, I, I, I, I, I, I, P, P, P),
    "aerie_pack_nodes": (*[P] * 9, *[I] * 7, *[P] * 8),
    "aerie_pack_entries": (*[P] * 10, *[I] * 5, *[P] * 9),
    "aerie_tree_walk": (P, P, P, I, I, I, P, P, P),
    "aerie_logsumexp": (P, I, I, P),
}


class NativeLibrary:
    """`call(name)` gives the C function with the thread pool as its first argument."""

    def __init__(self, path: Path, num_threads: int) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        create = self._library.aerie_pool_create
        create.argtypes, create.restype = (ctypes.c_int,), P
        self._destroy = self._library.aerie_pool_destroy
        self._destroy.argtypes, self._destroy.restype = (P,), None
        self.pool = create(num_threads)
        self.instructions = self._bfloat16_instructions()

    def __del__(self) -> None:
        pool, self.pool = getattr(self, "pool", None), None
        if pool is not None:
            self._destroy(pool)

    def _bfloat16_instructions(self) -> str | None:
        """The instructions that multiply bfloat16 numbers; None if they are widened to float32."""
        if self._library.aerie_amx_available():
            return "amx"
        return "avx512_bf16" if self._library.aerie_dots_available() else None

    def call(self, name: str) -> Any:
        function = getattr(self._library, name)
        function.argtypes = (P, *SIGNATURES[name])
        function.restype = None
        return function

    def address(self, name: str) -> int:
        """Where a function lies, for structures that point to it."""
        address = ctypes.cast(getattr(self._library, name), P).value
        assert address is not None
        return address

    def number(self, name: str, *arguments: int) -> int:
        """Call a function that takes and returns integers and needs no pool."""
        function = getattr(self._library, name)
        function.argtypes = (I,) * len(arguments)
        function.restype = I
        return int(function(*arguments))


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()
