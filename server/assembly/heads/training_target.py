"""What every way of training a head begins with: the frozen target, the configuration of an engine
for it, and the prompts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from configs.resolve import HostConfig, HostFacts, resolve_host
from configs.schema import Config
from configs.training import SAMPLE, HostTrainingConfig, TrainingConfig
from drafter.train.data.conversations import Prompt, read_prompts, sample_file
from drafter.train.head.building import TargetTensors
from drafter.train.history import Entry
from drafter.train.run import LoadedTarget
from drafter.train.trainer import Worker
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import resolve_source
from engine.models.families import load_target
from engine.models.place import Place
from server.assembly.operations import configured_ops, torch_dtype

CURVE, HEAD = "learning-curve.svg", "head"  # in run.output


def load_frozen(config: HostTrainingConfig, worker: Worker) -> tuple[LoadedTarget, frozenset[int]]:
    """The frozen target and its end-of-text ids."""
    threads = max(1, config.kernels.threads // worker.count)
    device = device_of(worker)
    dtype = torch_dtype(config.model.dtype)
    files = resolve_source(config.model.source, config.model.revision)
    checkpoint = open_checkpoint(files)
    ops = configured_ops(serving_config(config), device, dtype, threads)
    torch.set_num_threads(threads)
    arch, read = checkpoint.arch, checkpoint.tensor
    place = Place(ops, dtype, device)
    model = load_target(arch, read, place, config.data.max_tokens)
    tensors = TargetTensors(arch, read)
    target = LoadedTarget(model, ops, tensors, dtype, device, files.version())
    return target, frozenset(checkpoint.eos_token_ids)


def device_of(worker: Worker) -> torch.device:
    """Where a process trains."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", worker.rank % torch.cuda.device_count())


def serving_config(config: HostTrainingConfig) -> HostConfig:
    """The configuration of an engine for the same target."""
    same = Config(model=config.model, kernels=config.kernels, files=config.files)
    return resolve_host(same, HostFacts(config.kernels.threads, config.files.dir))


def read_all_prompts(config: TrainingConfig) -> list[Prompt]:
    """The prompts to answer. ValueError if there are too few, before answering takes long."""
    prompts: list[Prompt] = []
    for path in config.data.prompts:
        prompts += read_prompts(path)
    prompts = prompts[: config.data.limit]
    if not config.data.conversations and len(prompts) <= config.data.held_out:
        raise ValueError(
            f"there are {len(prompts)} prompts to answer; data.held_out {config.data.held_out} "
            "would leave none to train on"
        )
    return prompts


def conversation_file(path: Path) -> Path:
    """A file of conversations; the word `sample` stands for the shipped one."""
    return sample_file("conversations.jsonl") if str(path) == SAMPLE else path


def progress_line(entry: Entry) -> str:
    """What a step or a measurement found."""
    first = entry.accuracy[0]
    return (
        f"loss {entry.loss:.3f}, first draft right {first:.0%}, acceptance "
        f"{entry.acceptance_length:.2f}, {entry.tokens_per_second:.0f} tokens/s"
    )


def tell(worker: Worker, text: str) -> None:
    """Print `text` on stderr, in the first process."""
    if worker.rank == 0:
        print(text, file=sys.stderr, flush=True)
