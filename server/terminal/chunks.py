"""What a server of the OpenAI API sends, as far as the chat reads it; null is as if left out."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0, le=2**53)]
Byte = Annotated[int, Meta(ge=0, le=255)]


class ListedModel(Struct):
    id: str


class ModelList(Struct):
    data: list[ListedModel]


class TracedToken(Struct):
    bytes: list[Byte]
    origin: str
    depth: Count


class TracedRound(Struct):
    nodes: list[Any]
    accepted: list[Any]


class Trace(Struct):
    tokens: list[TracedToken]
    rounds: list[TracedRound]


class Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(Struct):
    delta: Delta | None = None
    finish_reason: str | None = None
    trace: Trace | None = None


class Usage(Struct):
    completion_tokens: Count | None = None


class Chunk(Struct):
    """A part of a streamed answer, or the error that ends it."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
