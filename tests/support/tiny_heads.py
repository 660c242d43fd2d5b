"""Untrained draft heads for the tiny Llamas of `tiny_llama`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from drafter.checkpoint import save_eagle3
from drafter.heads.untrained import eagle3_config, random_eagle3
from engine.checkpoints.arch import LlamaArch
from tests.support.tiny_llama import TinyLlama


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
    config = eagle3_config(target, draft_vocab, num_layers)
    config = dataclasses.replace(config, aux_layers=(0, target.num_layers - 1))
    tensors = random_eagle3(config, target, seed=seed, std=0.3)
    save_eagle3(folder, config, target, tensors, torch.arange(draft_vocab))
    return folder
