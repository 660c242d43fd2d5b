"""The weights that training begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from drafter.heads.config import HeadConfig
from engine.checkpoints.arch import LlamaArch
from engine.models.loading import ReadTensor

SMALL = 0.1  # share of the usual standard deviation
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # these add to the layer's stream


def weights_from_target(
    weights: dict[str, Tensor],
    config: HeadConfig,
    target: LlamaArch,
    read: ReadTensor,
    target_ids: Tensor | None,
) -> dict[str, Tensor]:
    """An EAGLE-3 head with the target's last layers, final norm and LM head, and an `fc` that
    passes on the highest tap: it starts like a target without some layers, not as noise. Tensors
    that the target lacks stay as in `weights`, which are random. ValueError unless the head has the
    target's widths.
    """
    _check_widths(config, target)
    hidden, weights = target.hidden_size, dict(weights)
    weights["norm.weight"] = read("model.norm.weight").float()
    name = "model.embed_tokens" if target.tie_word_embeddings else "lm_head"
    rows = read(f"{name}.weight").float()
    weights["lm_head.weight"] = rows if target_ids is None else rows[target_ids]
    fc = weights["fc.weight"] * SMALL
    fc[:, -hidden:] += torch.eye(hidden)
    weights["fc.weight"] = fc
    for index in range(config.arch.num_layers):
        _copy_layer(weights, index, target.num_layers - config.arch.num_layers + index, read)
    return weights


def deepened(
    given: dict[str, Tensor],
    weights: dict[str, Tensor],
    config: HeadConfig,
    target: LlamaArch,
    read: ReadTensor,
) -> dict[str, Tensor]:
    """The head `given` with the layers of `config` that it lacks. These are the target's last
    layers with outputs set to zero, so the head at first predicts as before. `weights`: tensors of
    all shapes. ValueError if layers are added and the head does not have the target's widths."""
    depth = config.arch.num_layers
    missing = [i for i in range(depth) if f"layers.{i}.{OUTPUTS[0]}" not in given]
    if not missing:
        return given
    _check_widths(config, target)
    added = dict(weights)
    for index in missing:
        _copy_layer(added, index, target.num_layers - depth + index, read)
        for part in OUTPUTS:
            added[f"layers.{index}.{part}"] = torch.zeros_like(added[f"layers.{index}.{part}"])
    return added | given


def _copy_layer(weights: dict[str, Tensor], index: int, source: int, read: ReadTensor) -> None:
    """Copy layer `source` of the target to layer `index`. The head's first layer reads [embedding;
    feature]; the copied weights then multiply the feature."""
    ours, theirs = f"layers.{index}.", f"model.layers.{source}."
    for name in [name for name in weights if name.startswith(ours)]:
        part = name.removeprefix(ours)
        if part == "hidden_norm.weight":
            weights[name] = read(f"{theirs}input_layernorm.weight").float()
        elif part == "input_layernorm.weight" and index == 0:
            continue  # norm of the embedding, which the target's layer does not read
        elif index == 0 and part.startswith("self_attn.") and weights[name].dim() == 2:
            copied = read(theirs + part).float()
            fresh = weights[name].clone()
            fresh[:, -copied.shape[1] :] = copied
            weights[name] = fresh
        else:
            weights[name] = read(theirs + part).float()


def _check_widths(config: HeadConfig, target: LlamaArch) -> None:
    if not config.like_eagle3:
        raise ValueError(
            f"layers of the target are for eagle3 and peagle heads, not {config.kind!r}"
        )
    if target != target.as_plain_llama:
        raise ValueError(
            "a head's layers are those of a plain Llama and cannot begin as layers of this target; "
            "head.init 'random' can"
        )
    if config.arch.num_layers > target.num_layers:
        raise ValueError(
            f"a head that begins with layers of the target has at most its {target.num_layers}, "
            f"not head.num_layers {config.arch.num_layers}; head.init 'random' may have more"
        )
    for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
        own, wanted = getattr(config.arch, name), getattr(target, name)
        if own != wanted:
            raise ValueError(
                f"a head that begins with layers of the target needs its {name} {wanted}, not "
                f"{own}; head.init 'random' does not"
            )
