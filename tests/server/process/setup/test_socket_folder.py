"""Folders of sockets: private, removed at the end, and removed later if the server was killed."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from server.assembly.ranks.meeting_folder import RANKS, STORE
from server.assembly.running_requests import RUNNING
from server.process.setup.socket_folder import (
    FRESH,
    PREFIX,
    SOCKET,
    private_endpoint,
    remove_stale_folders,
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder used instead of /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(folder: Path) -> None:
    """Make it look unchanged for longer than FRESH."""
    then = folder.stat().st_mtime - 2 * FRESH
    os.utime(folder, (then, then))


def left_behind(temporary: Path, name: str = PREFIX + "abc", fresh: bool = False) -> Path:
    """What a killed server leaves."""
    folder = temporary / name
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / SOCKET))
    (folder / RUNNING).write_bytes(b"")
    if not fresh:
        age(folder)
    return folder


def test_an_endpoint_is_private_and_removed_at_the_end(temporary: Path) -> None:
    with private_endpoint() as endpoint:
        path = Path(endpoint.removeprefix("ipc://"))
        assert path.parent.parent == temporary
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(temporary.iterdir()) == []


def test_what_killed_servers_left_is_removed(temporary: Path) -> None:
    left_behind(temporary)
    empty = temporary / f"{PREFIX}empty"
    empty.mkdir()
    age(empty)
    assert remove_stale_folders() == 2
    assert list(temporary.iterdir()) == []
    assert remove_stale_folders() == 0


def with_ranks(folder: Path, *names: str) -> Path:
    """Add the meeting folder of a killed engine's ranks."""
    met = folder / f"{RANKS}x1"
    met.mkdir()
    for name in names:
        (met / name).write_text("mine")
    age(folder)
    return met


@pytest.mark.parametrize("names", [(), (STORE,)])
def test_leftovers_of_ranks_of_killed_servers_are_removed_with_it(
    temporary: Path, names: tuple[str, ...]
) -> None:
    with_ranks(left_behind(temporary), *names)
    assert remove_stale_folders() == 1
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_living_server_stays(temporary: Path) -> None:
    with private_endpoint() as endpoint:
        folder = Path(endpoint.removeprefix("ipc://")).parent
        age(folder)
        assert remove_stale_folders() == 0
        assert folder.is_dir()
    assert list(temporary.iterdir()) == []


def with_more(temporary: Path) -> Path:
    folder = left_behind(temporary)
    (folder / "more").write_text("mine")
    age(folder)
    return folder / SOCKET


def with_more_than_a_store(temporary: Path) -> Path:
    return with_ranks(left_behind(temporary), STORE, "more") / "more"


def with_linked_ranks(temporary: Path) -> Path:
    elsewhere = with_ranks(temporary, STORE)
    folder = left_behind(temporary)
    (folder / elsewhere.name).symlink_to(elsewhere)
    age(folder)
    return elsewhere / STORE


def with_a_folder_for_a_store(temporary: Path) -> Path:
    folder = left_behind(temporary)
    (with_ranks(folder) / STORE).mkdir()
    age(folder)
    return folder / SOCKET


def no_socket(temporary: Path) -> Path:
    folder = temporary / f"{PREFIX}abc"
    folder.mkdir()
    (folder / SOCKET).write_text("mine")
    age(folder)
    return folder / SOCKET


def linked(temporary: Path) -> Path:
    folder = left_behind(temporary, "elsewhere")
    (temporary / f"{PREFIX}abc").symlink_to(folder)
    return folder / SOCKET


def file_of_that_name(temporary: Path) -> Path:
    path = temporary / f"{PREFIX}abc"
    path.write_text("mine")
    age(path)
    return path


@pytest.mark.parametrize(
    "craft",
    [
        with_more,
        with_more_than_a_store,
        with_linked_ranks,
        with_a_folder_for_a_store,
        no_socket,
        linked,
        file_of_that_name,
        lambda temporary: left_behind(temporary, fresh=True),
        lambda temporary: left_behind(temporary, "aerie-models"),
    ],
)
def test_anything_else_stays(temporary: Path, craft: Callable[[Path], Path]) -> None:
    path = craft(temporary)
    assert remove_stale_folders() == 0
    assert path.exists()


def test_folders_of_other_users_stay(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left_behind(temporary)
    monkeypatch.setattr("server.process.setup.socket_folder.os.getuid", lambda: os.geteuid() + 1)
    assert remove_stale_folders() == 0
    assert path.exists()
