"""`aerie train-draft` with `run.minutes`: from prompts alone to a head within a given time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from configs.training import HostTrainingConfig
from drafter.train.answers.interview import Interview
from drafter.train.answers.lockstep import LockstepTarget
from drafter.train.data.conversations import Prompt
from drafter.train.data.encoding import Example
from drafter.train.history import Entry
from drafter.train.optimizer import by_clock
from drafter.train.results.curve import write_curve
from drafter.train.run import LoadedTarget, Run, Text, assemble, fingerprint_of
from drafter.train.run_folder import check_no_run, publish_run, record_run
from drafter.train.timed import Clock, Pool, TimedRun
from drafter.train.trainer import Worker
from server.assembly.heads.early_end import at_first_signal
from server.assembly.heads.training_target import (
    CURVE,
    HEAD,
    load_frozen,
    progress_line,
    read_all_prompts,
    serving_config,
    tell,
)
from server.text.chat_codec import ChatCodec, load_codec

SPENT = "time.json"  # in run.output
ROWS, ANSWERING = 1024, 0.5  # defaults of data.rows and data.answering
FIRST_BATCHES = 40  # answered before the first step: the draft vocabulary is counted in them
FIRST_SHARE = 0.1  # of the time, which they may take at most
ME = Worker()


def train_by_the_clock(config: HostTrainingConfig) -> None:
    """Train for `run.minutes`, and write what `train_draft` writes and where the time went.

    Raises:
        OSError, ValueError: configuration, model or prompts are invalid, or the disk is full.
    """
    assert config.run.minutes is not None
    if dist.is_torchelastic_launched():
        raise ValueError("run.minutes trains in one process on one device, without torchrun")
    clock = Clock(config.run.minutes * 60)
    output = config.run.output
    check_no_run(output)
    codec = load_codec(serving_config(config))
    prompts = _shuffled(read_all_prompts(config))
    target, eos_ids = load_frozen(config, ME)
    answering = _lockstep(config, target, eos_ids | codec.ending_ids())
    tell(ME, f"{clock.elapsed():.1f} s: {len(prompts)} prompts, target loaded on {target.device}")
    num_held_out = config.data.held_out
    held_out = _held_out(config, answering, codec, prompts[:num_held_out])
    pool = Pool(answering, _interview(config, codec, prompts[num_held_out:]))
    _begin(pool, clock, FIRST_BATCHES * config.run.batch_tokens)
    text = Text(pool.examples, held_out, config.data.max_tokens)
    rate = by_clock(config.optimizer, clock.share)
    run = assemble(config, target, text, rate, ME, fingerprint_of(config, held_out, ME))
    record_run(config, run.record)
    timed = TimedRun(run.trainer, pool, config.data.answering or ANSWERING, clock)
    tell(ME, f"{clock.elapsed():.1f} s: {_facts(run, pool)}")
    with at_first_signal(clock.cut):
        timed.run(_report(config, clock, pool))
    if clock.is_cut:
        tell(ME, f"{clock.elapsed():.1f} s: ended early; what was learnt is kept")
    timed.spent.write(output / SPENT)
    write_curve(output / CURVE, run.trainer.history.entries)
    publish_run(output, output / HEAD, replace=True)
    tell(ME, f"{clock.elapsed():.1f} s: {timed.spent}")
    print(output / HEAD, flush=True)


def _shuffled(prompts: list[Prompt]) -> list[Prompt]:
    """In the same order for every `run.seed`, so that a head which is trained further, on other
    answers, is measured on prompts that it has never learnt from."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    return [prompts[index] for index in order.tolist()]


def _lockstep(
    config: HostTrainingConfig, target: LoadedTarget, eos_ids: frozenset[int]
) -> LockstepTarget:
    data = config.data
    return LockstepTarget(
        target.model,
        target.ops,
        target.dtype,
        target.device,
        eos_ids,
        rows=data.rows or ROWS,
        max_new_tokens=data.max_new_tokens,
        max_prompt_tokens=_longest_prompt(config),
        seed=config.run.seed,
    )


def _interview(
    config: HostTrainingConfig, codec: ChatCodec, prompts: list[Prompt], passes: int | None = None
) -> Interview:
    limit = _longest_prompt(config)
    return Interview(prompts, codec, limit, num_passes=passes, seed=config.run.seed)


def _longest_prompt(config: HostTrainingConfig) -> int:
    """Tokens that leave room for an answer."""
    return config.data.max_tokens - config.data.max_new_tokens


def _held_out(
    config: HostTrainingConfig, target: LockstepTarget, codec: ChatCodec, prompts: list[Prompt]
) -> list[Example]:
    """Answers to prompts that are not trained on, each at one of the temperatures."""
    held_out = Pool(target, _interview(config, codec, prompts, passes=1))
    held_out.grow(lambda: False)
    return held_out.examples


def _begin(pool: Pool, clock: Clock, num_tokens: int) -> None:
    """The first examples: some `num_tokens`, or what can be had in FIRST_SHARE of the time."""
    pool.grow(
        lambda: (
            bool(pool.lengths) and (pool.num_tokens >= num_tokens or clock.share() >= FIRST_SHARE)
        )
    )


def _facts(run: Run, pool: Pool) -> str:
    trainer, record = run.trainer, run.record
    parameters = sum(p.numel() for p in trainer.objective.network.parameters())
    known = "" if record.coverage is None else f", {record.coverage:.1%} of answer tokens known"
    return (
        f"{record.head.kind} head of {parameters:,} parameters{known}, trained with "
        f"{trainer.objective.kernels.name}; {len(pool.examples)} examples so far, "
        f"{len(trainer.held_out.examples)} held out"
    )


def _report(config: HostTrainingConfig, clock: Clock, pool: Pool) -> Callable[[Entry], None]:
    def on_step(entry: Entry) -> None:
        if entry.step % config.run.log_every == 0:
            drawn = f"{pool.num_drawn / 1e6:.2f} M tokens answered"
            learnt = f"{entry.num_answer_tokens / 1e6:.2f} M learnt from"
            tell(
                ME,
                f"{clock.elapsed():.1f} s, step {entry.step}: {progress_line(entry)}; {drawn}, "
                f"{learnt}",
            )

    return on_step
