"""A JSONL file of answered prompts that grows line by line and survives interruption anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from drafter.train.data.conversations import read_object

START = b'{"id": '  # of every line


class AnswerFile:
    """Appends whole lines. `done` has the messages of the lines found at opening, by id."""

    def __init__(self, path: Path) -> None:
        """Open or create; a torn last line, left by a killed process, is cut off.

        Raises:
            OSError: the file cannot be read or written.
            ValueError: the file holds something other than answers; it stays unchanged.
        """
        self._path = path
        self.done, self._size = _scan(path)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line; `id` must be the first key. OSError if it cannot be written whole; the file
        is then as before."""
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        assert line.startswith(START)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._size)
            reason = f"{error.strerror}; the lines before are complete; run again to continue"
            raise OSError(error.errno, reason, str(self._path)) from error
        self._size += len(line)


def _scan(path: Path) -> tuple[dict[str, list[Any]], int]:
    """Messages of all complete lines by id, and the bytes of those lines."""
    done: dict[str, list[Any]] = {}
    size = 0
    if not path.exists():
        return done, size
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.endswith(b"\n"):
                if not line.startswith(START[: len(line)]):
                    raise _foreign(where)
                break
            entry = read_object(where, line)
            messages = entry.get("messages")
            if not isinstance(entry.get("id"), str) or "finish_reason" not in entry:
                raise _foreign(where)
            if not isinstance(messages, list):
                raise _foreign(where)
            done[entry["id"]] = messages
            size += len(line)
    return done, size


def _foreign(where: str) -> ValueError:
    return ValueError(
        f"{where}: not a line of generated answers (id, finish_reason, messages); name a new file "
        "or one that this command has written"
    )
