"""Frames from rank 0 reach all followers complete and in order, even if some sleep or lag."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.parallel import transport
from engine.parallel.transport import MAX_FRAME, NUM_PLACES, Board
from tests.support.ranks.inboxes import connected
from tests.support.waiting import DEADLINE

LONG = bytes(range(256)) * (MAX_FRAME // 256 + 1)  # does not fit on a board
FULL = LONG[:MAX_FRAME]


@pytest.fixture
def board() -> Iterator[Board]:
    """A board with two readers."""
    made = Board.create(2)
    yield made
    made.close()


def test_a_frame_is_there_from_its_post_on(board: Board) -> None:
    for number, frame in enumerate((b"", b"x", FULL), 1):
        assert board.look(number) is None
        assert board.post(number, frame)
        assert board.look(number) == frame
    assert board.look(1) == b""


def test_a_frame_without_room_is_refused(board: Board) -> None:
    assert not board.post(1, LONG)
    assert board.look(1) is None


def test_a_place_is_kept_until_every_reader_has_its_frame(board: Board) -> None:
    for number in range(1, NUM_PLACES + 1):
        assert board.post(number, b"%d" % number)
    after = NUM_PLACES + 1
    assert not board.post(after, b"after")
    board.note(0, 5)
    assert not board.post(after, b"after")
    assert board.look(1) == b"1"
    board.note(1, 1)
    assert board.post(after, b"after")
    assert (board.look(after), board.look(1)) == (b"after", None)
    assert not board.post(after + 1, b"more")


@pytest.mark.parametrize("old", [b"", b"1 old one", b"an old one, longer than the new one"])
def test_a_frame_of_which_parts_are_still_unseen_is_not_there_yet(old: bytes) -> None:
    """Any word of the frame may become visible last."""
    other = Board.create(1)
    for number, frame in ((1, old), (1 + NUM_PLACES, b"the newer one")):
        other.note(0, number)
        assert other.post(number, frame)
        if number == 1:
            with mmap.mmap(other.memory, 0) as memory:
                before = bytes(memory)
    with mmap.mmap(other.memory, 0) as memory:
        after = bytes(memory)
        words = [at for at in range(0, len(after), 8) if before[at : at + 8] != after[at : at + 8]]
        assert len(words) >= 4
        for at in words[1:]:  # without the note
            memory[at : at + 8] = before[at : at + 8]
            assert other.look(1 + NUM_PLACES) is None
            memory[at : at + 8] = after[at : at + 8]
            assert other.look(1 + NUM_PLACES) == b"the newer one"
    other.close()


def mixed(count: int) -> list[bytes]:
    """Frames, some of which go over the sockets."""
    return [LONG[: 1 + (at * 7919) % 3000] if at % 23 else LONG + b"%d" % at for at in range(count)]


@pytest.mark.parametrize("awake", [0.0, 0.001])
def test_every_follower_gets_all_frames_in_order(
    awake: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even followers that sleep in between, and with more frames than places."""
    monkeypatch.setattr(transport, "AWAKE", awake)
    broadcast, followers = connected(3)
    frames = mixed(600)
    with ThreadPoolExecutor(3) as threads:
        hearing = [
            threads.submit(lambda inbox: [inbox.receive() for _ in frames], inbox)
            for inbox, _ in followers
        ]
        for frame in frames:
            broadcast.send(frame)
        for heard in hearing:
            assert heard.result(DEADLINE) == frames
    broadcast.close()
    for inbox, _ in followers:
        assert inbox.receive() is None
        inbox.close()


def test_a_follower_that_lags_misses_nothing_and_delays_no_other() -> None:
    broadcast, followers = connected(2)
    (quick, _), (slow, _) = followers
    frames = [b"%d" % number for number in range(5 * NUM_PLACES)]
    for frame in frames:
        broadcast.send(frame)
        assert quick.receive() == frame
    broadcast.close()
    assert [slow.receive() for _ in frames] == frames
    assert slow.receive() is None
    quick.close()
    slow.close()


def test_the_end_wakes_a_follower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "AWAKE", 0.0)
    broadcast, [(inbox, _)] = connected(1)
    with ThreadPoolExecutor(1) as thread:
        hearing = thread.submit(inbox.receive)
        broadcast.close()
        assert hearing.result(DEADLINE) is None
    inbox.close()


def test_a_frame_for_followers_that_are_gone_raises_where_it_needs_their_sockets() -> None:
    broadcast, [(inbox, _)] = connected(1)
    inbox.close()
    broadcast.send(b"")  # only a watcher of their processes would notice
    with pytest.raises(OSError, match="Broken pipe"):
        broadcast.send(LONG)
    broadcast.close()


def test_answers_come_back_by_rank() -> None:
    broadcast, followers = connected(2)
    for rank, (inbox, answers) in reversed(list(enumerate(followers))):
        answers.send(b"from %d" % rank)
        inbox.close()
    assert broadcast.receive_all() == [b"from 0", b"from 1"]
    assert broadcast.receive_all() == [None, None]
    broadcast.close()


def test_nothing_is_left_open() -> None:
    before = open_files()
    broadcast, followers = connected(2)
    opened = dict(open_files().items() - before.items())
    assert len(opened) >= 8
    broadcast.close()
    for inbox, _ in followers:
        inbox.close()
    assert not opened.items() & open_files().items()


def open_files() -> dict[int, tuple[int, int]]:
    """What this process has open; its other threads may close and open files at any time."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the list itself, by now
            status = os.fstat(number)
            found[number] = (status.st_dev, status.st_ino)
    return found
