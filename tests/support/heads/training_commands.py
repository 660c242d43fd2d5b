"""The commands that train draft heads, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from server.cli import app
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama

TEXT = "the quick brown fox jumps over a lazy dog and server answers many clients at once"
SPEC = TinyLlama(hidden_size=48, head_dim=16, intermediate_size=64, num_layers=3)
STEPS = 6


def write_model_and_data(folder: Path) -> Path:
    """Write model/, prompts.jsonl and talk.jsonl."""
    write_tiny_llama(folder / "model", SPEC)
    words = TEXT.split()
    prompts = [f"{a} {b} {c}" for a, b, c in zip(words, words[3:], words[5:], strict=False)]
    write_lines(folder / "prompts.jsonl", [{"turns": [text]} for text in prompts])
    talk = [conversation(text, text[::-1]) for text in prompts]
    write_lines(folder / "talk.jsonl", talk)
    return folder


def conversation(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def arguments(folder: Path, cache: Path, output: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "model.source": folder / "model",
        "model.dtype": "float32",
        "data.conversations": f"[{folder / 'talk.jsonl'}]",
        "data.held_out": 3,
        "data.max_new_tokens": 24,
        "head.draft_vocab_size": 200,
        "head.aux_layers": "[0, 1, 2]",
        "loss.unroll_steps": 3,
        "optimizer.warmup_steps": 2,
        "run.output": output,
        "run.steps": STEPS,
        "run.batch_tokens": 150,
        "run.precision": "float32",
        "run.evaluate_every": 2,
        "run.checkpoint_every": 2,
        "run.log_every": 1,
        "kernels.threads": 1,
        "files.dir": cache,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in settings.items() if value is not None]


def aerie(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def train(folder: Path, cache: Path, output: Path, **changes: object) -> Result:
    empty = output.parent / "empty.yaml"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.touch()
    words = arguments(folder, cache, output, **changes)
    return aerie("train-draft", "--config", empty, *words)


def weights_of(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "weights.safetensors")
