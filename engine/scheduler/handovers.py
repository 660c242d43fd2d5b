"""Sequences whose prompt one engine computes and another decodes.

The engine that decodes reserves a line and blocks first, then waits for the pages (`Reserved`). The
engine that computes sends the pages of blocks as they fill, and hands the sequence over with its
first token. If the other one is lost, each side goes on alone: reserved sequences run from the
pages that have come, and sequences that were to leave stay.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from engine.messages import DraftState, HandedOver, Handover, Reserved, Resume
from engine.request import Sequence

OWN_TOKENS = 32  # prompts of which no more are missing are computed where they are decoded


@dataclass(slots=True)
class Sending:
    """A sequence that leaves after its first token."""

    seq: Sequence
    handover: Handover
    num_sent: int  # leading blocks that are sent, or were in the other engine's cache


@dataclass(frozen=True, slots=True)
class Pages:
    """Blocks of a sequence to be sent: those of `line` go to `places` of the engine `peer`."""

    request_id: str
    line: int
    peer: int
    first_block: int
    blocks: tuple[int, ...]
    places: tuple[int, ...]
    endpoint: bytes  # of the peer
    handed: HandedOver | None = None  # the sequence leaves with them


@dataclass(slots=True)
class _Reserved:
    seq: Sequence
    num_cached: int  # tokens found in the prefix cache
    num_blocks: int  # leading ones whose pages are here


class Handovers:
    """Both sides of an engine. Only the scheduler opens, starts and ends sequences here."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.endpoint = b""  # of this engine, for those that compute prompts for it
        self._wanting: set[str] = set()  # waiting sequences whose prompt another engine computes
        self._reserved: dict[str, _Reserved] = {}
        self._sending: dict[str, Sending] = {}
        self._new: dict[int, DraftState | None] = {}  # resumed lines that no plan has admitted yet

    @property
    def reserved(self) -> list[Sequence]:
        """Sequences that wait for pages."""
        return [each.seq for each in self._reserved.values()]

    def open(self, seq: Sequence, *, reserve: bool, handover: Handover | None) -> None:
        """Note what a new sequence is to do."""
        if reserve:
            self._wanting.add(seq.request_id)
        if handover is not None:
            self._sending[seq.request_id] = Sending(seq, handover, handover.first_block)

    def close(self, seq: Sequence) -> None:
        """A sequence has ended here."""
        self._wanting.discard(seq.request_id)
        self._reserved.pop(seq.request_id, None)
        self._sending.pop(seq.request_id, None)

    def wants(self, seq: Sequence) -> bool:
        """Whether another engine shall compute the prompt of a waiting sequence."""
        return seq.request_id in self._wanting

    def reserve(self, seq: Sequence, num_cached: int, num_slots: int) -> Reserved | None:
        """Let a sequence that has its blocks wait for pages. None if it is to start here instead:
        too few tokens are missing. `num_slots`: those whose pages are wanted."""
        self._wanting.discard(seq.request_id)
        if len(seq.token_ids) - num_cached <= OWN_TOKENS:
            return None
        first = num_cached // self._block_size
        self._reserved[seq.request_id] = _Reserved(seq, num_cached, first)
        end = self._blocks_for(num_slots)
        return Reserved(seq.request_id, first, tuple(seq.block_ids[first:end]), self.endpoint)

    def is_reserved(self, request_id: str) -> bool:
        return request_id in self._reserved

    def take_pages(self, request_id: str, first_block: int, num_blocks: int) -> list[int]:
        """Blocks to which pages go that have come; empty if the sequence has ended."""
        reserved = self._reserved.get(request_id)
        if reserved is None:
            return []
        assert first_block <= reserved.num_blocks, "pages come in order"
        reserved.num_blocks = max(reserved.num_blocks, first_block + num_blocks)
        return reserved.seq.block_ids[first_block : first_block + num_blocks]

    def resume(self, message: Resume) -> tuple[Sequence, int, tuple[int, ...]]:
        """A reserved sequence that runs from now on, how many of its tokens are computed, and its
        output so far."""
        reserved, handed = self._reserved.pop(message.request_id), message.handed
        seq = reserved.seq
        self._new[seq.line] = None if handed is None else handed.draft
        if handed is None:
            return seq, reserved.num_blocks * self._block_size, message.output_ids
        seq.num_cached = handed.num_cached
        seq.first_scheduled_time = handed.first_scheduled_time
        seq.first_token_time = handed.first_token_time
        return seq, seq.num_prompt, handed.output_ids

    def is_new(self, line: int) -> bool:
        """Whether no plan has admitted a resumed line yet."""
        return line in self._new

    def state(self, line: int) -> DraftState | None:
        return self._new[line]

    def admitted(self, lines: Collection[int]) -> None:
        """A plan has these rows."""
        for line in self._new.keys() & set(lines):
            del self._new[line]

    def forget_line(self, line: int) -> bool:
        """Whether a line that is given back was never in a plan."""
        known = line in self._new
        self._new.pop(line, None)
        return known

    def forget_peer(self, peer: int) -> None:
        """Nothing is handed over to this engine."""
        lost = [name for name, each in self._sending.items() if each.handover.peer == peer]
        for request_id in lost:
            del self._sending[request_id]

    def to_send(self) -> list[Pages]:
        """Blocks of running sequences that are full and were not sent."""
        found = []
        for sending in self._sending.values():
            seq = sending.seq
            full = seq.num_computed // self._block_size
            if seq.line >= 0 and seq.block_ids and full > sending.num_sent:
                found.append(self._pages(sending, full))
        return found

    def leaving(self, seq: Sequence, output_ids: tuple[int, ...], num_slots: int) -> Pages | None:
        """What is left to send of a sequence that has its first token; None if it stays.
        `num_slots`: those whose pages the other engine needs."""
        sending = self._sending.get(seq.request_id)
        if sending is None or not output_ids:
            return None
        handed = HandedOver(
            seq.request_id,
            output_ids,
            seq.num_cached,
            seq.first_scheduled_time,
            seq.first_token_time,
        )
        return self._pages(sending, self._blocks_for(num_slots), handed)

    def _blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self._block_size)

    @staticmethod
    def _pages(sending: Sending, end: int, handed: HandedOver | None = None) -> Pages:
        seq, first, there = sending.seq, sending.num_sent, sending.handover
        end = min(end, there.first_block + len(there.places))
        sending.num_sent = max(first, end)
        return Pages(
            seq.request_id,
            seq.line,
            there.peer,
            first,
            tuple(seq.block_ids[first:end]),
            there.places[first - there.first_block : end - there.first_block],
            there.endpoint,
            handed,
        )
