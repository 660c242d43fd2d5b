"""In which format each part of a model keeps its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are kept and multiplied."""

    name: str
    bytes_per_weight: float
    fp8_products: bool = False  # activations are rounded to FP8, too, by a kernel of their own


BF16 = Format("bf16", 2.0)
FP8 = Format("fp8", 1.0, fp8_products=True)
# One bfloat16 scale for 128 weights; products in bfloat16.
FORMATS = {
    "bf16": BF16,
    "fp8": FP8,
    "int8": Format("int8", 1.0 + 2 / 128),
    "int4": Format("int4", 0.5 + 2 / 128),
    "float32": Format("float32", 4.0),
}
# Modules of Hugging Face names that stand for a part, in a middle layer.
MODULES = {
    "attention": "model.layers.1.self_attn.q_proj",
    "dense": "model.layers.1.{mlp}.gate_proj",
    "shared": "model.layers.1.feed_forward.shared_expert.gate_proj",
    "experts": "model.layers.1.feed_forward.experts.0.gate_proj",
}
KNOWN_METHODS = "fp8, fbgemm_fp8, compressed-tensors, gptq, awq"


@dataclass(frozen=True, slots=True)
class PartFormats:
    """The format of each part. Embedding, LM head, router and norms are never quantised."""

    attention: Format = BF16
    dense: Format = BF16  # feed-forward of layers without experts
    shared: Format = BF16  # the expert that every token uses
    experts: Format = BF16
    vocabulary: Format = BF16

    def with_linears(self, name: str) -> PartFormats:
        """All linear layers in the format `name`. ValueError for an unknown one."""
        chosen = format_named(name)
        return replace(self, attention=chosen, dense=chosen, shared=chosen, experts=chosen)


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"weights {name!r}: not a known format; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def stored_formats(config: Json, plain: str) -> PartFormats:
    """What the `quantization_config` of a config.json says; parts that it leaves out are `plain`.

    Raises:
        ValueError: a method or number of bits that is not known.
    """
    other = format_named(plain)
    rest = PartFormats(other, other, other, other, other)
    quantised = table(config, "quantization_config")
    if not quantised:
        return rest
    chosen, left_out = _method(quantised), _left_out(quantised)
    mlp = "feed_forward" if "text_config" in config else "mlp"
    names = {part: module.format(mlp=mlp) for part, module in MODULES.items()}
    found = {part: chosen for part, name in names.items() if not _matches(name, left_out)}
    return replace(rest, **found)


def table(config: Json, key: str) -> Json:
    """The table of a key; an empty one where it is absent. ValueError for anything else."""
    found = config.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{key} must be a table, not {found!r}")
    return found or {}


def _method(quantised: Json) -> Format:
    method = quantised.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return FP8
    if method in ("gptq", "awq"):
        return _of_bits(quantised.get("bits"), "int", method)
    if method == "compressed-tensors":
        groups = table(quantised, "config_groups")
        weights = table(table(groups, next(iter(groups), "")), "weights")
        return _of_bits(weights.get("num_bits"), weights.get("type"), method)
    raise ValueError(f"quant_method {method!r} is not known; known: {KNOWN_METHODS}")


def _of_bits(bits: object, kind: object, method: object) -> Format:
    known = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4"}
    if (bits, kind) not in known:
        raise ValueError(
            f"{method} weights of {bits} bits ({kind}) are not known; known: 8 (float), 8 and 4 "
            "(int)"
        )
    return FORMATS[known[bits, kind]]  # type: ignore[index]


def _left_out(quantised: Json) -> Sequence[str]:
    found = [*(quantised.get("ignore") or ()), *(quantised.get("modules_to_not_convert") or ())]
    return [str(name) for name in found]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """As compressed-tensors reads them: `re:` begins a regular expression, others are names, here
    with or without the model's prefix."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.search(pattern.removeprefix("re:"), name):
                return True
        elif pattern.endswith(name) or name.endswith(pattern) or f".{pattern}." in f".{name}.":
            return True
    return False
