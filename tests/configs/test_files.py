"""Files that an operator names: whatever they are, reading ends soon and takes little memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from configs import files
from configs.files import check_regular, read_bytes, read_text
from configs.load import ConfigError, load_config


def pipe_at(path: Path) -> Path:
    os.mkfifo(path)
    return path


def test_a_regular_file_is_read_also_through_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ü".encode() * 70_000)
    (tmp_path / "link").symlink_to("a")
    assert read_text(tmp_path / "link") == "ü" * 70_000
    check_regular(tmp_path / "link", 140_000)


@pytest.mark.parametrize("pipes", [False, True])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("device", "a device"), ("folder", "a directory"), ("socket", "a socket"), ("pipe", "a pipe")],
)
def test_anything_else_is_named_and_not_read(
    tmp_path: Path, kind: str, said: str, pipes: bool
) -> None:
    path, link = tmp_path / kind, tmp_path / "config.json"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "device":
            path = Path("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            pipe_at(path)
        else:
            listener.bind(str(path))
        link.symlink_to(path)
        with pytest.raises(ValueError, match=f"config.json is {said}, not a regular file"):
            check_regular(link)
        if kind == "pipe" and pipes:
            return
        # A socket cannot be opened at all.
        with pytest.raises((ValueError, OSError), match=said if kind != "socket" else "config"):
            read_bytes(link, pipes=pipes)


def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(2**40)
    for read in (read_text, check_regular):
        with pytest.raises(ValueError, match="a has more than 10 bytes"):
            read(path, 10)


def test_a_configuration_may_come_from_a_pipe(tmp_path: Path) -> None:
    """As a shell's `--config <(command)`, from a writer that is slow."""
    path = pipe_at(tmp_path / "pipe")
    program = "import sys; f = open(sys.argv[1], 'w'); f.write('server:\\n'); f.flush()\n"
    program += "import time; time.sleep(0.05); f.write('  port: 77\\n')"
    with subprocess.Popen([sys.executable, "-c", program, str(path)]) as writer:
        assert load_config(path).server.port == 77
    assert writer.returncode == 0


def test_a_pipe_without_a_writer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIPE_TIMEOUT", 0.01)
    with pytest.raises(ConfigError, match="the pipe was not written and closed"):
        load_config(pipe_at(tmp_path / "pipe"))
