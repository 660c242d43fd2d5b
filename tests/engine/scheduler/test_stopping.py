"""Where a block of emitted tokens ends a sequence."""

from __future__ import annotations

import pytest

from engine.request import FinishReason, Sequence
from engine.scheduler.cutting import cut_emitted
from tests.support.engines.in_process import ask

EOS, STOP_TOKEN, OTHER = 2, 7, 5
NUM_PROMPT = 3
FAR = 100  # a limit that is out of reach


def sequence(num_output: int, **params: object) -> Sequence:
    seq = Sequence.from_request(ask("r", [1] * NUM_PROMPT, **({"max_tokens": FAR} | params)))
    seq.own_tokens()
    seq.token_ids += [OTHER] * num_output
    return seq


def cut(
    emitted: list[int], *, num_output: int = 0, max_len: int = FAR, **params: object
) -> tuple[list[int], FinishReason | None]:
    return cut_emitted(sequence(num_output, **params), emitted, frozenset({EOS, 3}), max_len)


def block(length: int, special: int, offset: int) -> list[int]:
    return [special if index == offset else OTHER for index in range(length)]


ENDING = [
    (EOS, {}),
    (3, {}),  # a model may have several
    (STOP_TOKEN, {"stop_token_ids": (6, STOP_TOKEN)}),
    (STOP_TOKEN, {"stop_token_ids": (STOP_TOKEN,), "ignore_eos": True}),
    (EOS, {"stop_token_ids": (EOS,), "ignore_eos": True}),  # asked for by name
]
GOING_ON = [
    (EOS, {"ignore_eos": True}),
    (STOP_TOKEN, {}),
    (STOP_TOKEN, {"stop_token_ids": (6,)}),
]


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize(("special", "params"), ENDING, ids=str)
def test_an_ending_token_is_kept_and_nothing_after_it(
    special: int, params: dict[str, object], offset: int
) -> None:
    kept, reason = cut(block(4, special, offset), **params)
    assert kept == [OTHER] * offset + [special]
    assert reason is FinishReason.STOP


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize(("special", "params"), GOING_ON, ids=str)
def test_a_token_that_ends_nothing_is_text(
    special: int, params: dict[str, object], offset: int
) -> None:
    emitted = block(4, special, offset)
    assert cut(emitted, **params) == (emitted, None)


@pytest.mark.parametrize("num_output", range(4))
@pytest.mark.parametrize("min_tokens", range(6))
def test_an_ending_token_counts_only_after_min_tokens(min_tokens: int, num_output: int) -> None:
    kept, reason = cut([EOS] * 4, num_output=num_output, min_tokens=min_tokens)
    wanted = min_tokens + 1 - num_output  # the first one that may end the text
    assert len(kept) == min(max(wanted, 1), 4)
    assert reason is (FinishReason.STOP if wanted <= 4 else None)


@pytest.mark.parametrize("num_output", [0, 5])
@pytest.mark.parametrize("room", range(1, 6))
def test_max_tokens_cuts_a_block_at_any_offset(room: int, num_output: int) -> None:
    kept, reason = cut([OTHER] * 4, num_output=num_output, max_tokens=num_output + room)
    assert kept == [OTHER] * min(room, 4)
    assert reason is (FinishReason.LENGTH if room <= 4 else None)


def test_max_tokens_0_keeps_nothing() -> None:
    assert cut([OTHER, EOS], max_tokens=0) == ([], FinishReason.LENGTH)


@pytest.mark.parametrize("room", range(1, 6))
def test_max_len_counts_prompt_and_output(room: int) -> None:
    kept, reason = cut([OTHER] * 4, num_output=2, max_len=NUM_PROMPT + 2 + room)
    assert kept == [OTHER] * min(room, 4)
    assert reason is (FinishReason.LENGTH if room <= 4 else None)


@pytest.mark.parametrize("limit", [{"max_tokens": 2}, {"max_len": NUM_PROMPT + 2}], ids=str)
def test_an_ending_token_in_the_last_place_is_a_stop(limit: dict[str, int]) -> None:
    assert cut([OTHER, EOS, OTHER], **limit) == ([OTHER, EOS], FinishReason.STOP)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [{"max_tokens": 2}, {"max_len": NUM_PROMPT + 2}], ids=str)
def test_an_ending_token_after_the_last_place_is_never_seen(limit: dict[str, int]) -> None:
    assert cut([OTHER, OTHER, EOS], **limit) == ([OTHER, OTHER], FinishReason.LENGTH)  # type: ignore[arg-type]


def test_an_empty_block_changes_nothing() -> None:
    assert cut([]) == ([], None)


def test_the_sequence_itself_is_left_alone() -> None:
    seq = sequence(1)
    before = list(seq.token_ids)
    cut_emitted(seq, [OTHER, EOS], frozenset({EOS}), FAR)
    assert seq.token_ids == before
