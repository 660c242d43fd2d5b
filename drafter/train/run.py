"""Assemble a training run: from a configuration, a loaded target and examples to a trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from configs.training import TrainingConfig
from drafter.heads.config import HeadConfig
from drafter.train.checkpoints import CheckpointFolder
from drafter.train.data.draft_vocabulary import DraftVocabulary, choose, count_answers
from drafter.train.data.encoding import Example
from drafter.train.data.feature_cache import CachedFeatures, LiveFeatures
from drafter.train.data.target import FrozenTarget
from drafter.train.head import building
from drafter.train.head.head_kernels import choose_kernels
from drafter.train.head.losses import TokenLoss
from drafter.train.head.objective import LossWeights, Objective
from drafter.train.history import History
from drafter.train.optimizer import HeadOptimizer, Rate, by_steps
from drafter.train.run_record import RunRecord
from drafter.train.trainer import Corpus, Trainer, Worker
from engine.models.interface import LoadedModel
from kernels.ops import Ops

CHECKPOINTS, HISTORY = "checkpoints", "history.jsonl"
# Keys that may change when a run is resumed: none of them affects what is learnt.
FREE_KEYS: dict[str, set[str] | bool] = {
    "run": {
        "output",
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "max_seconds",
    },
    "data": {
        "conversations",
        "prompts",
        "measure_on",
        "cache_dir",
        "cache_bytes",
    },  # examples are hashed
    "card": True,
    "kernels": True,
    "files": True,
}


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """The frozen target as a runnable model, and its stored tensors."""

    model: LoadedModel
    ops: Ops
    tensors: building.TargetTensors
    dtype: torch.dtype  # of weights, pages and handed-out features
    device: torch.device
    version: str  # of its weight files: cached features are valid for this version only


@dataclass(frozen=True, slots=True)
class Run:
    """The trainer, and the facts that publishing needs besides the weights."""

    trainer: Trainer
    record: RunRecord


def prepare(
    config: TrainingConfig,
    target: LoadedTarget,
    examples: Sequence[Example],
    worker: Worker,
    measured: Sequence[Example] = (),
) -> Run:
    """A run that is ready to train, but not resumed yet. It is measured on `measured`, or on
    examples that are drawn from the others.

    Raises:
        ValueError: the configuration does not fit the target or the examples.
        OSError: the feature cache cannot be made.
    """
    if measured:
        training, held_out = list(examples), list(measured)
        if not training:
            raise ValueError("data.conversations hold no example to train on")
    else:
        training, held_out = split(examples, config.data.held_out, config.run.seed)
    every = [*examples, *measured]
    text = Text(training, held_out, max(len(example.token_ids) for example in every))
    fingerprint = fingerprint_of(config, every, worker)
    return assemble(
        config, target, text, by_steps(config.optimizer, config.run.steps), worker, fingerprint
    )


@dataclass(frozen=True, slots=True)
class Text:
    """What a run learns from and is measured on."""

    training: list[Example]  # may grow while the run goes on
    held_out: list[Example]
    longest: int  # tokens of any example, those to come included


def assemble(
    config: TrainingConfig,
    target: LoadedTarget,
    text: Text,
    rate: Rate,
    worker: Worker,
    fingerprint: str,
) -> Run:
    """The trainer of a head. Draft vocabulary and coverage follow from `text.training` as it is
    now. Raises as `prepare`."""
    arch, loss = target.tensors.arch, config.loss
    kind = TokenLoss(loss.kind, loss.eta, loss.top_k)
    head = building.head_config(config.head, arch)
    vocabulary = _vocabulary(config, text.training, target)
    ids = None if vocabulary is None else vocabulary.target_ids
    max_len = text.longest + loss.unroll_steps
    network = building.build_network(
        config.head, head, target.tensors, ids, max_len, target.dtype, config.run.seed
    ).to(target.device)
    kernels = choose_kernels(config.run.fused, target.device, kind)
    objective = Objective(
        network,
        target.tensors.lm_head.to(target.device),
        None if ids is None else ids.to(target.device),
        LossWeights(loss.unroll_steps, loss.decay, loss.tokens, loss.features, kind),
        torch.bfloat16 if config.run.precision == "bfloat16" else torch.float32,
        kernels,
        target.ops,
    )
    output = config.run.output
    trainer = Trainer(
        objective=objective,
        optimizer=HeadOptimizer(network, config.optimizer, rate),
        corpus=_corpus(config, target, head, text.training, kernels.packed),
        held_out=_corpus(config, target, head, text.held_out, kernels.packed),
        config=config.run,
        checkpoints=CheckpointFolder(output / CHECKPOINTS, config.run.keep_checkpoints),
        history=History(output / HISTORY if worker.rank == 0 else None),
        fingerprint=fingerprint,
        feature_noise=loss.feature_noise,
        worker=worker,
    )
    record = RunRecord(
        fingerprint=fingerprint,
        num_processes=worker.count,
        target=arch,
        head=head,
        target_ids=None if ids is None else ids.tolist(),
        coverage=None if vocabulary is None else vocabulary.coverage,
    )
    return Run(trainer, record)


def split(
    examples: Sequence[Example], num_held_out: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and randomly drawn examples to hold out."""
    if len(examples) <= num_held_out:
        raise ValueError(
            f"there are {len(examples)} examples; data.held_out {num_held_out} would leave none "
            "to train on"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [examples[number] for number in order]
    return shuffled[num_held_out:], shuffled[:num_held_out]


def _vocabulary(
    config: TrainingConfig, training: Sequence[Example], target: LoadedTarget
) -> DraftVocabulary | None:
    """The draft vocabulary: counted, or taken from the published head that is trained further."""
    size, arch = config.head.draft_vocab_size, target.tensors.arch
    if size is None or size == arch.vocab_size:
        return None
    counts = count_answers(training, arch.vocab_size)
    if config.head.init in (building.FROM_TARGET, building.RANDOM):
        return choose(counts, size)
    ids = building.published_vocabulary(building.published_path(config.head), arch)
    return None if ids is None else DraftVocabulary(ids, int(counts[ids].sum()) / int(counts.sum()))


def _corpus(
    config: TrainingConfig,
    target: LoadedTarget,
    head: HeadConfig,
    examples: list[Example],
    packed: bool,
) -> Corpus:
    arch, data = target.tensors.arch, config.data
    frozen = FrozenTarget(target.model, target.ops, head.tap_layers(arch), target.dtype)
    live = LiveFeatures(frozen, examples)
    if data.cache_dir is None:
        return Corpus(examples, live, packed)
    identity = f"{target.version} {head.tap_layers(arch)}"
    width = head.target_hidden_size * len(head.tap_layers(arch))
    cached = CachedFeatures(
        live, data.cache_dir, data.cache_bytes, width, arch.hidden_size, target.dtype, identity
    )
    return Corpus(examples, cached, packed)


def fingerprint_of(config: TrainingConfig, examples: Sequence[Example], worker: Worker) -> str:
    """Hash of everything that affects what is learnt."""
    digest = hashlib.sha256(config.model_dump_json(exclude=FREE_KEYS).encode())
    digest.update(str(worker.count).encode())
    for example in examples:
        digest.update(np.asarray(example.token_ids, dtype=np.int32).tobytes())
        digest.update(np.asarray(example.is_answer, dtype=np.int8).tobytes())
    return digest.hexdigest()[:16]
