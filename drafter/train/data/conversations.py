"""Prompts and conversations in JSONL files, checked line by line.

A line of prompts is `{"messages": [...]}` up to a user message, or `{"turns": ["text", ...]}`; a
line of conversations is `{"messages": [...]}` with answers or, captured by a server,
`{"token_ids": [...], "num_prompt": n}`. Blank lines are skipped and further keys are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Message = Mapping[str, str]  # role, content

PROMPT_LINE = '{"messages": [...]} that end with a user message, or {"turns": ["...", ...]}'
CONVERSATION_LINE = '{"messages": [...]} with an answer, or {"token_ids": [...], "num_prompt": n}'
FINISH_REASONS = ("stop", "length")
SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's questions: `messages` end with the first turn to answer, `later_turns` follow."""

    where: str  # file:line
    id: str  # "FILE-N" if the line, number N of FILE.jsonl, has none
    messages: tuple[Message, ...]
    later_turns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant messages in turn, with at least one
    answer. `finish_reason` is that of the last answer."""

    where: str  # file:line
    messages: tuple[Message, ...]
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class CapturedConversation:
    """Tokens captured by a server: all after the first `num_prompt` are the answer."""

    where: str  # file:line
    token_ids: tuple[int, ...]
    num_prompt: int


AnyConversation = Conversation | CapturedConversation


def sample_file(name: str) -> Path:
    """A file of the sample that comes with the package: prompts.jsonl or conversations.jsonl."""
    return Path(__file__).parent.parent / "sample" / name


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Prompts one by one. An id is a string or an integer; the default is file name and line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is bad, an id comes twice, or there is no line.
    """
    lines: dict[str, str] = {}
    for number, where, entry in _entries(path, PROMPT_LINE):
        prompt = _prompt(where, f"{path.stem}-{number}", entry)
        if prompt.id in lines:
            raise ValueError(f"{where}: id {prompt.id!r} is that of {lines[prompt.id]} too")
        lines[prompt.id] = where
        yield prompt


def read_conversations(path: Path, ids: Collection[str] | None = None) -> Iterator[AnyConversation]:
    """Conversations one by one; with `ids`, only generated answers to these prompts.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is bad, or there is none.
    """
    for _, where, entry in _entries(path, CONVERSATION_LINE):
        if ids is not None and entry.get("id") not in ids:
            continue
        if ("messages" in entry) == ("token_ids" in entry):
            found = "both messages and" if "messages" in entry else "neither messages nor"
            raise ValueError(f"{where}: {found} token_ids; a line is {CONVERSATION_LINE}")
        yield _conversation(where, entry) if "messages" in entry else _captured(where, entry)


def read_object(where: str, line: bytes) -> dict[str, Any]:
    """The JSON object of one line. For anything else a ValueError names `where`."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ValueError(f"{where}: not UTF-8: byte {byte:#04x} at {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(entry, dict):
        _refuse(where, "the line", entry, "a JSON object")
    return entry


def _entries(path: Path, form: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line number, file:line and object of every line that is not blank."""
    number, empty = 0, True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                where = f"{path}:{number}"
                yield number, where, read_object(where, line)
    if empty:
        raise ValueError(f"{path}:{number}: the file is empty; a line is {form}")


def _prompt(where: str, own_id: str, entry: dict[str, Any]) -> Prompt:
    prompt_id = _prompt_id(where, entry.get("id"), own_id)
    if "messages" not in entry and "turns" not in entry:
        raise ValueError(f"{where}: neither messages nor turns; a line is {PROMPT_LINE}")
    messages = _messages(where, entry["messages"]) if "messages" in entry else ()
    if "turns" in entry:  # all user texts; `messages` may have only the first
        turns = _turns(where, entry["turns"])
        first = {"role": "user", "content": turns[0]}
        system = tuple(message for message in messages[:1] if message["role"] == "system")
        return Prompt(where, prompt_id, (*system, first), turns[1:])
    if messages[-1]["role"] != "user":
        field = f"messages[{len(messages) - 1}].role"
        _refuse(where, field, messages[-1]["role"], '"user" in the last message of a prompt')
    return Prompt(where, prompt_id, messages)


def _prompt_id(where: str, value: object, own_id: str) -> str:
    if value is None:
        return own_id
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        _refuse(where, "id", value, "a text or an integer")
    return str(value)


def _turns(where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        _refuse(where, "turns", value, "a list of texts")
    return tuple(_text(where, f"turns[{index}]", turn) for index, turn in enumerate(value))


def _conversation(where: str, entry: dict[str, Any]) -> Conversation:
    messages = _messages(where, entry["messages"])
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: messages hold no answer; one must be of the assistant")
    reason = entry.get("finish_reason")
    if reason is not None and reason not in FINISH_REASONS:
        _refuse(where, "finish_reason", reason, '"stop", "length" or null')
    return Conversation(where, messages, reason)


def _messages(where: str, value: object) -> tuple[Message, ...]:
    """Checked messages: each has a text, and roles take turns."""
    if not isinstance(value, list) or not value:
        _refuse(where, "messages", value, "a list of messages")
    allowed: tuple[str, ...] = ("system", "user")
    messages: list[Message] = []
    for index, entry in enumerate(value):
        messages.append(_message(where, f"messages[{index}]", entry, allowed))
        allowed = ("assistant",) if messages[-1]["role"] == "user" else ("user",)
    return tuple(messages)


def _message(where: str, field: str, entry: object, roles: tuple[str, ...]) -> Message:
    if not isinstance(entry, dict):
        _refuse(where, field, entry, "an object with role and content")
    role = entry.get("role")
    if role not in roles:
        _refuse(where, f"{field}.role", role, " or ".join(f'"{name}"' for name in roles))
    for key, value in entry.items():
        if key not in ("role", "content") and value is not None:  # a template might use it
            raise ValueError(f"{where}: {field}.{key} is not supported; role and content are")
    return {"role": role, "content": _text(where, f"{field}.content", entry.get("content"))}


def _text(where: str, field: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        _refuse(where, field, value, "a text that is not empty")
    return value


def _captured(where: str, entry: dict[str, Any]) -> CapturedConversation:
    token_ids, num_prompt = entry["token_ids"], entry.get("num_prompt")
    if not isinstance(token_ids, list):
        _refuse(where, "token_ids", token_ids, "a list of integers from 0")
    for index, token_id in enumerate(token_ids):
        if type(token_id) is not int or token_id < 0:  # True is an int, too
            _refuse(where, f"token_ids[{index}]", token_id, "an integer from 0")
    if len(token_ids) < 2:
        _refuse(where, "token_ids", token_ids, "a prompt and an answer, 2 tokens or more")
    if type(num_prompt) is not int or not 0 < num_prompt < len(token_ids):
        last = len(token_ids) - 1
        _refuse(where, "num_prompt", num_prompt, f"1 to {last}, so that an answer is left")
    return CapturedConversation(where, tuple(token_ids), num_prompt)


def _refuse(where: str, field: str, value: object, allowed: str) -> NoReturn:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
    raise ValueError(f"{where}: {field} is {shown}; it must be {allowed}")
