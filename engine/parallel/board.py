"""Memory that rank 0 writes frames into once, for all followers to read.

Frames are numbered from 1; frame n lies in place n modulo the number of places. A reader looks for
the number that it waits for. Stores of another processor may come to be seen in any order, so every
frame has a checksum over number and content: what is half there counts as not there yet, on any
processor. Nobody waits in vain: a frame is whole before `wake`, a system call, which orders memory
for those whom it wakes. A place is written again only when all readers have noted that they have
what lay there, which they do after comparing the checksum of their copy.
"""

from __future__ import annotations

import mmap
import os
import zlib

from engine.parallel.shard import MAX_RANKS

NUM_PLACES = 16
PLACE_BYTES = 64 * 1024  # memory is used as far as frames reach, which is seldom beyond one page
HEAD = 3  # words of a place: number, length, checksum
WORD = 8
NOTE = 8  # words, a cache line: the number of the newest frame that a reader has
NOTES_BYTES = MAX_RANKS * NOTE * WORD  # in front of the places
NOBODY = 2**64 - 1  # the note of a reader that does not exist
MAX_FRAME = PLACE_BYTES - HEAD * WORD


class Board:
    """One process posts, others look; each has a `Board` on the same two handles."""

    def __init__(self, memory: int, wake: int) -> None:
        """On handles of another `Board`, which are closed with this one."""
        self.memory = memory
        self.wake_handle = wake  # for edge-triggered polling: it is never read
        self._map = mmap.mmap(memory, NOTES_BYTES + NUM_PLACES * PLACE_BYTES)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")  # one aligned store each
        self._had_by_all = 0

    @classmethod
    def create(cls, num_readers: int) -> Board:
        """OSError where there is no shared memory."""
        memory = os.memfd_create("aerie-board")
        os.ftruncate(memory, NOTES_BYTES + NUM_PLACES * PLACE_BYTES)
        board = cls(memory, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        for reader in range(num_readers, MAX_RANKS):
            board.note(reader, NOBODY)
        return board

    def post(self, number: int, frame: bytes) -> bool:
        """Whether the frame is there now: not if it is too long, or a reader is too far behind."""
        if len(frame) > MAX_FRAME or not self._is_free(number):
            return False
        at, head = self._place(number)
        self._bytes[at : at + len(frame)] = frame
        self._words[head + 1] = len(frame)
        self._words[head + 2] = zlib.crc32(frame, number)
        self._words[head] = number
        return True

    def wake(self) -> None:
        """Let all readers look that sleep, in one system call."""
        os.eventfd_write(self.wake_handle, 1)

    def look(self, number: int) -> bytes | None:
        """A copy of the frame if it is there."""
        at, head = self._place(number)
        if self._words[head] != number:
            return None
        frame = bytes(self._bytes[at : at + min(self._words[head + 1], MAX_FRAME)])
        return frame if zlib.crc32(frame, number) == self._words[head + 2] else None

    def note(self, reader: int, number: int) -> None:
        """Reader `reader`, counted from 0, has all frames up to this one."""
        self._words[reader * NOTE] = number

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()
        os.close(self.memory)
        os.close(self.wake_handle)

    def _is_free(self, number: int) -> bool:
        before = number - NUM_PLACES
        if self._had_by_all < before:
            self._had_by_all = min(self._words[: MAX_RANKS * NOTE : NOTE])
        return self._had_by_all >= before

    def _place(self, number: int) -> tuple[int, int]:
        """Where its bytes begin, and which word its head is."""
        start = NOTES_BYTES + number % NUM_PLACES * PLACE_BYTES
        return start + HEAD * WORD, start // WORD
