"""Answers of models, read whole or in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from server.text.answer.parts import (
    AnswerReader,
    CallArguments,
    CallBegin,
    Content,
    Part,
    Reasoning,
)


def joined(parts: Iterable[Part]) -> list[Any]:
    """Content as text, reasoning as ("think", text), calls as [name, arguments]; neighbours of one
    kind are joined."""
    found: list[Any] = []
    for part in parts:
        match part:
            case Content(text):
                if found and isinstance(found[-1], str):
                    found[-1] += text
                else:
                    found.append(text)
            case Reasoning(text):
                if found and isinstance(found[-1], tuple):
                    found[-1] = ("think", found[-1][1] + text)
                else:
                    found.append(("think", text))
            case CallBegin(name):
                found.append([name, ""])
            case CallArguments(text):
                found[-1][1] += text
    return found


def read(reader: AnswerReader, pieces: Iterable[str]) -> list[Any]:
    """What a reader finds in a text that comes in pieces."""
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.feed(piece)
    return joined([*parts, *reader.finish()])


def cut(text: str, borders: Sequence[int]) -> list[str]:
    """The text in pieces; `borders` are taken modulo its length."""
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[begin:end] for begin, end in itertools.pairwise(places)]
