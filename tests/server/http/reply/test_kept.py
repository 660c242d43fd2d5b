"""Answers kept in memory: who sees them, and which are forgotten."""

from __future__ import annotations

import pytest

from server.http.reply.kept import OVERHEAD, Kept, KeptAnswers


def answer(before: str | None = None, owner: str = "", size: int = 0) -> Kept:
    return Kept(owner, before, b"", b"x" * size)


def test_answers_go_before_those_that_they_follow() -> None:
    kept = KeptAnswers(3, 10**9)
    kept.put("a", answer())
    kept.put("b", answer("a"))
    kept.put("other", answer())
    assert kept.get("", "b") is not None
    kept.put("new", answer())
    assert kept.get("", "other") is None
    assert [one.before for one in kept.line("", "b")] == [None, "a"]
    kept.put("newer", answer())
    assert kept.get("", "new") is None
    kept.put("newest", answer())
    assert (kept.get("", "b"), kept.get("", "a") is not None) == (None, True)


def test_a_line_without_one_of_its_answers_names_it() -> None:
    kept = KeptAnswers(2, 10**9)
    for id, before in (("a", None), ("b", "a"), ("c", "b")):
        kept.put(id, answer(before))
    assert kept.get("", "c") is not None, "what was just made is there, even if its line is long"
    with pytest.raises(KeyError, match="b"):
        kept.line("", "c")


def test_bytes_are_bounded_and_counted() -> None:
    kept = KeptAnswers(100, 3 * OVERHEAD)
    kept.put("large", answer(size=3 * OVERHEAD))
    assert len(kept) == 0
    for id in "abc":
        kept.put(id, answer(size=OVERHEAD // 2))
    assert (len(kept), kept.num_bytes) == (2, 3 * OVERHEAD)
    kept.put("c", answer(size=0))
    assert (len(kept), kept.num_bytes) == (2, 2.5 * OVERHEAD)
    assert kept.remove("", "b")
    assert not kept.remove("", "b")
    assert (len(kept), kept.num_bytes) == (1, OVERHEAD)


def test_an_answer_that_is_being_made_stays() -> None:
    making = {"a", "large"}
    kept = KeptAnswers(2, 3 * OVERHEAD, making.__contains__)
    for id in "abc":
        kept.put(id, answer())
    assert [id for id in "abc" if kept.get("", id)] == ["a", "c"]
    kept.put("large", answer(size=9 * OVERHEAD))
    assert kept.get("", "large") is not None
    assert kept.get("", "a") is not None
    making.clear()
    kept.put("d", answer())
    assert (len(kept), kept.num_bytes) == (2, 2 * OVERHEAD)
    making.add("e")
    kept.put("e", answer(size=9 * OVERHEAD))
    making.clear()
    kept.ended("e")
    assert (len(kept), kept.num_bytes) == (0, 0)
    kept.ended("e")


def test_only_its_owner_sees_an_answer() -> None:
    kept = KeptAnswers(9, 10**9)
    kept.put("a", answer(owner="one"))
    kept.put("b", answer("a", owner="two"))
    assert (kept.get("two", "a"), kept.remove("two", "a")) == (None, False)
    with pytest.raises(KeyError, match="a"):
        kept.line("two", "b")
    assert not KeptAnswers(0, 1).is_open
