"""Random traces of requests and aborts: the rules hold at every step.

`FakeEngine.step` asserts the budget, that no row stops decoding, that every row reads its own KV,
one end per request, and `audit()`; `check_idle` compares every text with that of running alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, Request
from tests.support.engines.fake_executor import FakeEngine
from tests.support.engines.in_process import ask

VOCAB = 13  # so small that texts end by EOS often and prompts repeat generated text


@dataclass(frozen=True)
class Arrival:
    """A request whose prompt begins like the others of its family."""

    family: int
    shared: int  # tokens in common with the family
    own: int
    priority: int
    client: str
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    prompt_logprobs: bool

    def request(self, index: int) -> Request:
        common = [(self.family * 7 + place * place) % VOCAB for place in range(self.shared)]
        own = [(index * 5 + place) % VOCAB for place in range(self.own)]
        plain = ask(
            f"r{index}",
            common + own,
            max_tokens=self.max_tokens,
            min_tokens=min(self.min_tokens, self.max_tokens),
            ignore_eos=self.ignore_eos,
            prompt_logprobs=0 if self.prompt_logprobs else None,
        )
        return msgspec.structs.replace(plain, priority=self.priority, client=self.client)


@dataclass(frozen=True)
class Abort:
    """Abort the request submitted `back` requests ago, if there is one."""

    back: int


@dataclass(frozen=True)
class Step:
    times: int


ARRIVALS = st.builds(
    Arrival,
    family=st.integers(0, 1),
    shared=st.sampled_from([9, 8, 0, 5, 12, 16]),
    own=st.integers(0, 5),
    priority=st.integers(0, 2),
    client=st.sampled_from("aab"),
    max_tokens=st.sampled_from([16, 0, 1, 7, 12, 40]),
    min_tokens=st.integers(0, 4),
    ignore_eos=st.sampled_from([True, True, False]),
    prompt_logprobs=st.sampled_from([False, False, False, True]),
)
STEPS = st.builds(Step, times=st.integers(1, 6))
ABORTS = st.builds(Abort, back=st.integers(0, 5))
TRACES = st.lists(st.one_of(ARRIVALS, ARRIVALS, STEPS, ARRIVALS, ABORTS), min_size=15, max_size=40)


@st.composite
def engines(draw: st.DrawFn) -> FakeEngine:
    max_num_seqs = draw(st.sampled_from([3, 1, 2, 4, 6]))
    block_size = draw(st.sampled_from([4, 1, 2]))
    return FakeEngine(
        num_blocks=draw(st.integers(16, 48)) // block_size,
        block_size=block_size,
        prefix_caching=draw(st.sampled_from([True, True, False])),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 20)),
        max_model_len=draw(st.integers(16, 48)),
        vocab_size=VOCAB,
    )


def play(engine: FakeEngine, trace: list[Arrival | Abort | Step]) -> None:
    for act in trace:
        match act:
            case Arrival():
                engine.submit(act.request(len(engine.submitted)))
            case Abort(back):
                engine.scheduler.abort(f"r{len(engine.submitted) - 1 - back}")
            case Step(times):
                for _ in range(times):
                    engine.step()
        engine.scheduler.audit()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(engines(), TRACES)
def test_every_trace_keeps_the_rules_and_gives_every_request_its_own_text(
    engine: FakeEngine, trace: list[Arrival | Abort | Step]
) -> None:
    play(engine, trace)
    engine.run()
    stats = engine.scheduler.stats()
    event(f"preempted: {stats.num_preemptions > 0}, prefix hits: {stats.prefix_hits > 0}")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(engines(), TRACES)
def test_abort_all_ends_every_open_request_once_and_frees_all_blocks(
    engine: FakeEngine, trace: list[Arrival | Abort | Step]
) -> None:
    play(engine, trace)
    unfinished = {name for name, heard in engine.heard.items() if heard.finished is None}
    ends = engine.scheduler.abort_all("stopped")
    assert {end.request_id for end in ends} == unfinished
    assert len(ends) == len(unfinished)
    engine.scheduler.audit()
    assert engine.scheduler.stats().kv_usage == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(engines(), st.lists(ARRIVALS, min_size=2, max_size=12))
def test_the_most_important_request_is_never_preempted(
    engine: FakeEngine, arrivals: list[Arrival]
) -> None:
    first = msgspec.structs.replace(arrivals[0].request(0), priority=-1)
    engine.submit(first, *(arrival.request(1 + at) for at, arrival in enumerate(arrivals[1:])))
    engine.run()
    finished = engine.heard["r0"].finished
    assert finished is not None
    assert finished.num_preemptions == 0
    assert finished.reason is not FinishReason.ABORT
