"""Which questions are asked at which temperature, and which examples the answers give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from drafter.train.answers.interview import Interview
from drafter.train.answers.lockstep import Answer, Question
from drafter.train.data.conversations import Message, Prompt
from drafter.train.data.encoding import Example

EOS, USER, ANSWER = 0, 1, 2


class Letters:
    """A codec in which every letter is a token: a role's token, the letters, and EOS."""

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        ids: list[int] = []
        for message in messages:
            if "!" in message["content"]:
                raise ValueError("the template refuses '!'")
            role = USER if message["role"] == "user" else ANSWER
            ids += [role, *map(ord, message["content"]), EOS]
        return [*ids, ANSWER] if add_generation_prompt else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token != EOS)


def prompt(name: str, *later: str) -> Prompt:
    return Prompt(f"p.jsonl:{name}", name, ({"role": "user", "content": name},), later)


def interview(prompts: Sequence[Prompt], num_passes: int | None = 1, limit: int = 99) -> Interview:
    return Interview(prompts, Letters(), limit, num_passes=num_passes)


def answered(question: Question, text: str, *, ended: bool = True) -> Answer:
    return Answer(question, [*map(ord, text), *([EOS] if ended else [])], ended)


def test_every_prompt_gets_every_temperature_once_then_those_above_zero() -> None:
    asked = interview([prompt("ab"), prompt("c"), prompt("d"), prompt("ef")], None)
    found: Counter[tuple[tuple[int, ...], float]] = Counter()
    for number in range(20):
        question = asked.ask()
        assert question is not None
        found[tuple(question.prompt_ids), question.temperature] += 1
        if number == 11:
            assert set(found.values()) == {1}
            assert len({ids for ids, _ in found}) == 4
    assert {n for (_, heat), n in found.items() if heat == 0} == {1}
    assert sum(found.values()) == 20


def test_answers_are_what_the_target_wrote_and_ends_count() -> None:
    asked = interview([prompt("ab")])
    question = asked.ask()
    assert question is not None
    assert asked.ask() is None
    example = asked.take(answered(question, "xyz"))
    ids = [USER, *map(ord, "ab"), EOS, ANSWER, *map(ord, "xyz"), EOS]
    assert example == Example(ids, [False] * 5 + [True] * 4)


def test_a_later_turn_follows_the_answer_to_the_earlier_one() -> None:
    asked = interview([prompt("ab", "cd", "never asked")])
    first = asked.ask()
    assert first is not None
    assert asked.take(answered(first, "x")) is None
    second = asked.ask()
    assert second is not None
    assert second.prompt_ids[: len(first.prompt_ids) + 2] == [*first.prompt_ids, ord("x"), EOS]
    assert second.temperature == first.temperature
    example = asked.take(answered(second, "yz", ended=False))
    assert example is not None
    assert example.token_ids == [*second.prompt_ids, ord("y"), ord("z")]
    marked = [t for t, own in zip(example.token_ids, example.is_answer, strict=True) if own]
    assert marked == [ord("x"), EOS, ord("y"), ord("z")]


@pytest.mark.parametrize(
    ("text", "ended", "limit"),
    [("x", False, 99), ("  ", True, 99), ("x" * 9, True, 14)],
    ids=["cut off", "blank", "too long for another turn"],
)
def test_a_chat_ends_without_its_later_turn(text: str, ended: bool, limit: int) -> None:
    asked = interview([prompt("ab", "cd")], limit=limit)
    question = asked.ask()
    assert question is not None
    assert asked.take(answered(question, text, ended=ended)) is not None
    assert asked.ask() is None


def test_a_text_that_reads_as_other_tokens_has_no_later_turn() -> None:
    asked = interview([prompt("ab", "cd")])
    question = asked.ask()
    assert question is not None
    twice_ended = Answer(question, [ord("x"), EOS, EOS], ended=True)
    assert asked.take(twice_ended) is not None
    assert asked.ask() is None


def test_long_prompts_are_counted_and_passed_over() -> None:
    asked = interview([prompt("a" * 20), prompt("b")], 3, limit=10)
    questions = [asked.ask() for _ in range(4)]
    assert [q is None for q in questions] == [False] * 3 + [True]
    assert asked.num_too_long == 1


def test_no_prompt_that_fits_is_an_error() -> None:
    asked = interview([prompt("a" * 20), prompt("b" * 30)], None, limit=10)
    with pytest.raises(ValueError, match="all 2 prompts have more than 10 tokens"):
        asked.ask()


def test_a_refused_prompt_is_named() -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl:a!: the template refuses"):
        interview([prompt("a!")]).ask()
