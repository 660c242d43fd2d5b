"""Weights of a .gguf file, dequantised and renamed to their Hugging Face names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.config_values import integer
from engine.checkpoints.gguf_files.groups import grouped
from engine.checkpoints.gguf_files.header import GGUFFile, GGUFTensor
from engine.checkpoints.gguf_files.parts import read_parts
from engine.checkpoints.gguf_files.rope import ROPE_FREQS, rope_scaling
from engine.checkpoints.manifest import check_manifest, expected_tensors
from engine.checkpoints.rope_scaling import DEFAULT_ROPE_THETA
from engine.checkpoints.rotary import undo_rotary_permutation
from kernels.linear.grouped import GroupedWeight
from kernels.ops import CacheScales

ARCHITECTURE = "llama"
SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
UNQUANTISED = {"F32": np.float32, "F16": np.float16}

# Keys that change the computation; Llamas have none of them, or zero.
OTHER_ARITHMETIC = (
    "llama.attention.clamp_kqv",
    "llama.attention.scale",
    "llama.attention.sliding_window",
    "llama.attn_logit_softcapping",
    "llama.embedding_scale",
    "llama.expert_count",
    "llama.final_logit_softcapping",
    "llama.logit_scale",
    "llama.residual_scale",
)

# `gguf.quants` works on 16 rows at a time; wide rows halve the loading time of a small model.
ELEMENTS_PER_ROW = 2048

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint:
    """A checked model of one or several .gguf files (implements `Checkpoint`). Weights are memory
    mapped, read on use."""

    def __init__(self, path: Path) -> None:
        parts = read_parts(path)
        first = parts[0]
        _refuse_unsupported(first)
        for part in parts:
            _check_tensors(part)
        self._data = {part.path: np.memmap(part.path, mode="r") for part in parts}  # [bytes] uint8
        stored = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        self._file = replace(first, tensors=stored)
        self._sources = {hf_name(name): tensor for name, tensor in stored.items()}
        freqs = self._sources.pop(ROPE_FREQS, None)
        factors = None if freqs is None else self._read(freqs).reshape(-1).tolist()
        try:
            self.arch = arch_from_metadata(self._file, factors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.eos_token_ids = _eos_token_ids(self._file.metadata)
        self.bos_token_id: int | None = self._file.metadata.get("tokenizer.ggml.bos_token_id")
        shapes = {name: tensor.shape for name, tensor in self._sources.items()}
        check_manifest(self.arch, shapes, path)

    def tensor(self, name: str) -> Tensor:
        tensor = self._read(self._sources[name])
        num_heads = self._rotary_heads(name)
        return tensor if num_heads is None else undo_rotary_permutation(tensor, num_heads)

    def _rotary_heads(self, name: str) -> int | None:
        """The heads of a tensor whose rows the file permutes, None for others."""
        if ".q_proj." in name:
            return self.arch.num_heads
        return self.arch.num_kv_heads if ".k_proj." in name else None

    def stored(self, name: str) -> Tensor | GroupedWeight:
        source = self._sources[name]
        kind = GGMLQuantizationType(source.type_id).name
        weight = grouped(kind, self._bytes(source), source.shape)
        if weight is None:
            return self.tensor(name)
        num_heads = self._rotary_heads(name)
        if num_heads is None:
            return weight
        return weight.take(undo_rotary_permutation(torch.arange(len(weight)), num_heads))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in expected_tensors(self.arch):
            yield name, self.tensor(name)

    def cache_scales(self) -> dict[int, CacheScales]:
        return {}

    def _bytes(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        data = self._data[tensor.path]
        return data[tensor.offset : tensor.offset + _num_bytes(tensor)]

    def _read(self, tensor: GGUFTensor) -> Tensor:
        kind = GGMLQuantizationType(tensor.type_id)
        raw = self._bytes(tensor)
        if kind.name == "BF16":
            return torch.from_numpy(raw.copy()).view(torch.bfloat16).reshape(tensor.shape)
        if kind.name in UNQUANTISED:  # copied, because the mapped file is read-only
            values = raw.view(UNQUANTISED[kind.name]).copy()
        else:
            values = dequantize(_wide_rows(raw, kind), kind)
        return torch.from_numpy(values).reshape(tensor.shape)


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; others unchanged."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    if prefix == "blk" and part in LAYER_NAMES:
        return f"model.layers.{index}.{LAYER_NAMES[part]}.{kind}"
    return name


def arch_from_metadata(file: GGUFFile, rope_factors: list[float] | None) -> LlamaArch:
    """The architecture, from the `llama.*` keys and the tensors that are present."""
    get = file.metadata.get
    hidden = _required(file, "llama.embedding_length")
    num_heads = integer(file.metadata, "llama.attention.head_count")
    head_dim = get("llama.attention.key_length", hidden // num_heads)
    rotated = get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(f"rotary embeddings over {rotated} of {head_dim} dimensions")
    theta = float(get("llama.rope.freq_base", DEFAULT_ROPE_THETA))
    return LlamaArch(
        vocab_size=_vocab_size(file),
        hidden_size=hidden,
        num_layers=_required(file, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=integer(file.metadata, "llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        intermediate_size=integer(file.metadata, "llama.feed_forward_length"),
        rms_norm_eps=_required(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=rope_scaling(file.metadata, rope_factors, theta),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        max_position_embeddings=_required(file, "llama.context_length"),
    )


def _refuse_unsupported(file: GGUFFile) -> None:
    """Raise ValueError for anything that would need other arithmetic, before any weight is read."""
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(f"{file.path}: architecture {architecture!r}; {ARCHITECTURE!r} is served")
    for key in OTHER_ARITHMETIC:
        if file.metadata.get(key, 0):
            raise ValueError(f"{file.path}: {key} {file.metadata[key]!r} is not supported; 0 is")


def _check_tensors(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        _check_tensor(file, tensor)


def _check_tensor(file: GGUFFile, tensor: GGUFTensor) -> None:
    known = {kind.value: kind.name for kind in GGMLQuantizationType}
    kind = known.get(tensor.type_id, f"type {tensor.type_id}")
    if kind not in SUPPORTED_TYPES:
        raise ValueError(
            f"{file.path}: tensor {tensor.name} is {kind}; "
            f"supported are {', '.join(SUPPORTED_TYPES)}"
        )
    block = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)][0]
    if not tensor.shape or tensor.shape[-1] % block:
        raise ValueError(
            f"{file.path}: tensor {tensor.name} of shape {list(tensor.shape)} does not divide "
            f"into {kind} blocks of {block}"
        )
    end = tensor.offset + _num_bytes(tensor)
    if end > file.size:
        raise ValueError(
            f"{file.path} is truncated: tensor {tensor.name} ends at byte {end} of {file.size}"
        )


def _num_bytes(tensor: GGUFTensor) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    return math.prod(tensor.shape) // block * size


def _wide_rows(raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """The same blocks in rows as wide as ELEMENTS_PER_ROW allows (a row is whole blocks)."""
    block, size = GGML_QUANT_SIZES[kind]
    num_blocks = len(raw) // size
    width = next(w for w in range(ELEMENTS_PER_ROW // block, 0, -1) if num_blocks % w == 0)
    return raw.reshape(-1, width * size)


def _required(file: GGUFFile, key: str) -> Any:
    if key not in file.metadata:
        raise ValueError(f"the metadata lacks {key}")
    return file.metadata[key]


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError("missing tensor token_embd.weight")
    return embedding.shape[0]


def _eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """The ids of end of text, end of turn and end of message that the file names."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (metadata.get(f"tokenizer.ggml.{key}") for key in keys)
    return tuple(dict.fromkeys(int(item) for item in ids if item is not None))
