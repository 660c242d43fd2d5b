"""A .gguf file as a Hugging Face directory, for servers that read no .gguf."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoints.gguf_files.header import read_gguf
from engine.checkpoints.source import resolve_source
from server.text.tokens.gguf_tokenizer import write_tokenizer


def converted_folder(gguf: Path, scratch: Path) -> Path:
    """The directory with the weights of `gguf` in bfloat16 and its tokenizer; written once below
    `scratch`. ValueError if its tokenizer is not byte-level."""
    folder = scratch / f"{gguf.stem}-bfloat16"
    if folder.is_dir():
        return folder
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    checkpoint = open_checkpoint(resolve_source(str(gguf)))
    _write_config(checkpoint, fresh)
    write_tokenizer(read_gguf(gguf).metadata, fresh)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint.tensors()}
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    fresh.rename(folder)
    return folder


def _write_config(checkpoint: Checkpoint, folder: Path) -> None:
    from benchmarks.peers.transformers_generate import hf_config  # seconds to import

    config = hf_config(checkpoint.arch)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.bos_token_id = checkpoint.bos_token_id
    config.eos_token_id = sorted(checkpoint.eos_token_ids)
    config.save_pretrained(folder)
