"""Names, types and shapes of the tensors of published checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.files.meta_files import MetaTensor

Tensors = dict[str, MetaTensor]
Config = dict[str, Any]
FP8, INT4 = "F8_E4M3", "I32"  # as safetensors call what weights are stored in
GROUP = 128  # inputs per scale


def target_tensors(config: Config) -> Tensors:
    """Of a Llama 3, or of a Llama 4 for text and images, as its config.json says."""
    text = config.get("text_config")
    if text is None:
        kept, width = _kept(config), config["intermediate_size"]
        return _model(config, lambda _: _dense(config, "mlp", width, kept), "", kept)
    images = {
        "vision_model.class_embedding": MetaTensor("BF16", (1408,)),
        "multi_modal_projector.linear_1.weight": MetaTensor("BF16", (text["hidden_size"], 4096)),
    }
    experts = _kept(config)
    shared = "BF16" if experts == FP8 else experts

    def feed_forward(layer: int) -> Tensors:
        if (layer + 1) % text["interleave_moe_layer_step"]:
            return _dense(text, "feed_forward", text["intermediate_size_mlp"], "BF16")
        return _experts(text, experts, shared)

    return images | _model(text, feed_forward, "language_model.", "BF16")


def _model(config: Config, feed_forward: Any, prefix: str, kept: str) -> Tensors:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": MetaTensor("BF16", (vocab, hidden))}
    for layer in range(config["num_hidden_layers"]):
        own = _attention(config, kept) | feed_forward(layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            own[f"{norm}.weight"] = MetaTensor("BF16", (hidden,))
        found |= {f"model.layers.{layer}.{name}": each for name, each in own.items()}
    found["model.norm.weight"] = MetaTensor("BF16", (hidden,))
    found["lm_head.weight"] = MetaTensor("BF16", (vocab, hidden))
    return {prefix + name: each for name, each in found.items()}


def _kept(config: Config) -> str:
    """In what the quantised weights of a model are stored."""
    form = config.get("quantization_config", {}).get("format")
    return {None: "BF16", "float-quantized": FP8, "pack-quantized": INT4}[form]


def _linear(name: str, outputs: int, inputs: int, kept: str) -> Tensors:
    if kept == INT4:
        shape = torch.tensor([outputs, inputs])
        return {
            f"{name}.weight_packed": MetaTensor("I32", (outputs, inputs // 8)),
            f"{name}.weight_scale": MetaTensor("BF16", (outputs, inputs // GROUP)),
            f"{name}.weight_shape": MetaTensor("I64", (2,), shape),
        }
    found = {f"{name}.weight": MetaTensor(kept, (outputs, inputs))}
    if kept == FP8:
        found[f"{name}.weight_scale"] = MetaTensor("BF16", (outputs, 1))
    return found


def _attention(config: Config, kept: str, first: int = 1) -> Tensors:
    hidden = config["hidden_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    rows = {"q": queries, "k": keys, "v": keys}
    found = _linear("self_attn.o_proj", hidden, queries, kept)
    for part, outputs in rows.items():
        found |= _linear(f"self_attn.{part}_proj", outputs, first * hidden, kept)
    return found


def _dense(config: Config, name: str, width: int, kept: str) -> Tensors:
    hidden = config["hidden_size"]
    gate, up = (_linear(f"{name}.{part}_proj", width, hidden, kept) for part in ("gate", "up"))
    return gate | up | _linear(f"{name}.down_proj", hidden, width, kept)


def _experts(text: Config, kept: str, shared: str) -> Tensors:
    """In two tensors; or, quantised, as linear layers."""
    hidden, width, count = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    found = _linear("feed_forward.router", count, hidden, "BF16")
    found |= _dense(text, "feed_forward.shared_expert", width, shared)
    if kept != "BF16":
        for expert in range(count):
            found |= _dense(text, f"feed_forward.experts.{expert}", width, kept)
        return found
    both, down = (count, hidden, 2 * width), (count, width, hidden)
    found["feed_forward.experts.gate_up_proj"] = MetaTensor("BF16", both)
    found["feed_forward.experts.down_proj"] = MetaTensor("BF16", down)
    return found


def eagle3_tensors(layer: Config, target_hidden: int, draft_vocab: int, prefix: str) -> Tensors:
    """Of an EAGLE-3 head whose one layer is below `prefix`; it has the target's embedding."""
    hidden, vocab = layer["hidden_size"], layer["vocab_size"]
    own = _attention(layer, "BF16", first=2) | _dense(
        layer, "mlp", layer["intermediate_size"], "BF16"
    )
    for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        own[f"{norm}.weight"] = MetaTensor("BF16", (hidden,))
    found = {f"{prefix}{name}": each for name, each in own.items()}
    found["fc.weight"] = MetaTensor("BF16", (hidden, 3 * target_hidden))
    found["norm.weight"] = MetaTensor("BF16", (hidden,))
    if draft_vocab < vocab:
        found["lm_head.weight"] = MetaTensor("BF16", (draft_vocab, hidden))
        offsets, drafted = torch.zeros(draft_vocab, dtype=torch.int64), torch.arange(vocab)
        found["d2t"] = MetaTensor("I64", (draft_vocab,), offsets)
        found["t2d"] = MetaTensor("BOOL", (vocab,), drafted < draft_vocab)
    return found
