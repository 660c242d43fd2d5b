"""Stop strings: found at any offset, however the text is split."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.output.stop import StopStringMatcher


def by_brute_force(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Check ever longer prefixes of the text until one ends in a stop string."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(
    text: str, stops: tuple[str, ...], include: bool, cuts: tuple[int, ...]
) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops, include)
    emitted = ""
    for begin, end in itertools.pairwise([0, *cuts, len(text)]):
        scan = matcher.feed(text[begin:end])
        emitted += scan.text
        if scan.stop is not None:
            assert matcher.flush() == ""
            return emitted, scan.stop
    return emitted + matcher.flush(), None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("offset", range(6))
@pytest.mark.parametrize("stop", ["|", "##", "abc", "日本", "xx😀"])
def test_a_stop_string_is_found_at_every_offset_in_every_split(
    stop: str, offset: int, include: bool
) -> None:
    text = "......"[:offset] + stop + "...."
    expected = "......"[:offset] + (stop if include else "")
    for count in range(3):
        for cuts in itertools.combinations(range(len(text) + 1), count):
            assert feed(text, (stop,), include, cuts) == (expected, stop)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("three", "two"), ("one ", "two")),  # the first completed
        ("a<end>", ("<end>", "end>"), ("a", "<end>")),  # together: the longest
        ("a<end>", ("end>", "<end>"), ("a", "<end>")),
        ("abcd", ("bc", "abcd"), ("a", "bc")),  # the shorter is completed first
        ("abab!", ("abab!", "ab?"), ("", "abab!")),
        ("aaab", ("aab",), ("a", "aab")),  # falls back inside itself
        ("ababac", ("abac",), ("ab", "abac")),
        ("aabaabaaab", ("aabaaab",), ("aab", "aabaaab")),
        ("stopstop", ("stop", "stop"), ("", "stop")),
        ("nothing here", ("xyz",), ("nothing here", None)),
        ("ends in sto", ("stop",), ("ends in sto", None)),
        ("", ("stop",), ("", None)),
        ("anything", (), ("anything", None)),
        ("Stop", ("stop",), ("Stop", None)),
        ("two\n\nlines", ("\n\n",), ("two", "\n\n")),
    ],
)
def test_the_stop_that_is_completed_first_ends_the_text(
    text: str, stops: tuple[str, ...], expected: tuple[str, str | None]
) -> None:
    assert by_brute_force(text, stops, False) == expected
    assert feed(text, stops, False, ()) == expected
    assert feed(text, stops, False, tuple(range(1, len(text)))) == expected


LETTERS = st.text("ab", max_size=24)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4).map(tuple)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(LETTERS, STOPS, st.booleans(), st.data())
def test_any_text_in_any_split_equals_brute_force(
    text: str, stops: tuple[str, ...], include: bool, data: st.DataObject
) -> None:
    cuts = tuple(sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6))))
    assert feed(text, stops, include, cuts) == by_brute_force(text, stops, include)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(LETTERS, STOPS, st.booleans(), st.integers(0, 24))
def test_strings_completed_by_unarmed_text_do_not_count(
    text: str, stops: tuple[str, ...], include: bool, armed_from: int
) -> None:
    matcher, emitted, found = StopStringMatcher(stops, include), "", None
    for at, letter in enumerate(text):
        scan = matcher.feed(letter, armed=at >= armed_from)
        emitted, found = emitted + scan.text, scan.stop
        if found is not None:
            break
    hits = {
        end: [stop for stop in stops if text[:end].endswith(stop)] for end in range(len(text) + 1)
    }
    end = next((end for end in hits if end > armed_from and hits[end]), None)
    if end is None:
        assert (emitted + matcher.flush(), found) == (text, None)
    else:
        stop = max(hits[end], key=len)
        assert (emitted, found) == (text[: end if include else end - len(stop)], stop)


def test_only_what_could_begin_a_stop_is_held_back() -> None:
    matcher = StopStringMatcher(("<end>", "enough"))
    pieces = ["well ", "<", "en", "d", "less> ", "en", "d"]
    assert [matcher.feed(piece).text for piece in pieces] == [
        *("well ", "", "", "", "<endless> ", "", "end")
    ]
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopStringMatcher(("stop", ""))


def test_a_long_run_of_near_misses_is_emitted_whole() -> None:
    stop = "a" * 500 + "b"
    text = "a" * 20_000
    assert feed(text, (stop,), False, tuple(range(1, len(text)))) == (text, None)
