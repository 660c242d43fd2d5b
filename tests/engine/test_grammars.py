"""Requests with grammars: their texts match, and are those of plain decoding whatever the drafts,
the batch and the memory."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import regex

from engine.completion import Completion
from engine.core import EngineCore
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.grammars import Grammars
from engine.grammar.matcher import Matcher
from engine.messages import Abort, ErrorCode, Submit
from engine.models.llama import Llama
from engine.request import FinishReason, Grammar, Request
from engine.speculation.planner import FixedPlanner, Planner
from engine.step.shape import chain
from server.assembly.drafting import Drafting
from tests.support.drafts.scripted_proposer import (
    DYNAMIC,
    TREES,
    CyclingPlanner,
    Script,
    ScriptedProposer,
)
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine
from tests.support.text.tiny_grammars import (
    EOS,
    TOKENS,
    allowed,
    compiler,
    grammars,
    matching,
    text_of,
)
from tests.support.waiting import DEADLINE

VOCAB = 131
WORDS = r"[a-c]{3,30} (ab|ba|c)*"
NAMES = r'\{"name": "[a-z]{1,12}", "age": [0-9]{1,3}(, "ok": (true|false))?\}'
ENDLESS = "(ab|c)*"
NAMED = (TOKENS.index(b"b"), TOKENS.index(b"ab"), TOKENS.index(b"}"))
FEW = tuple(TOKENS.index(token) for token in (b"a", b"b", b"c", b"ab", b" "))
BAD = (FEW[:1], (FEW[1], FEW[2]), (FEW[2], FEW[1], FEW[3]))
# Free text, but after "ab" follow two digits and "c".
TRIGGERED = r"""start: part* TEXT
TEXT: /(.|\n)*/
part: begin rest
begin[lazy]: /(.|\n)*ab/
rest: /[0-9]{2}c/"""
SETTINGS: dict[str, dict[str, object]] = {
    "words": {"pattern": WORDS},
    "names": {"pattern": NAMES},
    "names-greedy": {"pattern": NAMES, "temperature": 0.0},
    "free": {},
    "endless": {"pattern": ENDLESS, "max_tokens": 20},
    "ends-late": {"pattern": ENDLESS, "min_tokens": 6, "logit_bias": {EOS: 30.0}},
    "goes-on": {"pattern": ENDLESS, "ignore_eos": True, "logit_bias": {EOS: 30.0}},
    "scored": {"pattern": WORDS, "logprobs": 2, "temperature": 0.7},
    "filtered": {"pattern": NAMES, "top_k": 3, "top_p": 0.9, "min_p": 0.02},
    "penalised": {"pattern": WORDS, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    "stops": {"pattern": WORDS, "stop_token_ids": (TOKENS.index(b"c"),), "min_tokens": 4},
    "triggered": {
        "grammar": Grammar("lark", TRIGGERED),
        "logit_bias": {TOKENS.index(b"ab"): 9.0, TOKENS.index(b"aba"): 9.0},
    },
    "free-penalised": {"frequency_penalty": 0.5, "logprobs": 1},
    "named": {"pattern": WORDS, "logprobs": 0, "logprob_token_ids": NAMED},
    "few": {"allowed_token_ids": (*FEW, EOS), "bad_words": BAD, "min_tokens": 5},
    "few-words": {"pattern": WORDS, "allowed_token_ids": FEW, "bad_words": BAD},
    "no-words": {"bad_words": BAD, "logit_bias": dict.fromkeys(FEW, 12.0), "logprobs": 1},
}


def table() -> list[Request]:
    requests = []
    for at, (name, settings) in enumerate(SETTINGS.items()):
        rng = random.Random(at)
        pattern = settings.get("pattern")
        known = {key: value for key, value in settings.items() if key != "pattern"}
        params: dict[str, object] = {"max_tokens": 40, "temperature": 1.0, "seed": at, **known}
        if pattern is not None:
            params["grammar"] = matching(str(pattern))
        requests.append(ask(name, rng.choices(range(3, VOCAB), k=4 + 5 * at), **params))
    return requests


@pytest.fixture(scope="module")
def engine(tiny_engine: TinyEngine) -> TinyEngine:
    return replace(tiny_engine, grammars=grammars, max_num_batched_tokens=1100)


@pytest.fixture(scope="module")
def plain(engine: TinyEngine) -> dict[str, Completion]:
    return generate(engine.build(), table())


def speculating(engine: TinyEngine, plain: dict[str, Completion], planner: Planner) -> EngineCore:
    scripts = {
        request.params.seed: Script(request.prompt_ids + plain[request.request_id].token_ids)
        for request in table()
    }
    proposer = ScriptedProposer(scripts, 0.7, VOCAB, engine.max_model_len)
    return replace(engine, drafting=Drafting(proposer, planner)).build()


def test_every_token_is_one_that_the_grammar_allows(plain: dict[str, Completion]) -> None:
    for request in table():
        pattern, heard = SETTINGS[request.request_id].get("pattern"), plain[request.request_id]
        if pattern is None:
            continue
        for end, token in enumerate(heard.token_ids):
            assert token in allowed(str(pattern), text_of(heard.token_ids[:end]))


def test_texts_end_where_their_grammar_says(plain: dict[str, Completion]) -> None:
    reasons = {name: heard.finished.reason for name, heard in plain.items() if heard.finished}
    complete = ("names", "names-greedy", "filtered", "stops", "ends-late")
    assert {reasons[name] for name in complete} == {FinishReason.STOP}
    assert reasons["goes-on"] == FinishReason.LENGTH
    assert EOS not in plain["names"].token_ids  # "}" ends the text
    assert plain["ends-late"].token_ids[-1] == EOS
    assert len(plain["ends-late"].token_ids) == 7


def test_after_a_trigger_the_text_is_not_free(plain: dict[str, Completion]) -> None:
    text = text_of(plain["triggered"].token_ids)
    found = re.findall("ab(.{3})", text)
    assert len(found) > 1
    assert all(re.fullmatch("[0-9]{2}c", rest) for rest in found)


def test_log_probabilities_are_those_among_allowed_tokens(plain: dict[str, Completion]) -> None:
    heard = plain["scored"]
    for end, entry in enumerate(heard.logprobs):
        known = allowed(WORDS, text_of(heard.token_ids[:end]))
        assert -20 < entry.logprob <= 0
        finite = [token for token, value in entry.top if value > -1e30]
        assert set(finite) <= known
        assert len(finite) == min(2, len(known))


def test_named_tokens_that_may_not_follow_have_no_probability(
    plain: dict[str, Completion],
) -> None:
    heard = plain["named"]
    for end, entry in enumerate(heard.logprobs):
        known = allowed(WORDS, text_of(heard.token_ids[:end]))
        values = dict(entry.top)
        assert tuple(values) == NAMED
        assert {token for token in NAMED if values[token] > -1e30} == known.intersection(NAMED)
        assert values.get(entry.token_id, entry.logprob) == entry.logprob


def test_tokens_that_rules_forbid_are_not_drawn(plain: dict[str, Completion]) -> None:
    for name in ("few", "few-words", "no-words"):
        token_ids = plain[name].token_ids
        assert name == "no-words" or set(token_ids) <= {*FEW, EOS}, name
        assert len(token_ids) >= 5, name
        for bad in BAD:
            ends = range(len(bad), len(token_ids) + 1)
            assert all(tuple(token_ids[end - len(bad) : end]) != bad for end in ends), name
    assert regex.fullmatch(WORDS, text_of(plain["few-words"].token_ids), partial=True)
    assert len(set(plain["no-words"].token_ids) & set(FEW)) > 2  # likely but for the rules


@pytest.mark.parametrize(
    ("planner", "changes"),
    [
        (FixedPlanner(chain(5)), {}),
        (FixedPlanner(TREES[4]), {}),
        (FixedPlanner(DYNAMIC[0]), {"lookup": True}),
        (CyclingPlanner((TREES[2], chain(3), DYNAMIC[0])), {"num_blocks": 8}),
        (FixedPlanner(TREES[1]), {"max_num_batched_tokens": 17, "max_num_seqs": 3}),
    ],
)
def test_drafts_batches_and_preemption_do_not_change_texts(
    engine: TinyEngine,
    plain: dict[str, Completion],
    planner: Planner,
    changes: dict[str, object],
) -> None:
    core = speculating(replace(engine, **changes), plain, planner)  # type: ignore[arg-type]
    heard = generate(core, table(), per_step=3)
    for name, record in heard.items():
        assert record.token_ids == plain[name].token_ids, name
        assert record.finished is not None
        assert record.finished.reason == plain[name].finished.reason, name  # type: ignore[union-attr]
    assert core.stats().num_accepted_tokens > 0


@pytest.mark.parametrize("run_ahead", [False, True])
def test_forced_text_is_drafted_without_a_head(
    engine: TinyEngine, plain: dict[str, Completion], run_ahead: bool
) -> None:
    """Also in padded steps; while a row has a grammar, none runs ahead."""
    core = replace(engine, padded=True, run_ahead=run_ahead).build()
    heard = generate(core, table())
    for name, record in heard.items():
        assert record.token_ids == plain[name].token_ids, name
    end = heard["names"].finished
    assert end is not None
    assert end.num_accepted >= len('{"name": "') // 2
    assert end.num_accepted == end.num_drafted


@pytest.mark.parametrize("padded", [False, True])
def test_padded_steps_make_masks_after_the_target_was_started(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    """On a GPU it then runs meanwhile; with exact sizes, masks first cut what it computes."""
    order: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            order.append(name)
            return function(*given)

        return call

    monkeypatch.setattr(Matcher, "fill", noted("masks", Matcher.fill))
    monkeypatch.setattr(Llama, "forward", noted("target", Llama.forward))
    core = replace(engine, padded=padded, run_ahead=False).build()
    generate(core, [ask("names", [5, 6], grammar=matching(NAMES), max_tokens=12)])
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert set(pairs) == {("target", "masks") if padded else ("masks", "target")}


def test_alone_a_request_gets_the_same_text(
    engine: TinyEngine, plain: dict[str, Completion]
) -> None:
    core = engine.build()
    for request in table()[:4]:
        heard = generate(core, [request])
        assert heard[request.request_id].token_ids == plain[request.request_id].token_ids


def test_a_grammar_that_cannot_be_used_ends_its_requests_only(engine: TinyEngine) -> None:
    bad = ask("bad", [5, 6], grammar=Grammar("json_schema", '{"not": {}}'))
    core = engine.build()
    heard = generate(core, [bad, ask("good", [5, 6])])
    end = heard["bad"].finished
    assert end is not None
    assert (end.reason, end.error_code) == (FinishReason.ERROR, ErrorCode.INVALID)
    assert "not" in str(end.error)
    assert heard["good"].finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]


def test_without_a_tokenizer_grammars_are_refused(tiny_engine: TinyEngine) -> None:
    end = generate(tiny_engine.build(), [ask("x", [5], grammar=matching("a"))])["x"].finished
    assert end is not None
    assert (end.error_code, "tokenizer" in str(end.error)) == (ErrorCode.INVALID, True)


def test_requests_can_end_while_their_grammar_is_compiled(engine: TinyEngine) -> None:
    core = engine.build()
    asked = ask("gone", [5, 6], grammar=matching(WORDS))
    core.add(Submit(asked))
    core.add(Abort("gone"))
    heard = Completion()
    while core.has_work():
        for event in core.step()[:-1]:
            heard.take(event)  # type: ignore[arg-type]
    assert heard.finished is not None
    assert heard.finished.reason is FinishReason.ABORT
    core.add(Submit(msgspec.structs.replace(asked, request_id="left")))
    ends = core.abort_all("the end")
    assert [(end.request_id, end.reason) for end in ends] == [  # type: ignore[union-attr]
        ("left", FinishReason.ERROR)
    ]
    assert not core.has_work()


def test_a_grammar_that_is_being_compiled_delays_no_other_request(engine: TinyEngine) -> None:
    ready = threading.Event()

    def slow() -> GrammarCompiler:
        assert ready.wait(DEADLINE)
        return compiler()

    core = replace(engine, grammars=lambda: Grammars(slow, frozenset({EOS}))).build()
    core.add(Submit(ask("slow", [5, 6], grammar=matching("ab"))))
    core.add(Submit(ask("plain", [5, 6])))
    heard = {"slow": Completion(), "plain": Completion()}
    while heard["plain"].finished is None:
        step(core, heard)
    assert heard["slow"].finished is None
    ready.set()
    while core.has_work():
        step(core, heard)
    assert text_of(heard["slow"].token_ids) == "ab"


def step(core: EngineCore, heard: dict[str, Completion]) -> None:
    for event in core.step()[:-1]:
        heard[event.request_id].take(event)  # type: ignore[union-attr, arg-type]


def test_a_grammar_that_fails_in_the_middle_ends_its_request_only(
    engine: TinyEngine, plain: dict[str, Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = property(lambda matcher: "too complex" if len(matcher._taken) >= 3 else None)
    monkeypatch.setattr(Matcher, "error", failing)
    heard = generate(engine.build(), table())
    end = heard["words"].finished
    assert end is not None
    assert (end.reason, end.error_code) == (FinishReason.ERROR, ErrorCode.INVALID)
    assert end.error == "the text cannot go on as its grammar says: too complex"
    assert heard["words"].token_ids == plain["words"].token_ids[:3]
    assert heard["free"].token_ids == plain["free"].token_ids
