"""Small training runs on tiny random Llamas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from configs.training import TrainingConfig
from drafter.train.data.encoding import Example
from drafter.train.head.building import TargetTensors
from drafter.train.run import LoadedTarget
from engine.checkpoints.arch import LlamaArch
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from kernels.ops import Ops
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import CPU, TinyEngine

MAX_LEN = 128


def tiny_target(oracle: LlamaForCausalLM, ops: Ops) -> LoadedTarget:
    """The float32 model as a target of training."""
    arch = LlamaArch.from_hf_config(oracle.config.to_dict())
    read = oracle.state_dict().__getitem__
    model = LlamaLoader(arch, read, Place(ops, torch.float32, CPU), MAX_LEN).load()
    return LoadedTarget(model, ops, TargetTensors(arch, read), torch.float32, CPU, "tiny")


def greedy_examples(
    tiny: TinyEngine, num_examples: int, prompt: int = 4, answer: int = 20
) -> list[Example]:
    """Random prompts of `prompt` tokens and the model's answers."""
    vocab_size = tiny.oracle.config.vocab_size
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, vocab_size, (num_examples, prompt), generator=generator).tolist()
    requests = [
        ask(str(number), ids, max_tokens=answer, ignore_eos=True)
        for number, ids in enumerate(prompts)
    ]
    heard = generate(tiny.build(), requests)
    answers = [heard[request.request_id].token_ids for request in requests]
    return [
        Example(ids + more, [False] * len(ids) + [True] * len(more))
        for ids, more in zip(prompts, answers, strict=True)
    ]


def tiny_config(output: Path, kind: str = "eagle3", **sections: dict[str, Any]) -> TrainingConfig:
    """Seven steps of a small head; `sections` change single keys."""
    shape: dict[str, Any] = {"kind": kind, "intermediate_size": 64}
    if kind == "eagle3":
        shape |= {"draft_vocab_size": 100, "aux_layers": [0, 1], "init": "random"}
    tree: dict[str, dict[str, Any]] = {
        "model": {"source": "tiny", "dtype": "float32"},
        "data": {"conversations": ["none.jsonl"], "held_out": 3},
        "head": shape,
        "loss": {"unroll_steps": 2},
        "optimizer": {"warmup_steps": 3, "learning_rate": 3e-3},
        "run": {
            "output": output,
            "steps": 7,
            "batch_tokens": 60,
            "precision": "float32",
            "log_every": 1,
            "evaluate_every": 2,
            "checkpoint_every": 3,
        },
    }
    for section, keys in sections.items():
        tree[section] = tree.get(section, {}) | keys
    return TrainingConfig.model_validate(tree)


def lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.token_ids) for example in examples]
