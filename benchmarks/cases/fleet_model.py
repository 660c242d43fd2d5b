"""Many engines, simulated step by step: measured step times, prefix caches, and the policies that
real front ends use (server/routing).

Each engine runs as the scheduler does: in every step each decoding row gets a token, and what is
left of the budget goes to the prompts that wait, in order. Not simulated: speculation, preemption,
and the time of front ends and networks.
"""

from __future__ import annotations

import bisect
import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from server.routing.policies import Policy, Target

BLOCK = 128  # tokens; hits are counted in such blocks


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step: for its decoding rows, and more for its prompt tokens. Points are joined
    by straight lines, and the last line goes on."""

    rows: Sequence[tuple[int, float]]
    prompt: Sequence[tuple[int, float]]

    def step(self, num_rows: int, num_prompt: int) -> float:
        alone = on_lines(self.rows, max(num_rows, 1))
        return alone + (on_lines(self.prompt, num_prompt) if num_prompt else 0.0)


def on_lines(points: Sequence[tuple[int, float]], at: float) -> float:
    """The value at `at` on the lines between points, which are sorted."""
    right = min(max(bisect.bisect_left(points, (at,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


@dataclass(frozen=True)
class EngineLimits:
    """Of one engine, as in its configuration."""

    max_rows: int
    max_tokens: int  # of one step
    cache_tokens: int


@dataclass(frozen=True)
class Traffic:
    """Conversations that begin at random times (a Poisson process). Each has a system prompt out
    of a few, and asks again a while after each answer."""

    num_systems: int = 32
    system_tokens: int = 1024
    turns: int = 5
    question_tokens: int = 256
    answer_tokens: int = 128
    pause: float = 3.0  # mean seconds between an answer and the next question

    def prompt_tokens(self, turn: int) -> int:
        done = turn * (self.question_tokens + self.answer_tokens)
        return self.system_tokens + done + self.question_tokens


@dataclass(slots=True, eq=False)
class Asked:
    """One request."""

    arrival: float
    conversation: int
    turn: int
    chain: tuple[Hashable, ...]  # blocks of prompt and answer
    num_prompt: int
    num_output: int
    left: int = 0  # prompt tokens that are not computed yet
    cached: int = 0
    first: float = 0.0  # time of the first token
    end: float = 0.0

    @property
    def prompt_chain(self) -> tuple[Hashable, ...]:
        return self.chain[: (self.num_prompt - 1) // BLOCK]


@dataclass(slots=True, eq=False)
class Engine:
    """The state of one engine between two steps."""

    limits: EngineLimits
    times: StepTimes
    waiting: deque[Asked] = field(default_factory=deque)
    started: deque[Asked] = field(default_factory=deque)  # prompts of which a part is computed
    decoding: list[tuple[int, int, Asked]] = field(default_factory=list)  # heap by last step
    blocks: OrderedDict[Hashable, None] = field(default_factory=OrderedDict)
    num_steps: int = 0
    busy: bool = False
    _ready: list[Asked] = field(default_factory=list)  # prompts that the running step completes
    _number: int = 0

    def begin(self) -> float:
        """Begin a step; its seconds, or 0 if there is nothing to do."""
        budget = self.limits.max_tokens - len(self.decoding)
        num_prompt = 0
        while budget > 0 and (asked := self._next_prompt()) is not None:
            taken = min(budget, asked.left)
            asked.left -= taken
            budget -= taken
            num_prompt += taken
            if not asked.left:
                self._ready.append(self.started.popleft())
        if not (self.decoding or num_prompt):
            return 0.0
        return self.times.step(len(self.decoding), num_prompt)

    def finish(self, now: float) -> Iterator[Asked]:
        """End the step; the requests that end with it."""
        self.num_steps += 1
        while self.decoding and self.decoding[0][0] <= self.num_steps:
            asked = heapq.heappop(self.decoding)[2]
            asked.end = now
            self._publish(asked.chain)
            yield asked
        for asked in self._ready:
            asked.first = now
            self._publish(asked.prompt_chain)
            self._number += 1
            last = self.num_steps + asked.num_output - 1
            heapq.heappush(self.decoding, (last, self._number, asked))
        self._ready.clear()

    def _next_prompt(self) -> Asked | None:
        if self.started:
            return self.started[0]
        rows = len(self.decoding) + len(self._ready)
        if not self.waiting or rows >= self.limits.max_rows:
            return None
        asked = self.waiting.popleft()
        hits = 0
        for content in asked.prompt_chain:
            if content not in self.blocks:
                break
            hits += 1
        asked.cached = hits * BLOCK
        asked.left = asked.num_prompt - asked.cached
        self.started.append(asked)
        return asked

    def _publish(self, chain: Sequence[Hashable]) -> None:
        blocks = self.blocks
        for content in reversed(chain):  # the ends of prefixes are evicted first
            blocks[content] = None
            blocks.move_to_end(content)
        while len(blocks) * BLOCK > self.limits.cache_tokens:
            blocks.popitem(last=False)


class Fleet:
    """Engines, a policy and traffic."""

    def __init__(
        self,
        engines: Sequence[Engine],
        policy: Policy[int],
        traffic: Traffic,
        rate: float,
        seed: int = 0,
    ) -> None:
        """`rate`: requests per second, of all conversations together."""
        self._engines = engines
        self._policy = policy
        self._traffic = traffic
        self._random = random.Random(seed)
        self._rate = rate / traffic.turns
        self._loads = dict.fromkeys(range(len(engines)), 0.0)
        self._places: dict[Asked, int] = {}
        # Time, number, and what happens then: an engine's step ends, a turn of a conversation.
        self._events: list[tuple[float, int, int, tuple[int, int]]] = []
        self._num_events = self._num_conversations = 0

    def run(self, warm_up: float, measured: float) -> list[Asked]:
        """The requests that arrived in the `measured` seconds after the `warm_up`; those that have
        not ended by then, and as much again, have `end` 0."""
        found: list[Asked] = []
        self._add(self._random.expovariate(self._rate), -1, (0, 0))
        limit = warm_up + measured
        while self._events and self._events[0][0] < limit + measured:
            now, _, engine, turn = heapq.heappop(self._events)
            if engine >= 0:
                self._end_step(now, engine)
            elif now < limit or turn[1]:
                asked = self._ask(now, *turn)
                if warm_up <= now < limit:
                    found.append(asked)
        return found

    def _add(self, time: float, engine: int, turn: tuple[int, int]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, engine, turn))

    def _ask(self, now: float, conversation: int, turn: int) -> Asked:
        if turn == 0:
            conversation = self._num_conversations
            self._num_conversations += 1
            self._add(now + self._random.expovariate(self._rate), -1, (0, 0))
        asked = self._request(now, conversation, turn)
        target = Target(asked.prompt_chain)
        place = self._policy.choose(self._loads, target)
        self._policy.placed(target, place)
        self._loads[place] += 1
        self._places[asked] = place
        engine = self._engines[place]
        engine.waiting.append(asked)
        if not engine.busy:
            self._begin_step(now, place)
        return asked

    def _request(self, now: float, conversation: int, turn: int) -> Asked:
        traffic = self._traffic
        num_prompt = traffic.prompt_tokens(turn)
        num_blocks = (num_prompt + traffic.answer_tokens) // BLOCK
        shared = traffic.system_tokens // BLOCK
        system = conversation * 7919 % traffic.num_systems
        chain = [-(system * 1_000 + index + 1) for index in range(shared)]
        chain += [conversation * 1_000 + index for index in range(shared, num_blocks)]
        return Asked(now, conversation, turn, tuple(chain), num_prompt, traffic.answer_tokens)

    def _begin_step(self, now: float, place: int) -> None:
        seconds = self._engines[place].begin()
        self._engines[place].busy = seconds > 0
        if seconds:
            self._add(now + seconds, place, (0, 0))

    def _end_step(self, now: float, place: int) -> None:
        for asked in self._engines[place].finish(now):
            self._loads[self._places.pop(asked)] -= 1
            if asked.turn + 1 < self._traffic.turns:
                pause = self._random.expovariate(1 / self._traffic.pause)
                self._add(now + pause, -1, (asked.conversation, asked.turn + 1))
        self._begin_step(now, place)
