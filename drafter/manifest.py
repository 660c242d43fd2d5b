"""The tensors that a head's file must and may hold, under one set of names for all layouts."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from drafter.heads.config import HeadConfig
from engine.checkpoints.arch import LlamaArch, Shape
from engine.checkpoints.manifest import expected_tensors

EMBEDDING = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FC = "fc.weight"
FC_BIAS = "fc.bias"
FINAL_NORM = "norm.weight"
FIRST_NORM = "layers.0.input_layernorm.weight"
INPUT_NORM = "input_norm.weight"  # over all that `fc` reads
HIDDEN_NORM = "layers.0.hidden_norm.weight"
D2T, T2D = "d2t", "t2d"
MASK_HIDDEN = "mask_hidden"  # P-EAGLE: stands for the features of masked tokens, before `fc`
FUSED_NORM = "hidden_norm.weight"  # DFlash: of what `fc` makes of the target's features

FLOATS = ("F32", "F16", "BF16")
DTYPES = {D2T: ("I64", "I32"), T2D: ("BOOL", "U8")}  # all others: FLOATS

# What speculators keep of the target to train with; serving needs neither.
OF_TARGET = ("verifier_norm.weight", "verifier_lm_head.weight")

# The EAGLE trainer, SpecForge and NVIDIA write midlayer; speculators transformer and fusion_fc;
# Meta feed_forward; vLLM model and draft_id_to_target_id.
PREFIXES = (
    ("model.", ""),  # twice in old files of vLLM
    ("model.", ""),
    ("midlayer.", "layers.0."),
    ("transformer.", "layers.0."),
    ("fusion_fc.", "fc."),
    ("aux_norm_low.", "fc_norm.0."),
    ("aux_norm_mid.", "fc_norm.1."),
    ("aux_norm_high.", "fc_norm.2."),
)
LAYER = re.compile(r"layers\.(\d+)\.")
WHOLE_NAMES = {"draft_id_to_target_id": D2T}


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """Name -> shape. The target or the configuration replaces an absent optional tensor."""

    required: dict[str, Shape]
    optional: dict[str, Shape]


def common_name(name: str) -> str:
    """This package's name of the tensor `name` of any layout: `fc`, `layers.0`, ..., `norm`,
    `lm_head`, `embed_tokens`, `d2t`, `t2d`."""
    for prefix, replacement in PREFIXES:
        if name.startswith(prefix):
            name = replacement + name.removeprefix(prefix)
    return WHOLE_NAMES.get(name, name.replace(".feed_forward.", ".mlp."))


def num_layers(names: Collection[str]) -> int:
    """How many decoder layers the tensors of these common names are for."""
    found = (LAYER.match(name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def published_name(name: str) -> str:
    """The name of a `common_name` in files of EAGLE-3 heads."""
    first = "layers.0."
    return "midlayer." + name.removeprefix(first) if name.startswith(first) else name


def is_harmless(name: str) -> bool:
    """Whether the tensor can be ignored: rotary tables are recomputed, the target is there."""
    return name in OF_TARGET or name.endswith("rotary_emb.inv_freq")


def fc_norm(index: int) -> str:
    """The norm of one of the target's layers that `fc` reads."""
    return f"fc_norm.{index}.weight"


def head_tensors(config: HeadConfig, target: LlamaArch, found: Collection[str]) -> HeadTensors:
    """The tensors that a file must and may hold. Where the configuration says nothing, `found`, the
    names in the file, decides: whether an EAGLE head is the dense kind with all norms, and whether
    `fc` has a bias."""
    arch, hidden = config.arch, config.arch.hidden_size
    required = _layers(arch)
    inputs = config.feature_size + (hidden if config.kind == "eagle" else 0)
    if config.use_aux:
        required[FC] = (hidden, inputs)
        if FC_BIAS in found if config.fc_bias is None else config.fc_bias:
            required[FC_BIAS] = (hidden,)
    optional: dict[str, Shape] = {
        EMBEDDING: (arch.vocab_size, hidden),
        LM_HEAD: (config.draft_vocab_size, hidden),
    }
    if config.like_eagle3:
        _add_eagle3(config, target, required, optional)
    elif config.kind == "dflash":
        _add_dflash(config, target, required, optional)
    elif not {FINAL_NORM, FIRST_NORM} & set(found):
        del required[FINAL_NORM], required[FIRST_NORM]
    return HeadTensors(required, optional)


def _add_eagle3(
    config: HeadConfig,
    target: LlamaArch,
    required: dict[str, Shape],
    optional: dict[str, Shape],
) -> None:
    hidden = config.arch.hidden_size
    for part in "qkv":
        name = f"layers.0.self_attn.{part}_proj.weight"
        required[name] = (required[name][0], 2 * hidden)
    required[HIDDEN_NORM] = (hidden,)
    if config.use_aux and config.norm_before_fc:
        required[INPUT_NORM] = (config.feature_size,)
    if config.use_aux and config.fc_norm:
        required |= {fc_norm(k): (target.hidden_size,) for k in range(config.num_taps)}
    if config.kind == "peagle":
        required[MASK_HIDDEN] = (1, 1, config.feature_size)
    _add_vocabulary(config, target, required, optional)


def _add_dflash(
    config: HeadConfig,
    target: LlamaArch,
    required: dict[str, Shape],
    optional: dict[str, Shape],
) -> None:
    """Layers as in Qwen3: with norms of each head's queries and keys."""
    for index in range(config.arch.num_layers):
        for part in "qk":
            required[f"layers.{index}.self_attn.{part}_norm.weight"] = (config.arch.head_dim,)
    required[FUSED_NORM] = (config.arch.hidden_size,)
    _add_vocabulary(config, target, required, optional)


def _add_vocabulary(
    config: HeadConfig,
    target: LlamaArch,
    required: dict[str, Shape],
    optional: dict[str, Shape],
) -> None:
    arch, hidden = config.arch, config.arch.hidden_size
    optional |= {D2T: (config.draft_vocab_size,), T2D: (arch.vocab_size,)}
    whole_vocab = config.draft_vocab_size == arch.vocab_size
    if not whole_vocab:
        required[D2T] = optional.pop(D2T)
    if hidden != target.hidden_size:  # the target's rows have another width
        required[EMBEDDING] = optional.pop(EMBEDDING)
    if hidden != target.hidden_size or not whole_vocab:
        required[LM_HEAD] = optional.pop(LM_HEAD)


def _layers(arch: LlamaArch) -> dict[str, Shape]:
    """The tensors of ordinary layers and the final norm."""
    names = {name.removeprefix("model."): shape for name, shape in expected_tensors(arch).items()}
    return {n: shape for n, shape in names.items() if n.startswith("layers.") or n == FINAL_NORM}
