"""Objects of a reply: each names the reply, and the totals that the client asked for are in the
right ones."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from msgspec import UNSET, UnsetType

from server.http.reply.sse import event
from server.openai.reply.bodies import Reply
from server.openai.reply.generation import Generation
from server.openai.request.schema import SamplingFields

Chunk = TypeVar("Chunk", bound=Reply)
Whole = TypeVar("Whole", bound=Reply)


class Report(Generic[Chunk]):
    """Makes the chunks of a stream, of the type `kind`, or the reply in one piece."""

    def __init__(self, generation: Generation, body: SamplingFields, kind: type[Chunk]) -> None:
        self._generation = generation
        self._kind = kind
        self._always = body.continuous_usage
        self._at_end = body.include_usage
        self._no_usage: UnsetType | None = None if self._at_end else UNSET
        self._with_drafts = body.include_draft_stats

    def chunk(self, choices: list[Any], **fields: Any) -> bytes:
        """The event of a chunk with these choices and further fields."""
        usage = self._generation.usage_so_far() if self._always else self._no_usage
        return event(self._object(self._kind, choices=choices, usage=usage, **fields))

    def opening(self, choices: list[Any], **fields: Any) -> bytes:
        """The event of a chunk that precedes all output."""
        usage = self._generation.usage_of_prompts() if self._always else self._no_usage
        return event(self._object(self._kind, choices=choices, usage=usage, **fields))

    def last(self) -> bytes:
        """The event of the chunk with the totals; empty if the client wants none."""
        if not (self._at_end or self._with_drafts):
            return b""
        return event(self._total(self._kind, self._at_end, choices=[]))

    def whole(self, kind: type[Whole], **fields: Any) -> Whole:
        """The reply in one piece, once all choices have ended."""
        return self._total(kind, True, **fields)

    def _total(self, kind: type[Whole], with_usage: bool, **fields: Any) -> Whole:
        generation = self._generation
        usage = generation.usage() if with_usage else UNSET
        drafts = generation.draft_stats() if self._with_drafts else UNSET
        metrics = (generation.draft_metrics() if self._with_drafts else None) or UNSET
        return self._object(kind, usage=usage, speculation=drafts, metrics=metrics, **fields)

    def _object(self, kind: type[Whole], **fields: Any) -> Whole:
        generation = self._generation
        return kind(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            **fields,
        )
