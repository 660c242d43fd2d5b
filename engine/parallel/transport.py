"""Frames of bytes between ranks. Rank 0 sends to all followers over a board in shared memory;
frames that do not fit there, and answers, go over socket pairs.

Rank 0 writes each frame to the board once, and all followers read it. Frames are numbered from 1;
frame n lies in place n modulo the number of places. A reader polls for the next number. Processors
may see stores in another order, so a frame has a checksum over its number and content, and a
partly visible frame counts as absent. A reader that sleeps misses no frame: rank 0 completes the
frame before `wake`, a system call that orders memory for the readers it wakes. Rank 0 reuses a
place only after all readers have noted that they have its frame, which they do once the checksum of
their copy matches.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
import time
import zlib
from collections.abc import Sequence

from engine.parallel.shard import MAX_RANKS

NUM_PLACES = 16
PLACE_BYTES = 64 * 1024  # only touched pages use memory, and few frames are longer than a page
HEAD = 3  # words at the start of a place: number, length, checksum
WORD = 8
NOTE = 8  # words, one cache line: holds the number of the newest frame that a reader has
NOTES_BYTES = MAX_RANKS * NOTE * WORD  # before the places
NOBODY = 2**64 - 1  # the note of a reader that does not exist
MAX_FRAME = PLACE_BYTES - HEAD * WORD
LENGTH = 4  # bytes before each frame on a socket
AWAKE = 0.003  # seconds a follower polls before it sleeps; the gap between steps takes 0.8 ms
NUMBER = 8  # bytes before a frame that goes over a socket instead of the board


class Board:
    """One process posts, others read; each has a `Board` on the same two handles."""

    def __init__(self, memory: int, wake: int) -> None:
        """`memory` and `wake`: handles of an existing board; `close` closes them."""
        self.memory = memory
        self.wake_handle = wake  # for edge-triggered polling: it is never read
        self._map = mmap.mmap(memory, NOTES_BYTES + NUM_PLACES * PLACE_BYTES)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")  # writing a word is one aligned store
        self._had_by_all = 0

    @classmethod
    def create(cls, num_readers: int) -> Board:
        """OSError if there is no shared memory."""
        memory = os.memfd_create("aerie-board")
        os.ftruncate(memory, NOTES_BYTES + NUM_PLACES * PLACE_BYTES)
        board = cls(memory, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        for reader in range(num_readers, MAX_RANKS):
            board.note(reader, NOBODY)
        return board

    def post(self, number: int, frame: bytes) -> bool:
        """Write a frame; False if it is too long or its place is still unread."""
        if len(frame) > MAX_FRAME or not self._is_free(number):
            return False
        at, head = self._place(number)
        self._bytes[at : at + len(frame)] = frame
        self._words[head + 1] = len(frame)
        self._words[head + 2] = zlib.crc32(frame, number)
        self._words[head] = number
        return True

    def wake(self) -> None:
        """Wake all sleeping readers, in one system call."""
        os.eventfd_write(self.wake_handle, 1)

    def look(self, number: int) -> bytes | None:
        """A copy of the frame, None if it is not there yet."""
        at, head = self._place(number)
        if self._words[head] != number:
            return None
        frame = bytes(self._bytes[at : at + min(self._words[head + 1], MAX_FRAME)])
        return frame if zlib.crc32(frame, number) == self._words[head + 2] else None

    def note(self, reader: int, number: int) -> None:
        """Note that reader `reader`, counted from 0, has all frames up to `number`."""
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
        """The byte offset of the frame's content, and the word offset of its head."""
        start = NOTES_BYTES + number % NUM_PLACES * PLACE_BYTES
        return start + HEAD * WORD, start // WORD


class Channel:
    """One end of a socket pair. Any thread may send; one at a time may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Raises OSError if the other end is closed."""
        with self._sending:
            self._end.sendall(len(frame).to_bytes(LENGTH, "little") + frame)

    def receive(self) -> bytes | None:
        """The next frame; None if the other end is closed."""
        head = self._read(LENGTH)
        return None if head is None else self._read(int.from_bytes(head, "little"))

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()

    def _read(self, size: int) -> bytes | None:
        parts = []
        while size:
            try:
                part = self._end.recv(size)
            except ConnectionError:
                return None
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Broadcast:
    """Rank 0's side: every frame goes to all followers, in the same order."""

    def __init__(self, channels: Sequence[Channel], board: Board | None = None) -> None:
        """`channels`: rank 0's ends, one per follower. `board`: has one reader per follower; None
        if there are no followers."""
        assert (board is None) == (len(channels) == 0)
        self._channels = channels
        self._board = board
        self._number = 0
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Send over the board if possible, else over the sockets, where OSError is raised if a
        follower has died."""
        if self._board is None:
            return
        with self._sending:
            self._number += 1
            if self._board.post(self._number, frame):
                self._board.wake()
                return
            numbered = self._number.to_bytes(NUMBER, "little") + frame
            for channel in self._channels:
                channel.send(numbered)

    def receive_all(self) -> list[bytes | None]:
        """One frame from each follower, in order of ranks. One thread at a time."""
        return [channel.receive() for channel in self._channels]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        if self._board is not None:
            self._board.close()


class Inbox:
    """A follower's side of a `Broadcast`. It polls for the next frame for `AWAKE` seconds, so that
    between steps rank 0 spends no time to wake it; then it sleeps."""

    def __init__(self, channel: Channel, board: Board, reader: int) -> None:
        """`reader`: this follower's number among the board's readers, counted from 0."""
        self._channel = channel
        self._board = board
        self._reader = reader
        self._number = 1  # of the next frame
        self._early: tuple[int, bytes] | None = None  # frame from the socket, not its turn yet
        self._events = select.epoll()
        self._events.register(channel, select.EPOLLIN)
        self._events.register(board.wake_handle, select.EPOLLIN | select.EPOLLET)

    def receive(self) -> bytes | None:
        """The next frame; None if rank 0 has ended."""
        sleep_at = time.monotonic() + AWAKE
        while (frame := self._look()) is None:
            awake = time.monotonic() < sleep_at
            if awake:
                os.sched_yield()  # with few cores, rank 0 may need this one
            if self._is_gone(timeout=0 if awake else None):
                frame = self._look()  # it may have been posted just before
                if frame is None:
                    return None
                break
        self._board.note(self._reader, self._number)
        self._number += 1
        return frame

    def close(self) -> None:
        self._events.close()
        self._channel.close()
        self._board.close()

    def _is_gone(self, timeout: float | None) -> bool:
        """Wait for an event, at most `timeout` seconds, and take a frame from the socket if there
        is one. True if rank 0 has closed the socket."""
        woken = [handle for handle, _ in self._events.poll(timeout)]
        return self._channel.fileno() in woken and self._early is None and not self._hear()

    def _look(self) -> bytes | None:
        if self._early is not None and self._early[0] == self._number:
            frame, self._early = self._early[1], None
            return frame
        return self._board.look(self._number)

    def _hear(self) -> bool:
        """Take a frame from the socket; False if rank 0 has closed it."""
        numbered = self._channel.receive()
        if numbered is None:
            return False
        self._early = int.from_bytes(numbered[:NUMBER], "little"), numbered[NUMBER:]
        return True
