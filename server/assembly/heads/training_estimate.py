"""What a training run would need and give, without loading a model: `aerie train-draft --dry-run`.

Rates are those of a run on one H200 (benchmarks/results/training-fused-h200-2026-11-27.json), with
the bundled model and a head of one layer. Other models and heads are scaled by their arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from configs.training import HostTrainingConfig
from drafter import manifest
from drafter.heads.config import HeadConfig
from drafter.train.data.conversations import read_conversations
from drafter.train.head.building import head_config
from engine.checkpoints.arch import LlamaArch, Shape
from engine.checkpoints.checkpoint import read_arch
from engine.checkpoints.manifest import expected_tensors
from server.assembly.heads.timed_training import ANSWERING, ROWS
from server.assembly.heads.training_target import conversation_file, read_all_prompts
from server.assembly.operations import torch_dtype

GB = 1e9
HEAD_BYTES = 16  # of a parameter: weight, gradient and two moments, float32
STARTING, LAST = 45.0, 15.0  # seconds of a run for start and measurements
LEARNING = 0.64  # share of the rest, where data.answering is the default
ANSWERED = 283_000  # answer tokens per second
LEARNT = (178_000, 430_000)  # ... over a whole run with other work beside, and in a step alone
MEASURED_WORK = 2 * 134_515_008 + 6 * 4 * 9_808_128  # operations for each token learnt from


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of target and head."""

    target: int
    head: int

    def work(self, unroll_steps: int) -> int:
        """Operations for each token: a forward of the target, each step of the head thrice."""
        return 2 * self.target + 6 * unroll_steps * self.head


def dry_run(config: HostTrainingConfig) -> Iterator[str]:
    """Lines for people. Reads configuration and data as the run would.

    Raises:
        OSError, ValueError: as the run would find.
    """
    target = read_arch(config.model.source, config.model.revision)
    head = head_config(config.head, target)
    own = manifest.head_tensors(head, target, (manifest.LM_HEAD,)).required
    learnt = (shape for name, shape in own.items() if name not in manifest.DTYPES)
    sizes = Sizes(_count(expected_tensors(target).values()), _count(learnt))
    itemsize = torch_dtype(config.model.dtype).itemsize
    yield (
        f"target {config.model.source}: {sizes.target:,} parameters, "
        f"{sizes.target * itemsize / GB:.2f} GB in {config.model.dtype}"
    )
    yield f"head: {head.kind}, {sizes.head:,} parameters, a file of {sizes.head * 2 / 1e6:.1f} MB"
    yield _data(config)
    yield from _memory(config, target, head, sizes, itemsize)
    if config.run.minutes is None:
        per_step = config.run.batch_tokens * config.run.accumulation
        yield f"{config.run.steps} steps of up to {per_step} tokens in each process"
    else:
        yield _time(config, sizes)


def _count(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _data(config: HostTrainingConfig) -> str:
    prompts = len(read_all_prompts(config))
    conversations = sum(
        1 for path in config.data.conversations for _ in read_conversations(conversation_file(path))
    )
    measured = "data.measure_on" if config.data.measure_on else f"{config.data.held_out} of them"
    return f"{prompts:,} prompts and {conversations:,} conversations; measured on {measured}"


def _memory(
    config: HostTrainingConfig, target: LlamaArch, head: HeadConfig, sizes: Sizes, itemsize: int
) -> Iterator[str]:
    rows = (config.data.rows or ROWS) if config.run.minutes is not None else 0
    page = 2 * target.num_layers * target.num_kv_heads * target.head_dim * itemsize
    states = (len(head.tap_layers(target)) + 1) * target.hidden_size * itemsize
    logits = 2 * head.draft_vocab_size * torch.bfloat16.itemsize  # of target and head
    parts = {
        "target": sizes.target * itemsize,
        "head in training": sizes.head * HEAD_BYTES,
        f"pages of {rows} answers": rows * config.data.max_tokens * page,
        f"batch of {config.run.batch_tokens} tokens": config.run.batch_tokens * (states + logits),
    }
    told = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    yield f"memory, at least {sum(parts.values()) / GB:.1f} GB: {told}"


def _time(config: HostTrainingConfig, sizes: Sizes) -> str:
    assert config.run.minutes is not None
    rest = max(0.0, config.run.minutes * 60 - STARTING - LAST)
    share = config.data.answering or ANSWERING
    learning = rest * (LEARNING if share == ANSWERING else 1 - share)
    speed = MEASURED_WORK / sizes.work(config.loss.unroll_steps)
    low, high = (rate * speed * learning / 1e6 for rate in LEARNT)
    drawn = ANSWERED * MEASURED_WORK / sizes.work(4) * (rest - learning) / 1e6
    return (
        f"{config.run.minutes:g} minutes of one H200: some {drawn:.0f} million answer tokens "
        f"drawn, {low:.0f} to {high:.0f} million learnt from; less on other devices"
    )
