"""A draft head that mostly agrees with its target, so that tiny models accept drafts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM


def write_copied_head(folder: Path, target: LlamaForCausalLM) -> Path:
    """A dense EAGLE head with the layers of `target`, which ignores the features. Unlike in the
    target, nothing attends to the first token: many drafts are accepted, but not all."""
    size = target.config.hidden_size
    names = {
        name.removeprefix("model."): tensor.contiguous()
        for name, tensor in target.state_dict().items()
        if name.startswith(("model.layers.", "model.norm."))
    }
    tensors = {"fc.weight": torch.cat((torch.eye(size), torch.zeros(size, size)), dim=1), **names}
    folder.mkdir()
    config = target.config.to_dict() | {"architectures": ["EagleLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder
