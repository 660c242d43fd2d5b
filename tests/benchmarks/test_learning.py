"""The benchmark of a head that learns: what is asked, when it waits, what it reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import httpx
import pytest

from benchmarks.learning import Cost, Served, bursts, busy_learning, chart, cost


@dataclass
class FakeServer:
    """Every request is one tree with as many accepted tokens as its prompt says; a round of
    training takes one look."""

    asked: list[str] = field(default_factory=list)
    accepted: int = 0
    looks: int = 0
    pauses: list[bool] = field(default_factory=list)

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            name = "aerie:spec_decode_num"
            lines = [
                "# HELP of nothing",
                f'{name}_drafts_total{{model_name="m"}} {len(self.asked)}.0',
                f'{name}_accepted_tokens_total{{model_name="m"}} {self.accepted}.0',
            ]
            return httpx.Response(200, text="\n".join(lines))
        if request.url.path == "/admin/learning":
            assert request.headers["authorization"] == "Bearer root"
            if request.method == "POST":
                self.pauses.append(json.loads(request.content)["paused"])
                return httpx.Response(200, json={})
            self.looks += 1
            phase = "training" if self.looks % 2 else "waiting"
            counts = {"num_rounds": self.looks // 2, "num_adopted": 0, "num_reverted": 0}
            stands = bool(self.pauses) and self.pauses[-1]
            return httpx.Response(200, json={"phase": phase, "interrupted": stands} | counts)
        said = json.loads(request.content)["messages"][0]["content"]
        self.asked.append(said)
        self.accepted += int(said)
        return httpx.Response(200, json={})


def prompts(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_acceptance_is_that_of_each_burst_and_every_round_is_waited_for() -> None:
    fake = FakeServer()
    with httpx.Client(base_url="http://a", transport=httpx.MockTransport(fake.answer)) as http:
        served = Served(http, "m", 9, {"authorization": "Bearer root"})
        domains = [("chat", prompts("1", "2")), ("code", prompts("3"))]
        found = list(bursts(served, domains, num_requests=4, size=2, patience=60, poll=0.001))
    assert sorted(fake.asked) == ["1", "1", "2", "2", "3", "3", "3", "3"]
    assert [burst.domain for burst in found] == ["chat", "chat", "code", "code"]
    assert [burst.tokens_per_step for burst in found] == [2.5, 2.5, 4.0, 4.0]
    assert [burst.num_rounds for burst in found] == [1, 2, 3, 4]
    assert b"chat until 4, code until 8" in chart(found)


def test_each_pair_is_asked_with_and_without_learning_in_turn_first() -> None:
    fake = FakeServer()
    with httpx.Client(base_url="http://a", transport=httpx.MockTransport(fake.answer)) as http:
        served = Served(http, "m", 9, {"authorization": "Bearer root"})
        found = cost(served, prompts("1", "2"), num_pairs=3, rest=0)
    assert fake.asked == ["1", "1", "1", "2", "2", "2", "1", "1", "1"]
    assert fake.pauses == [True, False, False, True, True, False]
    assert (found.num_pairs, len(found.paused), len(found.learning)) == (3, 3, 3)
    assert found.num_running == 1  # the third of six looks, of which every second finds training
    assert Cost(3, 3, [1.0, 2.0, 4.0], [1.1, 2.0, 4.2]).ratio == pytest.approx(1.05)


def test_requests_are_sent_until_training_begins_or_patience_ends() -> None:
    fake = FakeServer(looks=1)
    with httpx.Client(base_url="http://a", transport=httpx.MockTransport(fake.answer)) as http:
        served = Served(http, "m", 9, {"authorization": "Bearer root"})
        busy_learning(served, prompts("1", "2"), 3, patience=60, poll=0)
        assert sorted(fake.asked) == ["1", "1", "2"]
        fake.looks = 1
        with pytest.raises(RuntimeError, match="no training began"):
            busy_learning(served, prompts("1"), 1, patience=-1, poll=0)
