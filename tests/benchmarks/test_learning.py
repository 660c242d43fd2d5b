"""The benchmark of a head that learns: what is asked, when it waits, what it reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import httpx

from benchmarks.learning import Served, bursts, chart


@dataclass
class FakeServer:
    """Every request is one tree with as many accepted tokens as its prompt says; a round of
    training takes one look."""

    asked: list[str] = field(default_factory=list)
    accepted: int = 0
    looks: int = 0

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
            self.looks += 1
            phase = "training" if self.looks % 2 else "waiting"
            counts = {"num_rounds": self.looks // 2, "num_adopted": 0, "num_reverted": 0}
            return httpx.Response(200, json={"phase": phase} | counts)
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
