"""Key and value tensors of all layers, addressed by slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCRATCH_BLOCKS = 1  # after the blocks of sequences: takes keys and values that nothing reads


@dataclass(frozen=True, slots=True)
class KVStorage:
    """Pages of one model. Block b, offset o is slot b * block_size + o."""

    keys: tuple[Tensor, ...]  # per layer [num_blocks, block_size, Hkv, D]
    values: tuple[Tensor, ...]  # per layer, same shape

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def num_blocks(self) -> int:
        """Includes the scratch block, which is the last."""
        return self.keys[0].shape[0]

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        zeroed: bool = False,
    ) -> KVStorage:
        """Uninitialised pages; `zeroed` if slots may be read before they are written."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        make = torch.zeros if zeroed else torch.empty  # on a CPU, untouched pages cost nothing

        def pages() -> tuple[Tensor, ...]:
            return tuple(make(shape, dtype=dtype, device=device) for _ in range(num_layers))

        return cls(keys=pages(), values=pages())


def bytes_per_block(
    num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of keys and values that one block takes over all layers."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
