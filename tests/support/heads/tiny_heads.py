"""Untrained draft heads for the tiny Llamas of `tiny_llama`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import Llama4ForCausalLM

from drafter.checkpoint import save_eagle3
from drafter.heads.untrained import eagle3_config, random_eagle3
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.families import read_text_model
from tests.support.models.tiny_llama import TinyLlama


def write_tiny_head(
    folder: Path,
    spec: TinyLlama | None = None,
    *,
    draft_vocab: int = 200,
    num_layers: int = 1,
    seed: int = 1,
) -> Path:
    """An EAGLE-3 head for a target of `spec`, over its first `draft_vocab` tokens."""
    target = LlamaArch.from_hf_config((spec or TinyLlama()).config().to_dict())
    return _write(folder, target, draft_vocab, num_layers, seed)


def write_tiny_llama4_head(folder: Path, oracle: Llama4ForCausalLM) -> Path:
    """An EAGLE-3 head for a Llama 4, over its first 200 tokens."""
    return _write(folder, read_text_model(oracle.config.to_dict()).arch, 200, 1, seed=1)


def _write(folder: Path, target: LlamaArch, draft_vocab: int, num_layers: int, seed: int) -> Path:
    config = eagle3_config(target, draft_vocab, num_layers)
    config = dataclasses.replace(config, aux_layers=(0, target.num_layers - 1))
    tensors = random_eagle3(config, target, seed=seed, std=0.3)
    save_eagle3(folder, config, target, tensors, torch.arange(draft_vocab))
    return folder
