"""Calls are found in every syntax, however the text is split; other text stays content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.answer.calls import CallReader, CallRules
from server.text.answer.forms import SYNTAXES
from server.text.answer.parts import CallArguments, CallBegin, Content
from tests.support.text.answers import cut, joined, read

NAMES = ("f", "get_weather", "a-b")
RULES = CallRules(NAMES)
F, G = ["f", "{}"], ["get_weather", '{"city": "Paris"}']
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA3 = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
PYTHON = 'get_weather(city="Paris")'
QUOTED = r'{"a": "} ] \" \\", "b": [{"c": {}}]}'

CALLS: list[tuple[str, str, list[Any]]] = [
    ("hermes", HERMES, [G]),
    ("hermes", f"\n{HERMES}\n", [G]),
    ("hermes", f"Well. \n{HERMES}\n{HERMES}", ["Well.", G, G]),
    ("hermes", f"{HERMES}\n\nDone", [G, "\n\nDone"]),
    ("hermes", '<tool_call>{"name":"f"}</tool_call>', [F]),
    ("hermes", '<tool_call>{"name":"f","arguments":null}</tool_call>x', [F, "x"]),
    ("hermes", '<tool_call>{"type":"function","name":"f","parameters":{}}', [F]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":1}</tool_call>x', [["f", '{"a":1}'], "x"]),
    ("hermes", f'<tool_call>{{"name":"f","arguments":{QUOTED}, "a": "}}"}}', [["f", QUOTED]]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a": </tool_call>', [["f", '{"a": ']]),
    ("hermes", f"<tool_call><tool_call> {HERMES}", ["<tool_call><tool_call>", G]),
    ("hermes", f"a <tool_call {HERMES} < b <", ["a <tool_call", G, " < b <"]),
    ("llama3_json", LLAMA3, [G]),
    ("llama3_json", f" {LLAMA3}; {LLAMA3};\n", [G, G]),
    ("llama3_json", f"<|python_tag|>{LLAMA3}", [G]),
    ("llama3_json", f"So: <|python_tag|> {LLAMA3}", ["So:", G]),
    ("llama3_json", f"<|python_start|>{LLAMA3}<|python_end|> {LLAMA3}", [G, G]),
    ("llama3_json", f"So:\n{LLAMA3} and more; yes", ["So:", G, " and more; yes"]),
    ("llama3_json", f"{LLAMA3}; so", [G, "; so"]),
    ("llama3_json", '{"name": "f", "arguments": {}}', [F]),
    ("llama4_pythonic", f"[{PYTHON}]", [G]),
    ("llama4_pythonic", f"[f(), {PYTHON} , f( )]\n", [F, G, F]),
    ("llama4_pythonic", f"<|python_start|>[{PYTHON}]<|python_end|>", [G]),
    ("llama4_pythonic", f"Well:\n[{PYTHON}] x", ["Well:", G, " x"]),
    ("llama4_pythonic", "[f(a=1)", [["f", '{"a": 1}']]),
    ("llama4_pythonic", "[f(a=1", [["f", '{"a": ']]),
    ("llama4_pythonic", "[f(), g()]", [F, ", g()]"]),
    ("llama4_pythonic", "[f(a=b)]", [["f", '{"a": '], "b)]"]),
]  # fmt: skip

SPACED = [
    ("hermes", ""),
    ("hermes", HERMES),
    ("hermes", HERMES.removesuffix("</tool_call>")),
    ("llama3_json", '{"name": "f", "parameters": {}'),
    ("llama4_pythonic", f"[{PYTHON}]"),
]

NO_CALLS: list[tuple[str, str]] = [
    ("hermes", "<tool_call>{'name': 'f'}</tool_call>"),
    ("hermes", '<tool_call>{"name": "g", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}, "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": []}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": nul}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f"'),
    ("hermes", LLAMA3),
    ("llama3_json", f"as in {LLAMA3}"),
    ("llama3_json", '{"name": "Ada", "parameters": {}}'),
    ("llama3_json", '{"type": "cat", "name": "f"}'),
    ("llama3_json", '{"a": 1}\n{\n{{"name"'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", "{" + " " * 100),
    ("llama4_pythonic", "[1, 2] and [f] and f(a=1)"),
    ("llama4_pythonic", "[g(a=1)]"),
    ("llama4_pythonic", "[f(1)]"),
    ("llama4_pythonic", "[f(a, b)]"),
]


def reader(name: str, rules: CallRules = RULES) -> CallReader:
    return CallReader(SYNTAXES[name], rules)


@pytest.mark.parametrize(("name", "text", "expected"), CALLS)
def test_calls_are_found_in_every_syntax(name: str, text: str, expected: list[Any]) -> None:
    assert read(reader(name), [text]) == read(reader(name), text) == expected


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_text_that_is_no_call_stays_as_it_is(name: str, text: str) -> None:
    assert read(reader(name), [text]) == read(reader(name), text) == [text]


FRAGMENTS = [
    *(text for _, text, _ in CALLS), *(text for _, text in NO_CALLS),
    "\n", " ", "{", "[", "f(", "<",
    '"', "\\", ")", "]", "}", ";", ",", "=", "'", "</tool_call>", '{"name": "f",',
    '"arguments": {', "é",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 1000), max_size=12), st.sampled_from(list(SYNTAXES)))
def test_how_a_text_is_split_does_not_matter(text: str, borders: list[int], name: str) -> None:
    whole = read(reader(name), [text])
    assert read(reader(name), cut(text, borders)) == whole
    if not any(isinstance(part, list) for part in whole):
        assert "".join(whole) == text


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("text", ["A < b, {c} and [d].", "Hello", "a\nb "])
def test_content_is_held_back_only_while_it_may_become_a_call(name: str, text: str) -> None:
    found = reader(name)
    for length in range(1, len(text) + 1):
        sent = joined(found.feed(text[length - 1]))
        assert sent or text[length - 1] in " \n<{["


def test_a_call_is_sent_as_it_comes() -> None:
    found = reader("hermes")
    sent = [part for letter in HERMES for part in found.feed(letter)]
    assert sent[0] == CallBegin("get_weather")
    assert sent[1:] == [CallArguments(letter) for letter in '{"city": "Paris"}']
    python = reader("llama4_pythonic")
    assert joined(python.feed("[f(a='lo")) == [["f", '{"a": "lo']]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "llama4_pythonic"])
def test_an_answer_ends_after_the_last_call_that_is_allowed(name: str) -> None:
    text = {"hermes": HERMES * 2, "llama3_json": f"{LLAMA3}; {LLAMA3}"}.get(name, "[f(), f()]")
    found = reader(name, CallRules(NAMES, most=1))
    assert len(read(found, text)) == 1
    assert found.has_called
    assert found.end is not None
    assert text[found.end - 1] in "})"


@pytest.mark.parametrize(
    ("name", "text", "called"),
    [
        ("hermes", HERMES[:-14], True),  # without its last brace
        ("hermes", HERMES[:-16], False),
        ("hermes", f"{HERMES}{HERMES[:-20]}", False),
        ("hermes", '<tool_call>{"name":"f","arguments":{"a": </tool_call>', True),
        ("llama3_json", LLAMA3[:-1], True),
        ("llama3_json", '{"name": "f", "parameters": {"a": "}', False),
        ("llama4_pythonic", f"[{PYTHON}", True),
        ("llama4_pythonic", "[f(a=1", False),
        ("llama4_pythonic", "[f(a=b)]", True),
        ("hermes", "no call", False),
    ],
)
def test_a_call_is_made_once_its_arguments_are_complete(name: str, text: str, called: bool) -> None:
    found = reader(name)
    read(found, text)
    assert found.has_called is called


@pytest.mark.parametrize(
    ("name", "text", "must_call", "content"),
    [
        ("hermes", HERMES[:20], False, ""),
        ("hermes", f"So:\n{HERMES[:20]}", False, "So:"),
        ("hermes", HERMES[:6], False, HERMES[:6]),
        ("hermes", HERMES[:6], True, ""),
        ("llama3_json", LLAMA3[:12], False, LLAMA3[:12]),
        ("llama3_json", LLAMA3[:12], True, ""),
        ("llama3_json", f"<|python_tag|>{LLAMA3[:12]}", False, ""),
        ("llama4_pythonic", "[f(", True, ""),
    ],
)
def test_a_call_that_is_cut_before_its_arguments_is_no_content(
    name: str, text: str, must_call: bool, content: str
) -> None:
    found = reader(name, CallRules(NAMES, must_call=must_call))
    parts = [*found.feed(text), *found.finish(cut=True)]
    assert "".join(part.text for part in parts if isinstance(part, Content)) == content
    assert not found.has_called


def test_special_tokens_that_begin_no_call_are_no_content() -> None:
    rules = CallRules(NAMES, hidden=frozenset(["<|python_tag|>"]))
    assert read(reader("llama3_json", rules), ["a <|python_tag|>print"]) == ["a print"]


LITERALS = [
    ("1", "1"), ("-1.5e3", "-1.5e3"), ("1_000", "1000"), ("0x10", "16"), (".5", "0.5"),
    ("True", "true"), ("None", "null"), ("false", "false"), ("[1, 'a',]", '[1, "a"]'),
    ("[]", "[]"), ("{'a': {\"b\": [1]}}", '{"a": {"b": [1]}}'), ("'it''s'", None),
    (r"'\'\n\x41\u00e9\\'", '"' + "'" + r'\nA\u00e9\\"'), (r"'\ud83d'", r'"\ud83d"'),
    (r"'\d'", r'"\\d"'), ("'a\\\nb'", '"ab"'), ("'\n'", r'"\n"'), ('"日"', '"日"'),
    ("nan", None), ("1e999", "1e999"), ("x", None), ("{1: 2}", None), ("(1, 2)", None),
    ("[1 2]", None), ("[" * 100, None), (r"'\xzz'", r'"\\zz"'),
]  # fmt: skip


@pytest.mark.parametrize(("literal", "expected"), LITERALS)
def test_python_values_become_json(literal: str, expected: str | None) -> None:
    (name, arguments), *rest = read(reader("llama4_pythonic"), f"[f(a={literal})]")
    assert name == "f"
    if expected is None:
        assert rest
        return
    assert arguments == f'{{"a": {expected}}}'
    assert not rest
    assert "a" in json.loads(arguments)


LETTERS = st.text("aé日😀'\"\\\n\0 }", max_size=4)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(PLAIN)
def test_what_python_writes_is_read_as_the_same_value(value: Any) -> None:
    ((_, arguments),) = read(reader("llama4_pythonic"), f"[f(a={value!r})]")
    assert json.loads(arguments) == {"a": value}


def test_long_answers_take_time_in_proportion() -> None:
    found = reader("llama3_json")
    text = '{"name": "f"' * 4_000 + " " * 4_000
    assert read(found, [text]) == [text]
    assert joined([Content("a"), Content("b")]) == ["ab"]


@pytest.mark.parametrize(("name", "begin"), SPACED)
def test_much_space_takes_time_in_proportion(name: str, begin: str) -> None:
    """Each letter once: all that is held back is not looked at again for each."""
    space = " " * 100_000
    written = "".join(
        part if isinstance(part, str) else "" for part in read(reader(name), [begin + space])
    )
    assert written in (begin + space, "")
