"""The memory needed on each GPU, counted from sizes without loading weights."""

from __future__ import annotations

from dataclasses import dataclass

from server.planning.products import (
    FLOAT32,
    HeadSizes,
    bias_bytes,
    head_fc,
    head_layer_products,
    head_lm_head,
    layer_products,
    matrix_bytes,
    vocabulary,
)
from server.planning.sizes import ModelSizes

GIB = 1024**3
RESERVED = GIB  # for CUDA, its graphs and NCCL: an estimate
TOKEN_ID = 8  # bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the GPU of rank 0, which holds the most."""

    num_gpus: int
    gpu: int
    target_weights: int
    draft_weights: int
    target_kv: int
    draft_kv: int
    step: int  # activations and logits
    kv_copies: int  # GPUs that hold each KV head of the target
    block_size: int  # tokens
    num_blocks: int

    @property
    def weights(self) -> int:
        return self.target_weights + self.draft_weights

    @property
    def total(self) -> int:
        """Including the reserve."""
        return self.weights + self.target_kv + self.draft_kv + self.step + RESERVED

    def num_sequences(self, length: int) -> int:
        """How many sequences of `length` tokens fit at once."""
        return self.num_blocks // -(-length // self.block_size)

    @property
    def entries(self) -> dict[str, int]:
        """What the memory is for, and what is left."""
        return {
            "target weights": self.target_weights,
            "draft weights": self.draft_weights,
            "target KV": self.target_kv,
            "draft KV": self.draft_kv,
            "activations and logits": self.step,
            "CUDA, NCCL (estimate)": RESERVED,
            "free": self.gpu - self.total,
        }


def target_bytes(sizes: ModelSizes, ranks: int, max_len: int) -> int:
    """Weights of the target on the first of `ranks` GPUs; rotary tables reach to `max_len`."""
    table = vocabulary(sizes, ranks).num_bytes
    norms = (2 * sizes.num_layers + 1) * sizes.hidden_size * FLOAT32
    matrices = matrix_bytes(layer_products(sizes, ranks)) + table * (1 if sizes.tied else 2)
    tables = _rotary_bytes(sizes, max_len) + _llama4_bytes(sizes, max_len)
    return matrices + norms + bias_bytes(sizes, ranks) + tables


def head_bytes(head: HeadSizes, ranks: int, max_len: int) -> int:
    """Weights of a draft head beside those that it shares with the target."""
    layers, cut = head.layers, 1 if head.replicated else ranks
    found = matrix_bytes(head_layer_products(head, ranks)) + head.norm_values * FLOAT32
    fc = head_fc(head, ranks)
    if fc is not None:
        found += fc.num_bytes + (fc.outputs * FLOAT32 if head.fc_bias else 0)
    found += head_lm_head(head, ranks).num_bytes if head.owns_lm_head else 0
    found += vocabulary(layers, ranks).num_bytes if head.owns_embedding else 0
    found += head.draft_vocab_size * TOKEN_ID if head.token_table else 0
    return found + bias_bytes(layers, cut) + _rotary_bytes(layers, max_len)


def _rotary_bytes(sizes: ModelSizes, max_len: int) -> int:
    return max_len * sizes.head_dim * FLOAT32


def _llama4_bytes(sizes: ModelSizes, max_len: int) -> int:
    """Factors of queries by position, a rotation by nothing and a norm's weight of ones."""
    scales = 0 < sizes.temperature_floor <= max_len
    unturned = sizes.head_dim if 0 < sizes.local_layers < sizes.num_layers else 0
    ones = sizes.head_dim if sizes.qk_norm else 0
    return ((max_len if scales else 0) + unturned + ones) * FLOAT32


def check_fit(needed: int, step: int, gpu: int, ranks: int) -> int:
    """What `needed` bytes of weights leave of a GPU for the cache.

    Raises:
        ValueError: nothing.
    """
    free = gpu - RESERVED - step - needed
    if free <= 0:
        raise ValueError(
            f"{needed / GIB:.1f} GiB of weights on each of {ranks} GPUs, and "
            f"{(RESERVED + step) / GIB:.1f} GiB for CUDA, NCCL and activations, do not fit into "
            f"{gpu / GIB:.1f} GiB: a larger parallel.tensor puts less on each"
        )
    return free
