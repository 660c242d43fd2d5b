"""Asks the target the same prompts over and over, and turns its answers into examples.

A pass asks every prompt once, in a new order. Temperatures take turns: after three passes each
prompt has had each of them; then only those above zero go on, since a greedy answer is always the
same. Later user turns follow the answers to the earlier ones.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from drafter.train.answers.generate import Codec
from drafter.train.answers.lockstep import Answer, Question
from drafter.train.data.conversations import Message, Prompt
from drafter.train.data.encoding import Example

GREEDY = 0.0
TEMPERATURES = (GREEDY, 0.8, 1.0)
MAX_TURNS = 2


@dataclass(slots=True)
class _Chat:
    """A prompt that is being answered, and its tokens up to the last answer."""

    prompt: Prompt
    temperature: float
    messages: list[Message]
    token_ids: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)
    num_answers: int = 0


class Interview:
    """Questions for a `LockstepTarget`, and the examples that come of its answers."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        codec: Codec,
        max_prompt_tokens: int,
        temperatures: Sequence[float] = TEMPERATURES,
        num_passes: int | None = None,
        seed: int = 0,
    ) -> None:
        """`num_passes`: None asks without end. A prompt of more than `max_prompt_tokens` is not
        asked; `num_too_long` counts them."""
        self._prompts = prompts
        self._codec = codec
        self._limit = max_prompt_tokens
        self._temperatures = temperatures
        self._order = self._passes(num_passes, seed)
        self._ids: dict[int, list[int]] = {}  # of prompts that have been asked
        self._chats: dict[int, _Chat] = {}
        self._follow_ups: deque[Question] = deque()
        self._tags = itertools.count()
        self.num_too_long = 0

    def ask(self) -> Question | None:
        """The next question; None if there is none now."""
        if self._follow_ups:
            return self._follow_ups.popleft()
        for number, temperature in self._order:
            ids = self._encoded(number)
            if ids is not None:
                prompt, tag = self._prompts[number], next(self._tags)
                self._chats[tag] = _Chat(prompt, temperature, list(prompt.messages))
                return Question(ids, temperature, tag)
            if self.num_too_long == len(self._prompts):
                raise ValueError(
                    f"all {self.num_too_long} prompts have more than {self._limit} tokens, the "
                    "limit that data.max_tokens - data.max_new_tokens sets"
                )
        return None

    def take(self, answer: Answer) -> Example | None:
        """The example, if this was the last answer of its chat."""
        question = answer.question
        chat = self._chats[question.tag]
        new = question.prompt_ids[len(chat.token_ids) :]
        chat.token_ids = [*question.prompt_ids, *answer.token_ids]
        chat.is_answer += [False] * len(new) + [True] * len(answer.token_ids)
        chat.num_answers += 1
        follow_up = self._next_turn(chat, answer)
        if follow_up is not None:
            self._follow_ups.append(Question(follow_up, chat.temperature, question.tag))
            return None
        del self._chats[question.tag]
        return Example(chat.token_ids, chat.is_answer)

    def _passes(self, num_passes: int | None, seed: int) -> Iterator[tuple[int, float]]:
        """Numbers of prompts, each with the temperature of its answer."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self._temperatures)
        warm = [heat for heat in self._temperatures if heat != GREEDY] or self._temperatures
        for number in itertools.count() if num_passes is None else range(num_passes):
            heats = self._temperatures if number < count else warm
            for index in torch.randperm(len(self._prompts), generator=generator).tolist():
                yield index, heats[(index + number) % len(heats)]

    def _encoded(self, number: int) -> list[int] | None:
        """The ids of a prompt. None if they are too many; it is counted the first time."""
        if number not in self._ids:
            prompt = self._prompts[number]
            try:
                self._ids[number] = self._codec.encode(prompt.messages, True)
            except ValueError as error:
                raise ValueError(f"{prompt.where}: {error}") from error
            self.num_too_long += len(self._ids[number]) > self._limit
        ids = self._ids[number]
        return ids if len(ids) <= self._limit else None

    def _next_turn(self, chat: _Chat, answer: Answer) -> list[int] | None:
        """The ids up to the next user turn. None if there is none, or if the answer's text gives
        other ids than the target wrote, which the head will not see after such an answer."""
        turns = chat.prompt.later_turns[: MAX_TURNS - 1]
        text = self._codec.decode(answer.token_ids)
        if not answer.ended or chat.num_answers > len(turns) or not text.strip():
            return None
        chat.messages.append({"role": "assistant", "content": text})
        chat.messages.append({"role": "user", "content": turns[chat.num_answers - 1]})
        ids = self._codec.encode(chat.messages, True)
        same = ids[: len(chat.token_ids)] == chat.token_ids
        return ids if same and len(ids) <= self._limit else None
