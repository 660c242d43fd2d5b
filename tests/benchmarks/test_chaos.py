"""How the chaos run judges what became of a request."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from benchmarks.cases import chaos_traffic
from benchmarks.cases.chaos_traffic import Reading, cases
from benchmarks.chaos import growth

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def choice(text: str, end: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "finish_reason": end}]}


ERROR = {"error": {"message": "failed to finish"}}
DELTA = {"type": "response.output_text.delta", "delta": "a"}
COMPLETED = {"type": "response.completed"}
BLOCK = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}}
ENDS = [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, {"type": "message_stop"}]


@pytest.mark.parametrize(
    ("path", "events", "end"),
    [
        (TEXT, [choice("a"), choice("b", "stop"), "[DONE]"], ("complete", "ab")),
        (TEXT, [choice("a", "stop", 1), choice("b", "stop"), "[DONE]"], ("complete", "b|a")),
        (TEXT, [choice("a"), choice("b", "stop")], "wrong: not exactly one end"),
        (TEXT, [choice("a", "stop"), choice("b", "stop"), "[DONE]"], "wrong: not exactly one end"),
        (TEXT, [choice("a"), "[DONE]"], "wrong: not exactly one end"),
        (TEXT, [choice("a"), ERROR], "error"),
        (TEXT, [], "wrong: not exactly one end"),
        ("/v1/responses", [DELTA, COMPLETED], ("complete", "a")),
        ("/v1/responses", [DELTA], "wrong: not exactly one end"),
        ("/v1/responses", [DELTA, COMPLETED, {"type": "error"}], "wrong: an error and an end"),
        ("/v1/messages", [BLOCK, *ENDS], ("complete", "a")),
        ("/v1/messages", [BLOCK, *ENDS, ENDS[1]], "wrong: not exactly one end"),
    ],
)
def test_a_stream_must_have_exactly_one_end(
    path: str, events: list[Any], end: str | tuple[str, str]
) -> None:
    reading = Reading(path)
    for event in events:
        reading.take(event if isinstance(event, str) else json.dumps(event))
    found = reading.end()
    assert found == end if isinstance(end, tuple) else found[0] == end


@pytest.mark.parametrize(
    ("status", "text", "end"),
    [
        (429, '{"error": {}}', "refused"),
        (503, '{"error": {}}', "refused"),
        (500, '{"error": {}}', "error"),
        (500, "Internal Server Error", "wrong: status 500 without an error object"),
        (400, '{"error": {}}', "wrong: status 400"),
    ],
)
def test_a_refusal_must_say_why(status: int, text: str, end: str) -> None:
    assert chaos_traffic._refusal(status, text) == (end, text)


def test_traffic_is_the_same_for_the_same_seed() -> None:
    one, other = (cases(random.Random(3)) for _ in range(2))
    assert one == other
    assert len({case.name for case in one}) == len(one)
    luck = [random.Random(5) for _ in range(2)]
    spoilt = [[chaos_traffic._spoil('{"a": 1}', each) for _ in range(20)] for each in luck]
    assert spoilt[0] == spoilt[1]


def test_growth_is_that_after_the_warm_up() -> None:
    steady = [(float(second), 2**20 * (100 + second // 36)) for second in range(0, 3600, 36)]
    filling = [(float(second), 2**20 * min(second, 50)) for second in range(100)]
    assert growth(steady, 1200) == pytest.approx(100, rel=0.01)
    assert growth([*filling, (100.0, 2**20 * 50)], 60) == 0
