"""transformers' `generate`, with the same weights as Aerie."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.rope_scaling import json_positions, rope_json
from server.measuring.timing import RequestTimes


class TransformersTarget:
    """Greedy, static batch, dynamic cache, all threads: the library's usual setup."""

    name = "transformers"

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> None:
        self._model: Any = load_oracle(checkpoint, dtype)
        self._threads = threads

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[RequestTimes]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        clock = _Clock()
        ids = torch.tensor(prompts)
        try:
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        finally:
            torch.set_num_threads(before)
        return [RequestTimes(clock.started, tuple(clock.times))] * len(prompts)


class _Clock(StoppingCriteria):
    """Records the time of every token; never stops generation."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load_oracle(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The same weights as a transformers `LlamaForCausalLM`."""
    config = hf_config(checkpoint.arch)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def hf_config(arch: LlamaArch) -> LlamaConfig:
    """The transformers configuration of an architecture."""
    rope = rope_json(arch.rope_scaling) or {"rope_type": "default"}
    return LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        rms_norm_eps=arch.rms_norm_eps,
        rope_parameters=rope | {"rope_theta": arch.rope_theta},
        tie_word_embeddings=arch.tie_word_embeddings,
        attention_bias=arch.attention_bias,
        mlp_bias=arch.mlp_bias,
        max_position_embeddings=json_positions(arch.rope_scaling, arch.max_position_embeddings),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
