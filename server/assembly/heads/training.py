"""`aerie train-draft`: trains draft heads with the target, the engine that answers prompts, and the
tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from configs.resolve import HostConfig
from configs.training import HostTrainingConfig, TrainingConfig
from drafter.train.answers.generate import (
    GenerationReport,
    GenerationSettings,
    generate_answers,
    progress_bar,
)
from drafter.train.data.conversations import (
    AnyConversation,
    read_conversations,
)
from drafter.train.data.encoding import Coverage, EncodingSettings, Example, encode_conversations
from drafter.train.history import Entry
from drafter.train.results.curve import write_curve
from drafter.train.run import LoadedTarget, Run, prepare
from drafter.train.run_folder import check_same_settings, record_run
from drafter.train.run_folder import publish_run as publish_run  # for the command
from drafter.train.trainer import Trainer, Worker
from server.assembly.compose import build_engine
from server.assembly.heads.early_end import at_first_signal
from server.assembly.heads.timed_training import train_by_the_clock
from server.assembly.heads.training_target import (
    CURVE,
    HEAD,
    conversation_file,
    device_of,
    load_frozen,
    progress_line,
    read_all_prompts,
    serving_config,
    tell,
)
from server.text.chat_codec import ChatCodec, load_codec

ANSWERS = "answers.jsonl"
# Other processes wait while the first one answers prompts or measures. If one dies, torchrun ends
# the others.
PATIENCE = timedelta(days=1)


def train_draft(config: HostTrainingConfig) -> None:
    """Train as `config` says; in each process of `torchrun`, or alone; by the clock with
    run.minutes.

    Resumes from the newest checkpoint of run.output. Writes history.jsonl, checkpoints,
    learning-curve.svg, the files for `publish_run` and the head (for `speculation.draft`) there,
    and prints the path of the head.

    Raises:
        OSError, ValueError: configuration, model or data are invalid, or the disk is full.
    """
    if config.run.minutes is not None:
        train_by_the_clock(config)
        return
    output = config.run.output
    with _workers() as worker:
        check_same_settings(config)
        run = _prepared(config, worker)
        trainer = run.trainer
        if trainer.resume():
            tell(worker, f"resumed at step {trainer.step} of {config.run.steps}")
        if worker.rank == 0:
            record_run(config, run.record)
        with _progress(config, worker) as on_step, at_first_signal(trainer.cut):
            done = trainer.run(on_step)
        if worker.rank == 0:
            write_curve(output / CURVE, trainer.history.entries)
            publish_run(output, output / HEAD, replace=True)
            print(f"{output / HEAD}{'' if done else _reason(trainer)}", flush=True)


def _reason(trainer: Trainer) -> str:
    """Why a run has not come to its end."""
    first = "it was told to end" if trainer.is_cut else "run.max_seconds came first"
    return f" ({first}; the same command goes on)"


def _prepared(config: HostTrainingConfig, worker: Worker) -> Run:
    """Target, examples and trainer. Loads the target twice where prompts are to be answered."""
    serving = serving_config(config)
    codec = load_codec(serving)
    conversations = [
        read_conversations(conversation_file(path)) for path in config.data.conversations
    ]
    if config.data.prompts:
        conversations.append(_answered(config, serving, codec, worker))
    target, eos_ids = load_frozen(config, worker)
    eos_ids |= codec.ending_ids()  # as the engine ends answers
    settings = EncodingSettings(target.tensors.arch.vocab_size, eos_ids, config.data.max_tokens)
    coverage = Coverage()
    examples: list[Example] = []
    for found in conversations:
        examples += encode_conversations(found, codec.encode, settings, coverage)
    measured: list[Example] = []
    for path in config.data.measure_on:
        found = read_conversations(conversation_file(path))
        measured += encode_conversations(found, codec.encode, settings, Coverage())
    if config.data.measure_on and not measured:
        raise ValueError("data.measure_on holds no answer within data.max_tokens to measure on")
    run = prepare(config, target, examples, worker, measured)
    tell(worker, _facts(coverage, run, target))
    return run


def _facts(coverage: Coverage, run: Run, target: LoadedTarget) -> str:
    trainer, record = run.trainer, run.record
    parameters = sum(p.numel() for p in trainer.objective.network.parameters())
    backends = target.ops.backends
    by_backend = [
        f"{name} ({', '.join(op for op, own in backends.items() if own == name)})"
        for name in dict.fromkeys(backends.values())
    ]
    lines = [
        f"{coverage.num_examples} examples, {coverage.num_answer_tokens} answer tokens of "
        f"{coverage.num_tokens}; {coverage.num_truncated} cut at data.max_tokens, "
        f"{coverage.num_dropped} without an answer before it, {coverage.num_merged} cut at an "
        f"answer that begins inside a token of the template; {len(trainer.held_out.examples)} held "
        "out for measuring",
        f"{record.head.kind} head of {parameters:,} parameters, {record.num_processes} processes, "
        f"on {target.device}, with {trainer.objective.kernels.name}; the target's operations: "
        f"{', '.join(by_backend)}",
    ]
    if record.target_ids is not None:
        lines.append(
            f"draft vocabulary of {len(record.target_ids)} tokens: "
            f"{record.coverage:.2%} of answer tokens"
        )
    return "\n".join(lines)


def _answered(
    config: TrainingConfig, serving: HostConfig, codec: ChatCodec, worker: Worker
) -> Iterator[AnyConversation]:
    """The target's answers to data.prompts; the first process writes them to a file."""
    output = config.run.output / ANSWERS
    prompts = read_all_prompts(config)
    if worker.rank == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = GenerationSettings(max_tokens=config.data.max_new_tokens, seed=config.run.seed)
        with progress_bar() as on_progress:
            core = build_engine(serving)
            report = generate_answers(core, codec, prompts, output, settings, on_progress)
        tell(worker, _answer_facts(report))
    if dist.is_initialized():
        dist.barrier()
    return read_conversations(output, {prompt.id for prompt in prompts})


def _answer_facts(report: GenerationReport) -> str:
    refused = f"; {report.num_refused} refused, first {report.refusal}" if report.refusal else ""
    return (
        f"{report.num_earlier + report.num_answered} of {report.num_total} prompts answered; "
        f"{report.num_empty} with nothing at all{refused}"
    )


@contextmanager
def _workers() -> Iterator[Worker]:
    """This process as one of those that `torchrun` started, if any."""
    if not dist.is_torchelastic_launched():
        yield Worker()
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(device_of(Worker(dist.get_rank(), dist.get_world_size())))
        yield Worker(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _progress(config: TrainingConfig, worker: Worker) -> Iterator[Callable[[Entry], None]]:
    """A bar on a terminal, a line per `log_every` steps elsewhere; nothing in other processes."""
    console = Console(stderr=True)
    shown = console.is_terminal and worker.rank == 0
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("training", total=config.run.steps)

        def on_step(entry: Entry) -> None:
            bar.update(task, completed=entry.step, description=progress_line(entry))
            if not shown and entry.step % config.run.log_every == 0:
                tell(worker, f"step {entry.step} of {config.run.steps}: {progress_line(entry)}")

        yield on_step
