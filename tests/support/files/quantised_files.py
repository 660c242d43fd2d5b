"""Writes tiny models in the layouts of published quantised checkpoints, from the definition of each
layout. What is written is also what the model then computes with, as plain float32 numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Written = tuple[Tensors, Tensor]  # tensors by the end of their names, and the numbers they mean
FP8 = torch.float8_e4m3fn
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight whose code is at place i of a word
PLAIN = ("lm_head", "router")


@dataclass(frozen=True)
class Format:
    """A layout: its `quantization_config`, and how it writes a weight [N, K]."""

    config: dict[str, Any]
    write: Callable[[Tensor], Written]
    left_out: tuple[str, ...] = field(default=PLAIN)


def quantised_model(model: nn.Module, form: Format) -> Tensors:
    """Round the model's linear layers in place; the tensors to store in their stead."""
    stored = dict(model.state_dict())
    for name, module in model.named_modules():
        is_left_out = any(part in form.left_out for part in name.split("."))
        if not isinstance(module, nn.Linear) or is_left_out:
            continue
        tensors, meant = form.write(module.weight.detach())
        module.weight.data.copy_(meant)
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{end}": tensor.contiguous() for end, tensor in tensors.items()}
    return {name: tensor.clone() for name, tensor in stored.items()}


def rewrite(folder: Path, model: nn.Module, form: Format) -> None:
    """Replace the weights of a written model by quantised ones."""
    stored = quantised_model(model, form)
    if getattr(model.config, "tie_word_embeddings", False):
        stored.pop("lm_head.weight", None)
    save_file(stored, folder / "model.safetensors")
    change_config(folder, quantization_config=form.config)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Set tensors; None removes one."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: each for name, each in tensors.items() if each is not None}, path)


def words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[n, 8 w] codes of four bits -> [n, w] int32: place i holds code order[i] of eight."""
    missing = -codes.shape[1] % 8
    whole = torch.nn.functional.pad(codes.long(), (0, missing)).reshape(len(codes), -1, 8)
    word = sum(whole[..., code] << 4 * place for place, code in enumerate(order))
    assert isinstance(word, Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).int()


def four_bits(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, K / group] and zero points."""
    groups = weight.reshape(len(weight), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        scales, zeros = groups.abs().amax(-1) / 7, torch.full(low.shape, 8.0)
        scales = scales.half().float()
    else:
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(1, 15)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.reshape(weight.shape).int(), scales, zeros.int()


def meant(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """`groups`: of each input."""
    return (codes - zeros[:, groups]).float() * scales[:, groups]


def fp8(scale_of: Callable[[Tensor], Tensor], name: str = "weight_scale") -> Callable[..., Written]:
    """`scale_of`: a weight's scales, which broadcast against it."""

    def write(weight: Tensor) -> Written:
        scales = scale_of(weight)
        values = (weight / scales).to(FP8)
        return {"weight": values, name: scales}, values.float() * scales

    return write


def per_tensor(weight: Tensor) -> Tensor:
    return (weight.abs().max() / 448).reshape(1)


def per_channel(weight: Tensor) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / 448


def static(weight: Tensor) -> Written:
    tensors, numbers = fp8(per_tensor)(weight)
    return tensors | {"input_scale": torch.tensor([0.02])}, numbers


def in_blocks(size: int, name: str = "weight_scale") -> Callable[..., Written]:
    def write(weight: Tensor) -> Written:
        N, K = weight.shape
        rows, columns = torch.arange(N) // size, torch.arange(K) // size
        scales = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) / 448 + 0.001
        every = scales[rows][:, columns]
        values = (weight / every).clamp(-448, 448).to(FP8)
        return {"weight": values, name: scales}, values.float() * every

    return write


def packed(
    group: int, *, symmetric: bool = True, dtype: torch.dtype = torch.float16
) -> Callable[..., Written]:
    """compressed-tensors. `group` 0: a scale for each output."""

    def write(weight: Tensor) -> Written:
        size = group or weight.shape[1]
        codes, scales, zeros = four_bits(weight, size, symmetric)
        scales = scales.to(dtype)
        tensors = {
            "weight_packed": words(codes),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T).T
        groups = torch.arange(weight.shape[1]) // size
        return tensors, meant(codes, scales.float(), zeros, groups)

    return write


def packed_in_order(weight: Tensor) -> Written:
    """compressed-tensors with the groups of inputs in the order of their activations."""
    order = shuffled(weight.shape[1])
    groups = order.argsort() // 32
    codes, scales, zeros = four_bits(weight[:, order], 32, True)
    codes = codes[:, order.argsort()]
    tensors = {
        "weight_packed": words(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": groups.int(),
    }
    return tensors, meant(codes, scales, zeros, groups)


def awq(weight: Tensor) -> Written:
    codes, scales, zeros = four_bits(weight, 32, False)
    groups = torch.arange(weight.shape[1]) // 32
    tensors = {
        "qweight": words(codes.T, AWQ_ORDER),
        "qzeros": words(zeros.T, AWQ_ORDER),
        "scales": scales.half().T,
    }
    return tensors, meant(codes, scales, zeros, groups)


def gptq(
    group: int = 32, *, symmetric: bool = False, in_order: bool = False, offset: int = 1
) -> Callable[..., Written]:
    """`offset`: what the first version takes off zero points before it stores them."""

    def write(weight: Tensor) -> Written:
        K = weight.shape[1]
        size = K if group == -1 else group
        order = shuffled(K) if in_order else torch.arange(K)
        codes, scales, zeros = four_bits(weight[:, order], size, symmetric)
        codes, groups = codes[:, order.argsort()], order.argsort() // size
        tensors = {
            "qweight": words(codes).T,
            "qzeros": words(zeros.T - offset),
            "scales": scales.half().T,
            "g_idx": groups.int(),
        }
        return tensors, meant(codes, scales, zeros, groups)

    return write


def shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors, with what it says in any case."""
    args = {"symmetric": True, "dynamic": False, "observer": "minmax", "actorder": None}
    group = {"targets": ["Linear"], "weights": args | weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": ["lm_head", "re:.*router"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
    }


FLOAT = {"num_bits": 8, "type": "float"}
TOKEN = FLOAT | {"strategy": "token", "dynamic": True, "symmetric": True}
INT4 = {"num_bits": 4, "type": "int"}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
IN_GROUPS = INT4 | {"strategy": "group"}


def int4(**weights: Any) -> dict[str, Any]:
    return compressed("pack-quantized", IN_GROUPS | weights, None)


def float8(weights: str, **inputs: Any) -> dict[str, Any]:
    return compressed("float-quantized", FLOAT | {"strategy": weights}, TOKEN | inputs)


def fp8_blocks() -> dict[str, Any]:
    weights = FLOAT | {"strategy": "block", "block_structure": [128, 128]}
    return compressed("float-quantized", weights, TOKEN | {"strategy": "group"})


FP8_WEIGHTS = Format(  # activations are not rounded
    compressed("naive-quantized", FLOAT | {"strategy": "channel"}, None), fp8(per_channel)
)
FP8_CHANNEL = Format(float8("channel"), fp8(per_channel))
FORMATS: dict[str, Format] = {
    "fp8-channel": FP8_CHANNEL,
    "fp8-tensor-static": Format(float8("tensor", strategy="tensor", dynamic=False), static),
    "fp8-blocks": Format(fp8_blocks(), in_blocks(128)),
    "fbgemm": Format(
        {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["lm_head", "router"],
        },
        fp8(per_channel),
    ),
    "fp8-own-blocks": Format(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "ignored_layers": ["lm_head"]},
        in_blocks(32, "weight_scale_inv"),
    ),
    "packed": Format(int4(group_size=32), packed(32, dtype=torch.bfloat16)),
    "packed-zeros": Format(int4(group_size=64, symmetric=False), packed(64, symmetric=False)),
    "packed-channel": Format(int4(strategy="channel"), packed(0)),
    "packed-in-order": Format(int4(group_size=32, actorder="group"), packed_in_order),
    "awq": Format(AWQ_CONFIG, awq),
    "gptq": Format(GPTQ_CONFIG, gptq()),
    "gptq-symmetric": Format(GPTQ_CONFIG | {"sym": True}, gptq(symmetric=True)),
    "gptq-in-order": Format(GPTQ_CONFIG | {"desc_act": True}, gptq(in_order=True)),
    "gptq-2-all-inputs": Format(
        GPTQ_CONFIG | {"group_size": -1, "checkpoint_format": "gptq_v2"}, gptq(-1, offset=0)
    ),
}


def separate_experts(model: nn.Module, form: Format) -> Tensors:
    """A Llama 4 with its experts as linear layers, as compressed-tensors stores them."""
    stored = quantised_model(model, form)
    for name, weights in every_expert(model).items():
        del stored[name]
        prefix, _, part = name.rpartition(".")
        parts = ("down_proj",) if part == "down_proj" else ("gate_proj", "up_proj")
        for expert, weight in enumerate(weights.data):
            for side, numbers in zip(parts, weight.T.chunk(len(parts)), strict=True):
                tensors, rounded = form.write(numbers)
                numbers.copy_(rounded)
                ends = {f"{prefix}.{expert}.{side}.{end}": each for end, each in tensors.items()}
                stored |= {end: each.contiguous() for end, each in ends.items()}
    return stored


def fused_experts(model: nn.Module, form: Format) -> Tensors:
    """A Llama 4 with two tensors for all experts of a layer, as fbgemm_fp8 stores them."""
    stored = quantised_model(model, form)
    for name, weights in every_expert(model).items():
        scales = weights.data.abs().amax(1, keepdim=True) / 448  # [E, 1, out]
        stored[name] = (weights.data / scales).to(FP8)
        is_down = name.endswith("down_proj")
        stored[f"{name}_scale"] = scales.transpose(1, 2).contiguous() if is_down else scales
        weights.data.copy_(stored[name].float() * scales)
    return stored


def every_expert(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if ".experts." in name}


def llama4_file(tensors: Tensors, folder: Path, form: Format) -> None:
    """With the names and the configuration of a model for text and images."""
    named = {f"language_model.{name}": each.clone() for name, each in tensors.items()}
    save_file(named, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    both = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {},
        "quantization_config": form.config,
    }
    (folder / "config.json").write_text(json.dumps(both), encoding="utf-8")
