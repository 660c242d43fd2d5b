"""Rank 0's end of a broadcast and the ends of all followers, in one process."""

from __future__ import annotations

import os
import socket

from engine.parallel.transport import Board, Broadcast, Channel, Inbox


def connected(num_followers: int) -> tuple[Broadcast, list[tuple[Inbox, Channel]]]:
    """The ends of rank 0 and of each follower; the caller closes them."""
    board = Board.create(num_followers)
    pairs = [socket.socketpair() for _ in range(num_followers)]
    followers = []
    for number, (_, theirs) in enumerate(pairs):
        channel = Channel(theirs)
        own = Board(os.dup(board.memory), os.dup(board.wake_handle))
        followers.append((Inbox(channel, own, number), channel))
    return Broadcast([Channel(own) for own, _ in pairs], board), followers
