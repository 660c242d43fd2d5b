"""The training loop: batches in, a better head out, resumable at every checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.training import RunConfig
from drafter.train.checkpoints import CheckpointFolder, Progress, load_checkpoint
from drafter.train.data.batches import batch_stream, collate, cut
from drafter.train.data.encoding import Example
from drafter.train.data.feature_cache import FeatureSource
from drafter.train.head.objective import Objective, Tally
from drafter.train.head.unroll import TrainBatch
from drafter.train.history import Entry, History
from drafter.train.optimizer import HeadOptimizer, sum_over_processes
from engine.copies import Fetch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Worker:
    """This process's number among those that train together."""

    rank: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Corpus:
    """Examples, and the source of the target's features of them."""

    examples: Sequence[Example]
    source: FeatureSource
    packed: bool = False  # as the head's kernels want batches, see `collate`

    def batch(self, numbers: Sequence[int], device: torch.device) -> TrainBatch:
        examples = [self.examples[number] for number in numbers]
        return collate(examples, self.source.features(numbers), device, self.packed)

    @property
    def lengths(self) -> list[int]:
        return [len(example.token_ids) for example in self.examples]


class Batches:
    """Prepares batches of a stream: each when it is taken, or before."""

    def __init__(
        self,
        stream: Iterator[tuple[int, list[int]]],
        prepare: Callable[[int, list[int]], TrainBatch],
    ) -> None:
        """`stream`: numbers of batches, and of the examples in each."""
        self._stream = stream
        self._prepare = prepare
        self._ready: TrainBatch | None = None

    def take(self) -> TrainBatch:
        found, self._ready = self._ready, None
        return self._prepare(*next(self._stream)) if found is None else found

    def look_ahead(self) -> None:
        """Start to prepare the next batch."""
        if self._ready is None:
            self._ready = self._prepare(*next(self._stream))


@dataclass(slots=True)
class Trainer:
    """One process of a run. What is learnt depends only on the configuration, the data and the
    number of processes, not on interruptions."""

    objective: Objective
    optimizer: HeadOptimizer
    corpus: Corpus
    held_out: Corpus
    config: RunConfig
    checkpoints: CheckpointFolder
    history: History
    fingerprint: str
    feature_noise: float = 0.0
    worker: Worker = Worker()
    step: int = 0
    num_answer_tokens: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    is_cut: bool = False  # by `cut`

    def cut(self) -> None:
        """`run` ends after this step, as if its time were over."""
        self.is_cut = True

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if any. ValueError if it belongs to another run."""
        path = self.checkpoints.latest()
        if path is None:
            self.history.cut(-1)  # left by a run that ended before its first checkpoint
            return False
        progress, weights, state = load_checkpoint(path)
        if progress.fingerprint != self.fingerprint:
            raise ValueError(
                f"{path} was made with another configuration or other data; set run.output to "
                "another folder, or train its weights further with head.init"
            )
        try:
            self.objective.network.load_state_dict(weights)
        except RuntimeError as error:  # torch's message lists every tensor that does not fit
            raise ValueError(f"{path} does not fit this head or its target") from error
        self.optimizer.load_state(state)
        self.step, self.seconds = progress.step, progress.seconds
        self.num_answer_tokens = progress.num_answer_tokens
        self.num_skipped = progress.num_skipped
        self.history.cut(self.step)
        return True

    def run(self, on_step: Callable[[Entry], None] | None = None) -> bool:
        """Train until `config.steps` (True), or `config.max_seconds` or `cut` (False). OSError if
        the log or a checkpoint cannot be written; earlier ones stay."""
        deadline = time.monotonic() + (self.config.max_seconds or float("inf"))
        batches = self.batches(self._own_batches())
        if self.step == 0:
            self.measure()
        last = self.step == self.config.steps
        while not last:
            entry = self.learn(batches)
            if on_step is not None:
                on_step(entry)
            done = self.step == self.config.steps
            last = done or self._is_late(deadline)
            if done or self.step % self.config.evaluate_every == 0:
                self.measure()
            if last or self.step % self.config.checkpoint_every == 0:
                self.save()
        return self.step == self.config.steps

    def evaluate(self) -> Tally:
        """Sums over the held-out examples, all of them in this process."""
        tally = Tally.zeros(self.objective.weights.num_steps, self._device)
        lengths = self.held_out.lengths
        order = sorted(range(len(lengths)), key=lambda number: lengths[number])
        for numbers in cut(order, lengths, self.config.batch_tokens, self.held_out.packed):
            tally.add(self.objective.measure(self.held_out.batch(numbers, self._device)))
        return tally

    def _is_late(self, deadline: float) -> bool:
        """Whether any process is late or cut, since all of them must stop after the same step."""
        is_late = self.is_cut or time.monotonic() >= deadline
        if self.worker.count == 1:
            return is_late
        late = torch.tensor([float(is_late)], device=self._device)
        sum_over_processes([late])
        return bool(late)

    def batches(self, stream: Iterator[tuple[int, list[int]]]) -> Batches:
        """Batches for `learn` of numbers of batches, and of the examples in each."""
        return Batches(
            stream,
            lambda number, some: self._noisy(self.corpus.batch(some, self._device), number),
        )

    def learn(self, batches: Batches) -> Entry:
        """One optimizer step over the next `accumulation` batches. The host waits for the device
        once, after it has given it the target's forward of the next batch to do."""
        started = time.monotonic()
        tally = Tally.zeros(self.objective.weights.num_steps, self._device)
        for _ in range(self.config.accumulation):
            loss, found = self.objective(batches.take())
            torch.autograd.backward(loss)
            tally.add(found)
        sum_over_processes([*self._gradients(), *tally.tensors()])
        norm = self.optimizer.clip(tally.num[0].clamp(min=1))
        fetch = Fetch(torch.cat((norm.double()[None], *tally.tensors())))
        if self._device.type == "cuda":
            batches.look_ahead()
        numbers = fetch.wait()
        tally, found_norm = Tally.of(numbers[1:]), float(numbers[0])
        self.optimizer.step(self.step, found_norm)
        if not math.isfinite(found_norm):
            self.num_skipped += 1
            logger.warning(
                "step %d has a gradient of norm %s: no weight changes", self.step, found_norm
            )
        num_tokens = float(tally.num[0])
        self.step += 1
        self.num_answer_tokens += int(num_tokens)
        seconds = time.monotonic() - started
        self.seconds += seconds
        entry = self._entry("train", tally, found_norm, num_tokens / seconds)
        if self.step % self.config.log_every == 0:
            self.history.add(entry)
        return entry

    def _own_batches(self) -> Iterator[tuple[int, list[int]]]:
        """This process's batches from the current step on, each with its number in the run."""
        done = self.step * self.config.accumulation * self.worker.count
        stream = batch_stream(self.corpus.lengths, self.config.batch_tokens, self.config.seed)
        return itertools.islice(enumerate(stream), done + self.worker.rank, None, self.worker.count)

    def _noisy(self, batch: TrainBatch, number: int) -> TrainBatch:
        """Add uniform noise to the target's features that the head reads (EAGLE-1). It depends only
        on the seed and `number`."""
        if not self.feature_noise:
            return batch
        generator = torch.Generator(self._device).manual_seed(self.config.seed + number)
        noise = torch.rand(batch.taps.shape, generator=generator, device=self._device) * 2 - 1
        taps = (batch.taps.float() + noise * self.feature_noise).to(batch.taps.dtype)
        return replace(batch, taps=taps)

    def _gradients(self) -> list[Tensor]:
        """The gradient of every parameter, so that all processes exchange the same list."""
        gradients = []
        for parameter in self.objective.network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients

    def measure(self) -> None:
        """Add results on the held-out examples to the history."""
        if self.worker.rank == 0:
            tally = self.evaluate()
            sampled = round(tally.sampled_acceptance_length, 3)
            entry = self._entry("held out", tally, 0.0, 0.0)
            self.history.add(replace(entry, sampled_acceptance_length=sampled))

    def _entry(self, kind: str, tally: Tally, norm: float, rate: float) -> Entry:
        num = max(1.0, float(tally.num.sum()))
        return Entry(
            kind=kind,
            step=self.step,
            num_answer_tokens=self.num_answer_tokens,
            seconds=round(self.seconds, 1),
            loss=round(float(tally.loss.sum()) / num, 4),
            accuracy=tally.accuracy,
            acceptance_length=round(tally.acceptance_length, 3),
            gradient_norm=round(norm, 3),
            tokens_per_second=round(rate, 1),
            num_skipped=self.num_skipped,
        )

    def save(self) -> None:
        """Write a checkpoint. OSError if it cannot be written; earlier ones stay."""
        if self.worker.rank == 0:
            progress = Progress(
                self.step,
                self.num_answer_tokens,
                self.seconds,
                self.fingerprint,
                self.num_skipped,
            )
            weights = self.objective.network.state_dict()
            self.checkpoints.save(progress, weights, self.optimizer.state())

    @property
    def _device(self) -> torch.device:
        return next(self.objective.network.parameters()).device
