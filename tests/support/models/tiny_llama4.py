"""Tiny random Llama 4 text models, with chunks of positions so short that texts cross them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from tests.support.models.tiny_llama import BOS, EOS, write_tokenizer

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,  # as in Scout
    "original_max_position_embeddings": 64,
}


def llama4_config(**changes: object) -> Llama4TextConfig:
    """Four layers: three rotate, the last has no positions; every second has experts."""
    settings: dict[str, object] = {
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 80,
        "intermediate_size_mlp": 144,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 24,
        "floor_scale": 16,
        "attn_scale": 0.3,
        "max_position_embeddings": 1024,
        "rope_parameters": dict(ROPE),
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "pad_token_id": None,
    }
    return Llama4TextConfig(**(settings | changes))


def random_llama4(seed: int = 7, **changes: object) -> Llama4ForCausalLM:
    """A float32 model with weights large enough that its logits differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama4ForCausalLM(llama4_config(**changes)).eval()
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, around, 0.15)
        return model


def write_tiny_llama4(folder: Path, **changes: object) -> Llama4ForCausalLM:
    """Write a complete model to `folder`; return it as loaded by transformers."""
    model = random_llama4(vocab_size=384, **changes)
    model.save_pretrained(folder)
    write_tokenizer(folder, 384)
    return model
