"""How fast the target answers many prompts in lockstep (drafter/train/answers/lockstep.py).

The model of the configuration answers the shipped prompts over and over. The clock starts with the
first answer, when kernels are compiled and all rows are busy."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from configs.host import host_config
from configs.resolve import HostConfig
from drafter.train.answers.lockstep import ON_CPU, ON_DEVICE, Answer, LockstepTarget, Question
from drafter.train.data.conversations import read_prompts, sample_file
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import resolve_source
from engine.models.families import load_target
from engine.models.place import Place
from server.assembly.operations import configured_ops, torch_dtype
from server.text.chat_codec import ChatCodec, load_codec

TEMPERATURES = (0.0, 0.8, 0.0, 1.0)


def target_of(
    config: HostConfig, codec: ChatCodec, rows: int, new: int, prompt: int, steps: int | None
) -> LockstepTarget:
    """The configured model in `rows` rows; `steps` between two looks, None: the default."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch_dtype(config.model.dtype)
    threads = config.kernels.threads
    ops = configured_ops(config, device, dtype, threads)
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(resolve_source(config.model.source, config.model.revision))
    place = Place(ops, dtype, device)
    model = load_target(checkpoint.arch, checkpoint.tensor, place, prompt + new)
    pace = ON_CPU if device.type == "cpu" else ON_DEVICE
    return LockstepTarget(
        model,
        ops,
        dtype,
        device,
        frozenset(checkpoint.eos_token_ids) | codec.ending_ids(),
        rows=rows,
        max_new_tokens=new,
        max_prompt_tokens=prompt,
        seed=0,
        pace=pace if steps is None else replace(pace, steps=steps),
    )


def asking(codec: ChatCodec) -> Callable[[], Question]:
    """The shipped prompts, again and again, at one temperature after the other."""
    shipped = read_prompts(sample_file("prompts.jsonl"))
    prompts = [codec.encode(prompt.messages, True) for prompt in shipped]
    numbers = itertools.count()

    def ask() -> Question:
        number = next(numbers)
        lap, place = divmod(number, len(prompts))
        return Question(prompts[place], TEMPERATURES[(lap + place) % len(TEMPERATURES)], number)

    return ask


def report(target: LockstepTarget, ask: Callable[[], Question], seconds: float) -> str:
    """Answers for some seconds, and for a step at least; what that gave."""
    began, heard = time.perf_counter(), list[Answer]()
    started, tokens, steps, waited = began, 0, 0, 0.0
    for answer in target.answers(ask):
        if not heard:
            started = time.perf_counter()
            tokens, steps, waited = target.num_tokens, target.num_steps, target.seconds_waited
        heard.append(answer)
        if time.perf_counter() > started + seconds and target.num_steps > steps:
            break
    took = time.perf_counter() - started
    return (
        f"first answer after {started - began:.1f} s, then "
        f"{(target.num_tokens - tokens) / took:,.0f} tokens/s for {took:.1f} s: "
        f"{1e3 * took / (target.num_steps - steps):.2f} ms a step of all rows, prompts included; "
        f"the host waited for the device {(target.seconds_waited - waited) / took:.0%} of the "
        f"time; {_lengths(heard)}"
    )


def _lengths(heard: list[Answer]) -> str:
    tokens = sum(len(answer.token_ids) for answer in heard)
    ended = sum(answer.ended for answer in heard)
    return (
        f"{len(heard)} answers of {tokens / len(heard):.0f} tokens on average, "
        f"{ended / len(heard):.0%} ended by themselves"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024])
    parser.add_argument("--new", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--prompt", type=int, default=512, help="most tokens of a prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[None], help="between two looks")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("settings", nargs="*", help="of the configuration, as in aerie serve")
    chosen = parser.parse_args()
    config = host_config(None, chosen.settings)
    codec = load_codec(config)
    for rows, steps in itertools.product(chosen.rows, chosen.steps):
        target = target_of(config, codec, rows, chosen.new, chosen.prompt, steps)
        print(f"{rows} rows: {report(target, asking(codec), chosen.seconds)}", flush=True)


if __name__ == "__main__":
    main()
