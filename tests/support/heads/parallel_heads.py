"""Untrained draft heads that draft in parallel, in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from drafter import manifest
from drafter.checkpoint import read_head_config
from drafter.heads.published import layers_json
from drafter.heads.untrained import random_tensors
from engine.checkpoints.arch import LlamaArch

ParallelKind = Literal["peagle", "dflash"]
BLOCK_SIZE = 9


def write_parallel_head(
    folder: Path, target: LlamaArch, kind: ParallelKind, *, draft_vocab: int, num_layers: int = 2
) -> Path:
    """A head with the target's widths for its first `draft_vocab` tokens, in speculators' layout,
    with weights large enough that its logits differ."""
    layers = layers_json(target) | {"num_hidden_layers": num_layers, "model_type": "llama"}
    inputs = [0, target.num_layers - 1]
    config: dict[str, Any] = {
        "speculators_model_type": kind,
        "transformer_layer_config": layers,
        "draft_vocab_size": draft_vocab,
        "mask_token_id": 3,
    }
    if kind == "dflash":
        config |= {"block_size": BLOCK_SIZE, "aux_hidden_state_layer_ids": inputs}
    else:
        config |= {"eagle_aux_hidden_state_layer_ids": inputs}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    needed = manifest.head_tensors(read_head_config(folder, target), target, ()).required
    shapes = {name: shape for name, shape in needed.items() if name != manifest.D2T}
    tensors = random_tensors(shapes, seed=1, std=0.3)
    offsets = torch.zeros(draft_vocab, dtype=torch.int64)
    save_file(tensors | {manifest.D2T: offsets}, folder / "model.safetensors")
    return folder
