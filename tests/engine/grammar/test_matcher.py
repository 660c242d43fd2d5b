"""The masks of draft trees, against a brute-force reading of the grammar."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from llguidance import LLMatcher

from engine.grammar.compiler import GrammarCompiler, Mask, compute_mask
from engine.grammar.matcher import MOST_SECONDS, Matcher
from engine.request import Grammar, SamplingParams
from tests.support.drafts.scripted_proposer import random_parents
from tests.support.text.tiny_grammars import (
    EOS,
    TOKENS,
    TinyTokenizer,
    allowed,
    compiler,
    matching,
    text_of,
)

PATTERNS = [
    "(ab)*c",
    "a{2,5}b?",
    "(a|b)(ab|ba)*",
    "[a-c]*ca",
    '\\{"(a|bb)": ?[0-9]+\\}',
    "a|ab|abc",
]
NUM_WORDS = -(-len(TOKENS) // 32)
ids = TinyTokenizer()


@pytest.fixture(scope="module")
def compiled() -> GrammarCompiler:
    return compiler()


def follow(compiled: GrammarCompiler, pattern: str, **params: object) -> Matcher:
    settings = SamplingParams(**({"max_tokens": 9} | params))  # type: ignore[arg-type]
    start = compiled.compile(matching(pattern))
    return Matcher(start, len(TOKENS), frozenset({EOS}), settings)


def masks_of(matcher: Matcher, tokens: list[int], parents: list[int]) -> list[frozenset[int]]:
    out = np.zeros((len(tokens), NUM_WORDS), np.int32)
    matcher.fill(tokens, parents, out)
    bits = np.unpackbits(out.view(np.uint8), axis=1, bitorder="little")
    return [frozenset(np.flatnonzero(row[: len(TOKENS)]).tolist()) for row in bits]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_random_trees_are_those_of_brute_force(
    compiled: GrammarCompiler, pattern: str
) -> None:
    rng = random.Random(pattern)
    for _ in range(20):
        matcher, text = follow(compiled, pattern), ""
        while not matcher.complete and len(text) < 12:
            check_tree(matcher, pattern, text, rng)
            token = rng.choice(sorted(allowed(pattern, text) - {EOS}) or [EOS])
            assert matcher.take([token]) == 1
            text += text_of([token])
        assert matcher.complete == (allowed(pattern, text) <= {EOS})


def check_tree(
    matcher: Matcher, pattern: str, text: str, rng: random.Random
) -> list[frozenset[int]]:
    parents = random_parents(rng.randint(1, 9), rng, 5)
    texts: list[str | None] = [text]
    tokens = [0]
    for parent in parents[1:]:
        before = texts[parent]
        known = sorted(allowed(pattern, before)) if before is not None else []
        tokens.append(rng.choice(known) if known and rng.random() < 0.7 else rng.randrange(131))
        follows = tokens[-1] in known and tokens[-1] != EOS
        texts.append(before + text_of(tokens[-1:]) if follows and before is not None else None)
    masks = masks_of(matcher, tokens, parents)
    reached = [True]
    for node, parent in enumerate(parents[1:], 1):
        may_follow = tokens[node] in masks[parent] and tokens[node] != EOS
        reached.append(reached[parent] and may_follow)
    for node in (node for node, known in enumerate(reached) if known):
        known = allowed(pattern, str(texts[node]))
        # Where the text must go on in one way, only its first token is allowed.
        assert masks[node] == known or (len(masks[node]) == 1 and masks[node] < known)
    return masks


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_depends_on_nothing_but_the_tokens_before_it(
    compiled: GrammarCompiler, pattern: str
) -> None:
    rng = random.Random(pattern)
    for _ in range(10):
        matcher, taken = follow(compiled, pattern), []
        while not matcher.complete and len(taken) < 8:
            check_tree(matcher, pattern, text_of(taken), rng)
            fresh = follow(compiled, pattern)
            fresh.take(taken)
            (mask,) = masks_of(matcher, [0], [-1])
            assert masks_of(fresh, [0], [-1]) == [mask]
            taken.append(rng.choice(sorted(mask - {EOS}) or [EOS]))
            matcher.take(taken[-1:])


def test_nodes_that_cannot_be_reached_allow_everything(compiled: GrammarCompiler) -> None:
    a, b = TOKENS.index(b"a"), TOKENS.index(b"b")
    masks = masks_of(follow(compiled, "ab|ac"), [0, b, a, a], [-1, 0, 1, 0])
    assert len(masks[1]) == len(masks[2]) == len(TOKENS)
    assert masks[3] == {b, TOKENS.index(b"c")}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {"a", "ab", "aba", EOS}),
        ({"min_tokens": 1}, {"a", "ab", "aba", EOS}),
        ({"min_tokens": 2}, {"a", "ab", "aba"}),
        ({"ignore_eos": True}, {"a", "ab", "aba"}),
        ({"min_tokens": 2, "stop_token_ids": (TOKENS.index(b"a"),)}, {"ab", "aba"}),
    ],
)
def test_ends_that_are_not_wanted_yet_are_not_allowed(
    compiled: GrammarCompiler, params: dict[str, object], expected: set[object]
) -> None:
    matcher = follow(compiled, "a(a|b)*", **params)
    matcher.take([TOKENS.index(b"a")])
    (mask,) = masks_of(matcher, [0], [-1])
    names = {EOS if token == EOS else TOKENS[token].decode() for token in mask}
    assert names & {"a", "ab", "aba", EOS} == expected


def test_an_end_that_is_not_wanted_is_allowed_if_nothing_else_is(
    compiled: GrammarCompiler,
) -> None:
    matcher = follow(compiled, "ab|a", min_tokens=5, stop_token_ids=(TOKENS.index(b"b"),))
    matcher.take([TOKENS.index(b"a")])
    assert masks_of(matcher, [0], [-1]) == [{TOKENS.index(b"b"), EOS}]
    assert not matcher.complete
    assert matcher.take([TOKENS.index(b"b"), EOS]) == 1
    assert matcher.complete


def test_a_text_ends_where_nothing_may_follow(compiled: GrammarCompiler) -> None:
    a, b = TOKENS.index(b"a"), TOKENS.index(b"b")
    matcher = follow(compiled, "a+b")
    assert matcher.take([a, a, b, b, a]) == 3
    assert matcher.complete
    assert matcher.error is None


def test_forced_tokens_are_those_of_the_forced_text(compiled: GrammarCompiler) -> None:
    matcher = follow(compiled, 'xaba: (a|b)"')
    assert text_of(matcher.forced(99)) in ("xaba:", "xaba: ")
    assert matcher.forced(2) == matcher.forced(99)[:2]
    assert matcher.forced(0) == []


class Counting:
    """A matcher of llguidance that counts how often it looks for text that must follow."""

    def __init__(self, inner: LLMatcher) -> None:
        self.inner, self.asked = inner, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def compute_ff_tokens(self) -> list[int]:
        self.asked += 1
        return self.inner.compute_ff_tokens()


def test_a_long_text_that_must_follow_is_looked_for_once(compiled: GrammarCompiler) -> None:
    text = "xy" * 400
    matcher = follow(compiled, f"(a|b){text}")
    counting = matcher._matcher = Counting(matcher._matcher)  # type: ignore[assignment]
    assert matcher.take(ids("a")) == 1
    written = ""
    while not matcher.complete:
        taken = matcher.forced(7)
        assert matcher.take(taken) == len(taken) > 0
        written += text_of(taken)
    assert (written, counting.asked) == (text, 1)


def test_other_tokens_of_a_text_that_must_follow_are_no_error(compiled: GrammarCompiler) -> None:
    matcher, (ab,) = follow(compiled, "(c|d)abxx"), ids("ab")
    assert matcher.forced(9) == []
    matcher.take(ids("c"))
    assert matcher.forced(9)[0] == ab
    assert matcher.take(ids("a")) == 1
    assert text_of(matcher.forced(9)) == "bxx"


def test_looking_ahead_is_given_up_where_it_takes_long(
    compiled: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = follow(compiled, "xyz(a|b)xyz")
    times = iter((0.0, 2 * MOST_SECONDS))
    with monkeypatch.context() as patch:
        patch.setattr("engine.grammar.matcher.time.thread_time", lambda: next(times))
        first = matcher.forced(9)
    assert matcher.take([*first, *ids("a")]) == len(first) + 1
    assert matcher.forced(9) == []
    assert matcher.error is None


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json_schema", '{"not": {}}'), "not"),
        (Grammar("json_schema", '{"$ref": "#"}'), "no text matches"),
        (Grammar("json_schema", '{"enum": []}'), "anyOf is empty"),
        (Grammar("json_schema", "{"), "JSON"),
        (Grammar("json_schema", '{"$ref": "https://example.com/x"}'), "registry"),
        (Grammar("regex", "a(?=b)"), "look-around"),
        (Grammar("regex", ".*" * 400), "too complex|precomputation|limit"),
        (Grammar("regex", ""), "only the empty text"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("lark", "start: " + "(" * 500), "nested"),
        (Grammar("llguidance", "[]"), "expecting rule"),
        (Grammar("llguidance", '{"grammars": []}'), "empty grammars"),
    ],
)
def test_bad_grammars_say_why(compiled: GrammarCompiler, grammar: Grammar, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        compiled.compile(grammar)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


def test_a_call_that_computes_for_long_ends_the_text(
    compiled: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ambiguous grammars take longer with every token, and all other requests wait meanwhile."""
    matcher = follow(compiled, "(ab)*c")
    now = iter((0.0, 2 * MOST_SECONDS, 1.0, 1.0))
    monkeypatch.setattr("engine.grammar.matcher.time.thread_time", lambda: next(now))
    assert matcher.take(ids("a")) == 1
    assert matcher.error is not None
    assert "too ambiguous" in matcher.error
    assert matcher.take(ids("b")) == 0
    assert matcher.forced(9) == []
    assert masks_of(matcher, ids("a"), [-1]) == [frozenset(range(len(TOKENS)))]


def test_no_end_is_taken_after_an_error(
    compiled: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then llguidance allows nothing but the end, which would make a cut text look complete."""
    matcher = follow(compiled, "a*")
    failed = SimpleNamespace(is_error=lambda: True, get_error=lambda: "Too many items")
    monkeypatch.setattr(matcher, "_matcher", failed)
    assert matcher.take([EOS]) == 0
    assert matcher.error == "Too many items"


def test_an_error_on_a_drafted_path_is_no_error_of_the_text(
    compiled: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a,), (b,), (c,) = ids("a"), ids("b"), ids("c")
    matcher, usual = follow(compiled, "a(b|c)*"), follow(compiled, "a(b|c)*")
    assert matcher.take([a]) == usual.take([a]) == 1
    broken = iter((True,))  # at the root's first child; the mask of the root is known already

    def masked(inner: LLMatcher, out: Mask) -> None:
        compute_mask(inner, out)
        if next(broken, False):
            monkeypatch.setattr(matcher, "_matcher", SimpleNamespace(is_error=lambda: True))

    monkeypatch.setattr("engine.grammar.matcher.compute_mask", masked)
    tokens, parents = [a, b, c, b], [-1, 0, 0, 2]
    found = masks_of(matcher, tokens, parents)
    expected = masks_of(usual, tokens, parents)
    assert found[1] == frozenset(range(len(TOKENS)))
    assert (found[0], found[2:]) == (expected[0], expected[2:])
    assert matcher.error is None
    assert matcher.take([b, c]) == 2


def test_a_step_computes_no_mask_twice(
    compiled: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a text may end, taking tokens looks for the end once, and the next step uses that."""
    matcher, computed = follow(compiled, "[abc]*"), [0]

    def counted(of: LLMatcher, into: Mask) -> None:
        computed[0] += 1
        compute_mask(of, into)

    monkeypatch.setattr("engine.grammar.matcher.compute_mask", counted)
    for _ in range(2):
        assert matcher.take([*ids("a"), *ids("b"), *ids("c")]) == 3
        assert matcher.forced(3) == []
        masks_of(matcher, [0], [-1])
        masks_of(matcher, [0], [-1])
    assert computed == [2]
    complete = follow(compiled, "ab")
    assert complete.take([*ids("a"), *ids("b"), EOS]) == 2
    assert complete.complete
