"""Tests of the comparison of the planner with plain decoding and fixed trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from benchmarks.planner import AUTO, PLAIN, Traffic, decode, rows, run_rounds
from benchmarks.tables import markdown
from engine.messages import Tokens
from engine.request import Request

KIND = Traffic("mixed", [[5, 6], [7], [8, 9]], (0.0, 0.7))


class Echo:
    """Answers every request with a token a step; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, float]]] = []

    def steps(self, requests: Sequence[Request]) -> Iterator[list[Tokens]]:
        self.asked.append([(r.request_id, r.params.temperature) for r in requests])
        for _ in range(requests[0].params.max_tokens):
            yield [Tokens(request.request_id, [5], None) for request in requests]


def test_all_engines_get_the_same_requests_and_other_prompts_in_every_turn() -> None:
    engines = {PLAIN: Echo(), AUTO: Echo()}
    rates = run_rounds(engines, [KIND], (1, 3), 4, 2)  # type: ignore[arg-type]
    assert engines[PLAIN].asked == engines[AUTO].asked
    assert {key: len(own) for key, own in rates.items()} == {
        ("mixed", name, size): 2 for name in engines for size in (1, 3)
    }
    names = [name for batch in engines[PLAIN].asked for name, _ in batch]
    assert len(names) == len(set(names))
    assert {heat for _, heat in engines[PLAIN].asked[-1]} == {0.0, 0.7}


def test_tokens_count_from_the_first_of_the_last_stream_on() -> None:
    count, seconds = decode(Echo(), KIND.batch(3, 4, 0))  # type: ignore[arg-type]
    assert count == 9
    assert seconds > 0


def test_the_table_shows_each_tree_beside_plain_decoding() -> None:
    rates = {
        ("a", PLAIN, 1): [100.0, 200.0, 100.0],
        ("a", AUTO, 1): [150.0, 220.0, 90.0],
        ("b", PLAIN, 1): [50.0],
        ("b", AUTO, 1): [100.0],
    }
    found = list(rows(rates))
    assert [row["ratio"] for row in found] == [
        {"median": pytest.approx(1.1), "low": 0.9, "high": 1.5},
        {"median": 2.0, "low": 2.0, "high": 2.0},
    ]
    content = {"date": "2026-01-01", "cores": 2, "device": "x", "load": [[0.5], [1.5]]}
    table = markdown("planner", content | {"tokens": 64, "rounds": 3, "rows": found})
    assert "| a | auto | 1.10 (0.90 to 1.50) | 1.10 |" in table
    assert "| mean of all | auto | 1.48 | 1.48 |" in table
