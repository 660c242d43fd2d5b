"""What a `quantization_config` says about the stored weights of linear layers. Imports no torch.

Every key that changes the numbers is used or refused. Keys that say how a model was quantised, such
as observers and damping, change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.checkpoints.config_values import Json, flag, names, number, table

Layout = Literal["fp8", "packed", "awq", "gptq"]
Strategy = Literal["tensor", "channel", "block", "group"]  # what shares a scale
FP8_FORMATS, INT4_FORMATS = ("float-quantized", "naive-quantized"), ("pack-quantized",)
GROUPS = 32  # inputs: groups are multiples of it
META_BOUND = 1200.0  # of activations, where fbgemm_fp8 files name none
ALL_LINEAR = "Linear"  # stands for every linear layer among targets


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some linear layers are stored."""

    layout: Layout
    strategy: Strategy
    group: int | None = None  # inputs per scale; None: all
    block: tuple[int, int] | None = None  # outputs and inputs per scale
    symmetric: bool = True
    rounds_inputs: bool = False  # FP8: activations are rounded to FP8, too
    input_bound: float | None = None  # larger activations are cut off before that
    zero_offset: int = 0  # GPTQ: what is added to a stored zero point


@dataclass(frozen=True, slots=True)
class Quantisation:
    """The schemes of a model's linear layers."""

    method: str
    rules: tuple[tuple[tuple[str, ...], Scheme], ...]  # targets, scheme
    left_out: tuple[str, ...]  # patterns of layers that are stored as plain numbers

    def scheme(self, names: Sequence[str]) -> Scheme | None:
        """Of a layer that has these names; None if it is not to be quantised."""
        if is_named(names, self.left_out):
            return None
        own = [rule for rule in self.rules if is_named(names, rule[0])]
        general = [rule for rule in self.rules if ALL_LINEAR in rule[0]]
        return next((scheme for _, scheme in own + general), None)


def is_named(names: Sequence[str], patterns: Iterable[str]) -> bool:
    """Whether one of a layer's names fits: `re:` begins a regular expression for the whole name;
    others are names, or whole parts of one such as `lm_head` or `self_attn`."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            expression = re.compile(pattern.removeprefix("re:"))
            if any(expression.match(name) for name in names):
                return True
        elif any(f".{pattern}." in f".{name}." for name in names):
            return True
    return False


def read_quantisation(config: Json) -> Quantisation | None:
    """The `quantization_config` of a config.json, if there is one.

    Raises:
        ValueError: a method, format or option that is not implemented; names what is.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ValueError(f"quantization_config must be a table, not {found!r}")
    method = str(found.get("quant_method"))
    if method not in METHODS:
        raise ValueError(
            f"quantised weights (quant_method {method!r}) are not supported; "
            f"{', '.join(METHODS)} are"
        )
    try:
        return Quantisation(method, tuple(METHODS[method](found)), left_out_patterns(found))
    except ValueError as error:
        raise ValueError(f"quantization_config ({method}): {error}") from error


Rules = Iterable[tuple[tuple[str, ...], Scheme]]
EVERY = (ALL_LINEAR,)


def left_out_patterns(found: Json) -> tuple[str, ...]:
    """Patterns of the layers that a `quantization_config` leaves out, see `is_named`."""
    keys = ("ignore", "ignored_layers", "modules_to_not_convert")
    return tuple(name for key in keys for name in _patterns(found, key))


def _patterns(found: Json, key: str) -> tuple[str, ...]:
    patterns = names(found, key)
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"{key} {pattern!r} is no regular expression: {error}") from error
    return patterns


def _compressed_tensors(found: Json) -> Rules:
    _refuse_compression(found)
    groups = table(found, "config_groups")
    if not groups:
        raise ValueError("config_groups is missing")
    for name in groups:
        group = table(groups, name)
        targets = _patterns(group, "targets") or EVERY
        yield targets, _group_scheme(group, str(group.get("format") or found.get("format")))


def _refuse_compression(found: Json) -> None:
    sparse = table(found, "sparsity_config").get("format", "dense")
    if sparse != "dense":
        raise ValueError(f"sparsity_config of format {sparse!r} is not supported; 'dense' is")
    if found.get("transform_config"):
        raise ValueError("transform_config (rotated weights) is not supported")


def _group_scheme(group: Json, form: str) -> Scheme:
    weights, inputs = table(group, "weights"), table(group, "input_activations")
    if group.get("output_activations"):
        raise ValueError("output_activations are not supported; null is")
    if weights.get("dynamic"):
        raise ValueError(f"weights with dynamic {weights['dynamic']!r} are not supported")
    bits, kind = weights.get("num_bits"), weights.get("type")
    if (bits, kind) == (8, "float") and form in FP8_FORMATS:
        return _float_scheme(weights, inputs)
    if (bits, kind) == (4, "int") and form in INT4_FORMATS:
        return _packed_scheme(weights, inputs)
    raise ValueError(
        f"weights of {bits} bits ({kind}) in the format {form!r} are not supported; 8 bits (float) "
        f"in {' or '.join(FP8_FORMATS)} and 4 bits (int) in {INT4_FORMATS[0]} are"
    )


def _float_scheme(weights: Json, inputs: Json) -> Scheme:
    strategy = _one_of("the strategy of weights", weights.get("strategy"), FP8_STRATEGIES)
    if not flag(weights, "symmetric", True):
        raise ValueError("float weights that are not symmetric are not supported")
    if inputs and (inputs.get("num_bits"), inputs.get("type")) != (8, "float"):
        raise ValueError(
            f"input_activations of {inputs.get('num_bits')} bits ({inputs.get('type')}) are not "
            "supported; 8 (float) and null are"
        )
    block = _block(weights.get("block_structure")) if strategy == "block" else None
    return Scheme("fp8", strategy, block=block, rounds_inputs=bool(inputs))


def _packed_scheme(weights: Json, inputs: Json) -> Scheme:
    if inputs:
        raise ValueError(
            f"4-bit weights with input_activations of {inputs.get('num_bits')} bits are not "
            "supported; null is"
        )
    strategy = _one_of("the strategy of weights", weights.get("strategy"), INT4_STRATEGIES)
    group = _group(weights.get("group_size")) if strategy == "group" else None
    return Scheme("packed", strategy, group, symmetric=flag(weights, "symmetric", True))


def _fbgemm_fp8(found: Json) -> Rules:
    bound = number(found, "activation_scale_ub", META_BOUND)
    yield EVERY, Scheme("fp8", "channel", rounds_inputs=True, input_bound=bound)


def _fp8(found: Json) -> Rules:
    _one_of("activation_scheme", found.get("activation_scheme", "dynamic"), ("dynamic", "static"))
    _one_of("fmt", found.get("fmt", "e4m3"), ("e4m3",))
    block = found.get("weight_block_size")
    if block is None:
        yield EVERY, Scheme("fp8", "tensor", rounds_inputs=True)
    else:
        yield EVERY, Scheme("fp8", "block", block=_block(block), rounds_inputs=True)


def _awq(found: Json) -> Rules:
    _four_bits(found.get("bits", found.get("w_bit")))
    form = found.get("version") or found.get("format") or "gemm"
    _one_of("version", str(form).lower(), ("gemm",))
    group = _group(found.get("group_size", found.get("q_group_size")))
    _one_of("zero_point", flag(found, "zero_point", True), (True,))
    yield EVERY, Scheme("awq", "group", group, symmetric=False)


def _gptq(found: Json) -> Rules:
    _four_bits(found.get("bits"))
    _one_of("pack_dtype", found.get("pack_dtype") or "int32", ("int32",))
    if found.get("dynamic"):
        raise ValueError("dynamic (other settings for some layers) is not supported")
    form = found.get("checkpoint_format") or found.get("format") or "gptq"
    offset = 1 if _one_of("checkpoint_format", form, ("gptq", "gptq_v2")) == "gptq" else 0
    group = _group(found.get("group_size"))
    yield EVERY, Scheme("gptq", "group", group, symmetric=False, zero_offset=offset)


def _four_bits(found: object) -> None:
    if found != 4:
        raise ValueError(f"weights of {found!r} bits are not supported; 4 are")


def _group(found: object) -> int | None:
    """Inputs per scale; None for all of them."""
    if found in (None, -1):
        return None
    if type(found) is not int or found < GROUPS or found % GROUPS:
        raise ValueError(f"group_size {found!r} is not supported; -1 and multiples of {GROUPS} are")
    return found


def _block(found: object) -> tuple[int, int]:
    """`[128, 128]`, or `128x128` as older files write it."""
    parts = found.split("x") if isinstance(found, str) else found
    listed = list(parts) if isinstance(parts, list | tuple) else []
    sizes = [int(each) for each in listed if str(each).isdecimal() and int(each) > 0]
    if len(sizes) != 2 or len(listed) != 2:
        raise ValueError(f"a block of {found!r} is not supported; two sizes as [128, 128] are")
    return sizes[0], sizes[1]


def _one_of(name: str, found: object, allowed: Sequence[Any]) -> Any:
    if found not in allowed:
        known = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} {found!r} is not supported; {known} {_verb(allowed)}")
    return found


def _verb(allowed: Sequence[object]) -> str:
    return "is" if len(allowed) == 1 else "are"


FP8_STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "block")
INT4_STRATEGIES: tuple[Strategy, ...] = ("group", "channel")
METHODS: dict[str, Callable[[Json], Rules]] = {
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
}
