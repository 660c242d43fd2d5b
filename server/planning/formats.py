"""In which format each part of a model keeps its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.checkpoints.config_values import table
from engine.checkpoints.quantised.config import is_named, left_out_patterns

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are kept and multiplied."""

    name: str
    bytes_per_weight: float
    fp8_products: bool = False  # activations are rounded to FP8, too, by a kernel of their own
    bytes_per_output: float = 0.0  # of a scale for each


BF16 = Format("bf16", 2.0)
FP8 = Format("fp8", 1.0, fp8_products=True, bytes_per_output=4.0)
GROUP = 128  # weights per scale, where it is not said
# One scale of two bytes for so many weights; products in bfloat16.
FORMATS = {
    "bf16": BF16,
    "fp8": FP8,
    "int8": Format("int8", 1.0 + 2 / GROUP),
    "int4": Format("int4", 0.5 + 2 / GROUP),
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
    """The format of each part. Routers and norms are never quantised, embedding and LM head only if
    `model.weights=q4` asks for it."""

    attention: Format = BF16
    dense: Format = BF16  # feed-forward of layers without experts
    shared: Format = BF16  # the expert that every token uses
    experts: Format = BF16
    vocabulary: Format = BF16
    router: Format = BF16

    @classmethod
    def all_in(cls, kept: Format, router: Format) -> PartFormats:
        """All parts but the router in one format."""
        return cls(kept, kept, kept, kept, kept, router)

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
    rest = PartFormats.all_in(other, other)
    quantised = table(config, "quantization_config")
    if not quantised:
        return rest
    chosen, left_out = _method(quantised), left_out_patterns(quantised)
    if chosen.name == "int4" and _is_reordered(quantised):
        return rest
    mlp = "feed_forward" if "text_config" in config else "mlp"
    names = {part: module.format(mlp=mlp) for part, module in MODULES.items()}
    found = {part: chosen for part, name in names.items() if not _is_left_out(name, left_out)}
    return replace(rest, **found)


def _method(quantised: Json) -> Format:
    method = quantised.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return _in_blocks(FP8, quantised.get("weight_block_size"))
    if method in ("gptq", "awq"):
        found = _of_bits(quantised.get("bits"), "int", method)
        # GPTQ stores zero points of symmetric weights, too, which are then left out.
        symmetric = method == "gptq" and quantised.get("sym", True) is True
        return _in_groups(found, quantised.get("group_size"), symmetric)
    if method == "compressed-tensors":
        weights = _weights(quantised)
        found = _of_bits(weights.get("num_bits"), weights.get("type"), method)
        if found == FP8:
            return _in_blocks(found, weights.get("block_structure"))
        return _in_groups(found, weights.get("group_size"), weights.get("symmetric", True))
    raise ValueError(f"quant_method {method!r} is not known; known: {KNOWN_METHODS}")


def _weights(quantised: Json) -> Json:
    """What compressed-tensors says of weights, in the first group of layers."""
    groups = table(quantised, "config_groups")
    return table(table(groups, next(iter(groups), "")), "weights")


def _in_blocks(found: Format, block: object) -> Format:
    """A float32 scale for each output and block of inputs, as they are held."""
    if not isinstance(block, list | tuple) or len(block) != 2:
        return found
    return replace(found, bytes_per_weight=1 + 4 / block[1], bytes_per_output=0.0)


def _in_groups(found: Format, group: object, symmetric: object) -> Format:
    """Symmetric groups have a scale in float16, others two float32 numbers."""
    if found.name != "int4":
        return found
    size = group if isinstance(group, int) and group > 0 else GROUP
    return replace(found, bytes_per_weight=0.5 + (2 if symmetric else 8) / size)


def _is_reordered(quantised: Json) -> bool:
    """Whether groups are of inputs that are not neighbours: such weights become plain numbers."""
    order = _weights(quantised).get("actorder")
    return quantised.get("desc_act") is True or order in ("group", True)


def _of_bits(bits: object, kind: object, method: object) -> Format:
    known = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4"}
    if (bits, kind) not in known:
        raise ValueError(
            f"{method} weights of {bits} bits ({kind}) are not known; known: 8 (float), 8 and 4 "
            "(int)"
        )
    return FORMATS[known[bits, kind]]  # type: ignore[index]


def _is_left_out(name: str, patterns: tuple[str, ...]) -> bool:
    """With or without the prefixes of a model for text and images."""
    return is_named((name, f"language_model.{name}"), patterns)
