"""Reasoning is split off the start of an answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.answer.calls import CallReader, CallRules
from server.text.answer.forms import SYNTAXES
from server.text.answer.parts import PlainReader
from server.text.answer.thinking import ThinkingReader
from tests.support.text.answers import cut, read

CALL = '<tool_call>{"name":"f","arguments":{}}</tool_call>'
ANSWERS: list[tuple[str, bool, list[Any]]] = [
    ("<think>\nWhy?\n</think>\n\nBecause.", False, [("think", "Why?"), "Because."]),
    (" \n<think>a < b\n\nc</think>d </think>", False, [("think", "a < b\n\nc"), "d </think>"]),
    ("Why? </think> Because.", True, [("think", "Why?"), "Because."]),
    ("<think>a</think>b", True, [("think", "<think>a"), "b"]),
    ("<think></think>b", False, ["b"]),
    ("<think> \n</think>\n", False, []),
    ("<think>a </thi", False, [("think", "a </thi")]),
    ("\nHello <think>a</think>", False, ["\nHello <think>a</think>"]),
    (" <thin", False, [" <thin"]),
    (f"<think>a {CALL}</think>\n{CALL} b", False, [("think", f"a {CALL}"), ["f", "{}"], " b"]),
    (f"b {CALL}", False, ["b", ["f", "{}"]]),
]


def reader(is_open: bool = False, most: int | None = None) -> ThinkingReader:
    calls = CallReader(SYNTAXES["hermes"], CallRules(("f",), most=most))
    return ThinkingReader(calls, is_open)


@pytest.mark.parametrize(("text", "is_open", "expected"), ANSWERS)
def test_reasoning_comes_first_and_the_rest_is_read_on(
    text: str, is_open: bool, expected: list[Any]
) -> None:
    assert read(reader(is_open), [text]) == read(reader(is_open), text) == expected


FRAGMENTS = [*(text for text, _, _ in ANSWERS), "<think>", "</think>", " ", "\n", "<", "a"]


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join),
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
)
def test_how_a_text_is_split_does_not_matter(text: str, borders: list[int], is_open: bool) -> None:
    assert read(reader(is_open), cut(text, borders)) == read(reader(is_open), [text])


@pytest.mark.parametrize(
    ("text", "num_thought"),
    [("<think>ab</think> c", 17), ("<think>ab", 9), ("abc", 0), (" <think></think>", 16)],
)
def test_letters_of_the_reasoning_are_counted(text: str, num_thought: int) -> None:
    for pieces in ([text], text):
        found = ThinkingReader(PlainReader(), is_open=False)
        read(found, pieces)
        assert found.num_thought == num_thought


def test_the_end_counts_from_the_start_of_the_answer() -> None:
    for begin in ("<think>a</think>\n", "b ", ""):
        found = reader(most=1)
        read(found, [begin + CALL + CALL])
        assert found.end == len(begin) + CALL.index("</")
        assert found.has_called
