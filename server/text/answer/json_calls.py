"""Calls written as JSON objects: {"name": "f", "parameters": {...}}."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

from server.text.answer.calls import Attempt, CallSink, NotACall
from server.text.answer.scanner import SPACE

ARGUMENTS = ("arguments", "parameters")
MAX_STRING = 64  # letters of a key or a name
MAX_SPACE = 64  # letters between two signs in front of the arguments
Letter = Generator[None, str, str]


def after_space() -> Letter:
    """The next letter that is no space."""
    for _ in range(MAX_SPACE):
        letter = yield
        if letter not in SPACE:
            return letter
    raise NotACall


def expect(wanted: str) -> Generator[None, str, None]:
    """Skip space and then exactly this letter."""
    if (yield from after_space()) != wanted:
        raise NotACall


def closing(back: str, mark: str) -> Attempt:
    """Skip space and then `mark`, if it comes; give back anything else. `back` was read already."""
    space: list[str] = []  # there may be very much
    while (rest := back.lstrip()) != mark:
        space.append(back[: len(back) - len(rest)])
        if not mark.startswith(rest):
            return "".join(space) + rest
        back = rest + (yield)
    return ""


def json_call(sink: CallSink) -> Attempt:
    """A call of which the brace is read already. Its name must come before its arguments."""
    name, letter = yield from _head(sink)
    if letter == "}" or letter == "n":
        if letter == "n":
            yield from _rest_of("null")
        sink.begin(name)
        sink.write("{}")
        sink.end_arguments()
        back = "" if letter == "}" else (yield from _tail())
    elif letter == "{":
        sink.begin(name)
        sink.write("{")
        back = yield from _object(sink)
        if not back:
            sink.end_arguments()
            back = yield from _tail()
    else:
        raise NotACall
    sink.complete()
    return back


def _head(sink: CallSink) -> Generator[None, str, tuple[str, str]]:
    """The name, and the first letter of the arguments, or the brace that ends a call without."""
    name: str | None = None
    while True:
        key = yield from _string((yield from after_space()))
        yield from expect(":")
        letter = yield from after_space()
        if key in ARGUMENTS and name is not None:
            return name, letter
        value = yield from _string(letter)
        if key == "name" and sink.known(value):
            name = value
        elif (key, value) != ("type", "function"):
            raise NotACall
        letter = yield from after_space()
        if letter == "}" and name is not None:
            return name, letter
        if letter != ",":
            raise NotACall


def _string(quote: str) -> Letter:
    """A short string without escapes, of which the quote is read already."""
    if quote != '"':
        raise NotACall
    text = ""
    while (letter := (yield)) != '"':
        text += letter
        if letter in "\\\n" or len(text) > MAX_STRING:
            raise NotACall
    return text


def _rest_of(word: str) -> Generator[None, str, None]:
    for wanted in word[1:]:
        if (yield) != wanted:
            raise NotACall


def json_text(name: str, key: str, arguments: Any) -> str:
    """A call as JSON. Text that could not be read as arguments stays as it is."""
    is_text = isinstance(arguments, str)
    text = arguments if is_text else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(name)}, "{key}": {text}}}'


class _Nesting:
    """Follows braces, brackets and strings of a JSON object after its first brace."""

    def __init__(self) -> None:
        self.depth = 1
        self.quoted = False
        self._escaped = False

    def take(self, letter: str) -> None:
        if self.quoted:
            self.quoted = self._escaped or letter != '"'
            self._escaped = letter == "\\" and not self._escaped
        elif letter == '"':
            self.quoted = True
        else:
            self.depth += (letter in "{[") - (letter in "}]")


def _object(sink: CallSink) -> Attempt:
    """Hand on an object, of which the brace is read already, exactly as it is written."""
    nesting = _Nesting()
    while nesting.depth:
        letter = yield
        if letter == "<" and not nesting.quoted:
            return letter  # no JSON: perhaps the mark that ends the call
        nesting.take(letter)
        sink.write(letter)
    return ""


def _tail() -> Attempt:
    """Skip what follows the arguments: members that mean nothing, and the brace."""
    nesting, space = _Nesting(), list[str]()
    while (letter := (yield)).isspace():
        space.append(letter)
    if letter not in ",}":
        return "".join(space) + letter
    nesting.take(letter)
    while nesting.depth:
        nesting.take((yield))
    return ""
