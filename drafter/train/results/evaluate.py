"""Measure how many drafts of a head are accepted, by tree and temperature, on real prompts, with
the real engine.

The text of an answer does not depend on the tree, so every tree gets the same conversations.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import msgspec

from drafter.train.data.conversations import Message, Prompt
from drafter.train.results.report import Measurement
from engine.completion import Completion
from engine.messages import EngineStats
from engine.request import FinishReason, Request, SamplingParams
from engine.speculation.lookup import Lookup
from engine.speculation.planner import FixedPlanner
from engine.speculation.policy import DraftPolicy
from engine.step.shape import ROOT, TreeShape


class EvaluatedCore(Protocol):
    """The part of `EngineCore` that evaluation uses."""

    @property
    def policy(self) -> DraftPolicy: ...

    def draft_with(self, policy: DraftPolicy) -> None: ...

    def stats(self) -> EngineStats: ...


class EvaluatedEngine(Protocol):
    """An engine in this process, with a draft head."""

    @property
    def core(self) -> EvaluatedCore: ...

    def generate(self, requests: Iterable[Request]) -> dict[str, Completion]: ...


class Chat(Protocol):
    """Turns conversations into token ids, and answers into text."""

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the answers are drawn; the seed of an answer is its index among all answers."""

    temperature: float
    output_tokens: int
    num_turns: int  # of each prompt, at most


@dataclass(frozen=True, slots=True)
class Question:
    """One answer to generate, and the answer of plain decoding."""

    where: str  # file:line of its prompt
    token_ids: list[int]
    params: SamplingParams
    answer_ids: list[int]


def ask_plainly(
    engine: EvaluatedEngine, chat: Chat, prompts: Sequence[Prompt], sampling: Sampling, batch: int
) -> list[Question]:
    """Answer every turn by plain decoding; later turns have the model's own answers before them.

    Raises:
        ValueError: the chat template or the engine refuses a prompt.
    """
    _draft_with(engine, ROOT, lookup=False)
    questions: list[Question] = []
    histories = [list(prompt.messages) for prompt in prompts]
    for turn in range(sampling.num_turns):
        asked = [n for n, prompt in enumerate(prompts) if turn <= len(prompt.later_turns)]
        if turn:
            for n in asked:
                text = prompts[n].later_turns[turn - 1]
                histories[n].append({"role": "user", "content": text})
        found = [
            Question(prompts[n].where, chat.encode(histories[n], True), _params(sampling, seed), [])
            for seed, n in enumerate(asked, len(questions))
        ]
        answers, _ = _answer(engine, found, batch)
        for n, question, answer in zip(asked, found, answers, strict=True):
            histories[n].append({"role": "assistant", "content": chat.decode(answer)})
            questions.append(dataclasses.replace(question, answer_ids=answer))
    return questions


def measure_trees(
    engine: EvaluatedEngine,
    questions: Sequence[Question],
    shapes: Iterable[TreeShape],
    batch: int,
    shared_noise: bool,
    *,
    with_lookup: bool = False,
) -> Iterator[Measurement]:
    """Yield one measurement per tree, that of the root alone first.

    Args:
        batch: requests that run at a time.
        shared_noise: whether the engine's head ranks candidates with the target's noise.
        with_lookup: measure all trees again together with prompt lookup.
    """
    _draft_with(engine, ROOT, lookup=False)
    _answer(engine, [_shortened(question) for question in questions], batch)  # fills the caches
    plain = _measure(engine, questions, ROOT, batch, shared_noise)
    yield plain
    drafting = [shape for shape in shapes if shape.name != ROOT.name]
    runs = [(shape, False) for shape in drafting]
    if with_lookup:
        runs += [(shape, True) for shape in (ROOT, *drafting)]
    for shape, lookup in runs:
        found = _measure(engine, questions, shape, batch, shared_noise, lookup=lookup)
        speedup = found.tokens_per_second / plain.tokens_per_second
        yield dataclasses.replace(found, speedup=speedup, lookup=lookup)


def _measure(
    engine: EvaluatedEngine,
    questions: Sequence[Question],
    shape: TreeShape,
    batch: int,
    shared_noise: bool,
    *,
    lookup: bool = False,
) -> Measurement:
    _draft_with(engine, shape, lookup=lookup)
    before = engine.core.stats()
    answers, seconds = _answer(engine, questions, batch)
    after = engine.core.stats()
    num_drafts = after.num_drafts - before.num_drafts
    reached = _reached(before, after, shape, num_drafts)
    num_tokens = sum(map(len, answers))
    return Measurement(
        tree=shape.name,
        temperature=questions[0].params.temperature,
        shared_noise=shared_noise,
        num_drafts=num_drafts,
        acceptance_length=1.0 + sum(reached),
        reached=reached,
        conditional=_conditional(reached),
        num_tokens=num_tokens,
        tokens_per_second=num_tokens / seconds,
        speedup=1.0,
        num_changed=sum(
            answer != question.answer_ids
            for answer, question in zip(answers, questions, strict=True)
        ),
    )


def _draft_with(engine: EvaluatedEngine, shape: TreeShape, *, lookup: bool) -> None:
    policy = dataclasses.replace(
        engine.core.policy, planner=FixedPlanner(shape), lookup=Lookup() if lookup else None
    )
    engine.core.draft_with(policy)


def _reached(
    before: EngineStats, after: EngineStats, shape: TreeShape, num_drafts: int
) -> tuple[float, ...]:
    """Shares of the trees verified in between: one per depth of the shape, and one per greater
    depth that a lookup reached."""
    counts = zip_longest(after.accepted_per_position, before.accepted_per_position, fillvalue=0)
    shares = [(now - then) / max(1, num_drafts) for now, then in counts]
    shares += [0.0] * (shape.max_depth - len(shares))
    while len(shares) > shape.max_depth and not shares[-1]:
        shares.pop()
    return tuple(shares)


def _conditional(reached: Sequence[float]) -> tuple[float, ...]:
    above = (1.0, *reached)[: len(reached)]
    return tuple(share / parent for share, parent in zip(reached, above, strict=True) if parent)


def _answer(
    engine: EvaluatedEngine, questions: Sequence[Question], batch: int
) -> tuple[list[list[int]], float]:
    """Answers in the order of the questions, and the seconds they took."""
    answers: list[list[int]] = []
    started = time.perf_counter()
    for first in range(0, len(questions), batch):
        some = questions[first : first + batch]
        requests = [
            Request(request_id=str(number), prompt_ids=one.token_ids, params=one.params)
            for number, one in enumerate(some)
        ]
        heard = engine.generate(requests)
        answers += [
            _checked(heard[request.request_id], one)
            for request, one in zip(requests, some, strict=True)
        ]
    return answers, time.perf_counter() - started


def _checked(completion: Completion, question: Question) -> list[int]:
    assert completion.finished is not None
    if completion.finished.reason is FinishReason.ERROR:
        raise ValueError(f"{question.where}: {completion.finished.error}")
    return completion.token_ids


def _params(sampling: Sampling, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.output_tokens, temperature=sampling.temperature, seed=seed
    )


def _shortened(question: Question) -> Question:
    params = msgspec.structs.replace(question.params, max_tokens=1)
    return dataclasses.replace(question, params=params)
