"""Calls as Llama 4 and Llama 3.2 write them in Python: [f(a=1), g(b="x")]. Their arguments are
handed on as JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Generator, Sequence
from typing import Any

from server.text.answer.calls import Attempt, CallSink, NotACall
from server.text.answer.json_calls import Letter, after_space, closing, expect
from server.text.answer.scanner import SPACE

CLOSE = "<|python_end|>"
MAX_NAME = 64  # letters
MAX_NUMBER = 4096  # letters
MAX_DEPTH = 64
WORDS = {
    "True": "true", "False": "false", "None": "null",
    "true": "true", "false": "false", "null": "null",
}  # fmt: skip
NAME = re.compile(r"[\w.-]", re.ASCII)
JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
ESCAPES = {
    "a": "\\u0007", "v": "\\u000b", "0": "\\u0000", "'": "'",
    "n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", '"': '\\"', "\\": "\\\\",
}  # fmt: skip
HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}


class Llama4PythonicSyntax:
    """A list of calls with keyword arguments, at the start of a line or after a mark."""

    markers = ("<|python_start|>", "<|python_tag|>")
    marks = (*markers, CLOSE)
    line_marker = "["
    between = ", "
    separators = ""

    def attempt(self, sink: CallSink, marker: str) -> Attempt:
        if marker != self.line_marker:
            yield from expect("[")
        while True:
            back = yield from _call(sink, *(yield from _head(sink)))
            if back:
                return back
            sink.complete()
            letter = yield from after_space()
            if letter == "]":
                return (yield from closing("", CLOSE))
            if letter != ",":
                raise NotACall

    def written(self, calls: Sequence[tuple[str, Any]]) -> str:
        return f"[{self.between.join(_written(*call) for call in calls)}]"


def _written(name: str, arguments: Any) -> str:
    if isinstance(arguments, dict):
        arguments = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"{name}({arguments})"


class _NotPython(Exception):  # noqa: N818  (the call ends here)
    """The arguments go on as no Python does: here is what was read and not used."""


def _head(sink: CallSink) -> Generator[None, str, tuple[str, str]]:
    """The name of the function and of its first argument; "": it has none."""
    name, letter = yield from _name((yield from after_space()))
    if letter != "(" or not sink.known(name):
        raise NotACall
    letter = yield from after_space()
    if letter == ")":
        return name, ""
    keyword, letter = yield from _name(letter)
    if letter in SPACE:
        letter = yield from after_space()
    if letter != "=":
        raise NotACall
    return name, keyword


def _name(letter: str) -> Generator[None, str, tuple[str, str]]:
    """A name that begins with `letter`, and the letter after it."""
    text = ""
    while NAME.match(letter) and len(text) < MAX_NAME:
        text += letter
        letter = yield
    if not text:
        raise NotACall
    return text, letter


def _call(sink: CallSink, name: str, keyword: str) -> Attempt:
    """The arguments up to the closing parenthesis. Gives back the first that is no Python."""
    sink.begin(name)
    sink.write("{")
    try:
        while keyword:
            sink.write(json.dumps(keyword) + ": ")
            letter = yield from _value(sink, (yield from _sign()), 1)
            keyword = yield from _next_keyword(letter)
            sink.write(", " if keyword else "")
    except _NotPython as error:
        return str(error)
    sink.write("}")
    return ""


def _next_keyword(letter: str) -> Letter:
    """The name of the next argument, where `letter` follows the last one; "": it was the last."""
    if letter == ",":
        letter = yield from _sign()
        if letter != ")":
            try:
                keyword, letter = yield from _name(letter)
            except NotACall as error:
                raise _NotPython(letter) from error
            letter = (yield from _sign()) if letter in SPACE else letter
            if letter != "=":
                raise _NotPython(keyword + letter)
            return keyword
    if letter != ")":
        raise _NotPython(letter)
    return ""


def _sign() -> Letter:
    """The next letter that is no space, inside a call."""
    while (letter := (yield)) in SPACE:
        pass
    return letter


def _value(sink: CallSink, letter: str, depth: int) -> Letter:
    """Hand on a value that begins with `letter`. Returns the first sign after it."""
    if letter in ("'", '"'):
        yield from _string(sink, letter)
        return (yield from _sign())
    if letter in ("[", "{") and depth < MAX_DEPTH:
        return (yield from _members(sink, letter, depth + 1))
    text = ""
    while (NAME.match(letter) or letter == "+") and len(text) < MAX_NUMBER:
        text += letter
        letter = yield
    written = _word(text)
    if written is None:
        raise _NotPython(text + letter)
    sink.write(written)
    return (yield from _sign()) if letter in SPACE else letter


def _members(sink: CallSink, bracket: str, depth: int) -> Letter:
    """A list or a dictionary, of which the bracket is read already."""
    closing_bracket = "]" if bracket == "[" else "}"
    sink.write(bracket)
    letter = yield from _sign()
    between = ""
    while letter != closing_bracket:
        sink.write(between)
        between = ", "
        if bracket == "{":
            letter = yield from _key(sink, letter)
        letter = yield from _value(sink, letter, depth)
        if letter == ",":
            letter = yield from _sign()
        elif letter != closing_bracket:
            raise _NotPython(letter)
    sink.write(closing_bracket)
    return (yield from _sign())


def _key(sink: CallSink, quote: str) -> Letter:
    """A key of a dictionary. Returns the first sign of its value."""
    if quote not in ("'", '"'):
        raise _NotPython(quote)
    yield from _string(sink, quote)
    letter = yield from _sign()
    if letter != ":":
        raise _NotPython(letter)
    sink.write(": ")
    return (yield from _sign())


def _string(sink: CallSink, quote: str) -> Generator[None, str, None]:
    """Hand on a string, of which the quote is read already, as JSON."""
    sink.write('"')
    while (letter := (yield)) != quote:
        if letter == "\\":
            yield from _escape(sink, (yield))
        else:
            sink.write(_quoted(letter))
    sink.write('"')


def _escape(sink: CallSink, letter: str) -> Generator[None, str, None]:
    if letter in HEX_LENGTHS:
        digits = ""
        while len(digits) < HEX_LENGTHS[letter]:
            digits += yield
        sink.write(_code_point(digits))
    elif letter != "\n":  # there the string goes on in the next line
        sink.write(ESCAPES.get(letter, "\\\\" + _quoted(letter)))


def _code_point(digits: str) -> str:
    """A letter by its number, as JSON. A lone surrogate stays an escape, as no text can hold it."""
    try:
        number = int(digits, 16)
        return json.dumps(chr(number))[1:-1]
    except (ValueError, OverflowError):
        return "\\\\" + _quoted(digits)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _word(text: str) -> str | None:
    """A number or a constant as JSON; None for anything else."""
    if text in WORDS:
        return WORDS[text]
    if JSON_NUMBER.fullmatch(text):
        return text
    for read in (functools.partial(int, base=0), float):
        with contextlib.suppress(ValueError):
            number = read(text)
            if math.isfinite(number):
                return json.dumps(number)
    return None
