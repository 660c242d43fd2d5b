"""How far the greedy texts of two servers agree."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile

Texts = Mapping[str, Mapping[str, str]]  # by server, by prompt
MAX_PROMPTS = 20


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two servers that answered the same prompts. Lengths are in tokens from the beginning of
    an answer to the first difference, or to the end of the shorter one."""

    first: str
    second: str
    num_prompts: int
    median: float
    shortest: int
    equal: int  # prompts whose answers are equal to the end


def agreements(
    texts: Texts, prompts: Sequence[str], encode: Callable[[str], list[int]]
) -> list[Agreement]:
    """Of each two servers, over the first `MAX_PROMPTS` prompts that both answered; `encode` makes
    tokens of a text."""
    found = []
    for first, second in combinations(texts, 2):
        both = [p for p in prompts if p in texts[first] and p in texts[second]][:MAX_PROMPTS]
        if both:
            pairs = [(texts[first][prompt], texts[second][prompt]) for prompt in both]
            lengths = [common_length(encode(one), encode(other)) for one, other in pairs]
            equal = sum(one == other for one, other in pairs)
            middle = statistics.median(lengths)
            found.append(Agreement(first, second, len(both), middle, min(lengths), equal))
    return found


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(first, second, strict=False)  # one may be longer
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
