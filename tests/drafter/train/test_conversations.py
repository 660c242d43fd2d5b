"""Lines of prompts and conversations: valid ones are read, the errors for others are exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drafter.train.data.conversations import (
    CONVERSATION_LINE,
    PROMPT_LINE,
    CapturedConversation,
    Conversation,
    Prompt,
    read_conversations,
    read_prompts,
)

USER = {"role": "user", "content": "How?"}
ANSWER = {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}

Reader = Callable[[Path], Iterator[Any]]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("f.jsonl")


def write(path: Path, *lines: object) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_prompts_are_read_from_messages_and_turns(file: Path) -> None:
    write(
        file,
        {"id": "a", "source": "x", "temperature": 0.5, "messages": [SYSTEM, USER]},
        {"id": 7, "turns": ["one", "two", "three"]},
        {"messages": [USER, ANSWER, USER]},
    )
    first = {"role": "user", "content": "one"}
    assert list(read_prompts(file)) == [
        Prompt("f.jsonl:1", "a", (SYSTEM, USER)),
        Prompt("f.jsonl:2", "7", (first,), ("two", "three")),
        Prompt("f.jsonl:3", "f-3", (USER, ANSWER, USER)),
    ]


def test_turns_win_over_messages_but_a_system_message_stays(file: Path) -> None:
    write(file, {"messages": [SYSTEM, USER, ANSWER], "turns": ["one", "two"]})
    (prompt,) = read_prompts(file)
    assert prompt.messages == (SYSTEM, {"role": "user", "content": "one"})
    assert prompt.later_turns == ("two",)


def test_conversations_are_read_from_messages_and_token_ids(file: Path) -> None:
    write(
        file,
        {"id": "a", "messages": [SYSTEM, USER, ANSWER, USER], "finish_reason": "length"},
        {"messages": [USER, ANSWER | {"name": None}]},
        {"token_ids": [5, 6, 0], "num_prompt": 2},
    )
    assert list(read_conversations(file)) == [
        Conversation("f.jsonl:1", (SYSTEM, USER, ANSWER, USER), "length"),
        Conversation("f.jsonl:2", (USER, ANSWER), None),
        CapturedConversation("f.jsonl:3", (5, 6, 0), 2),
    ]


def test_answers_to_other_prompts_are_left_out(file: Path) -> None:
    lines = [{"id": name, "messages": [USER, ANSWER]} for name in ("a", "b", "c")]
    write(file, *lines, {"messages": [USER, ANSWER]})
    found = read_conversations(file, {"c", "a", "elsewhere"})
    assert [conversation.where for conversation in found] == ["f.jsonl:1", "f.jsonl:3"]


def test_prompts_of_two_files_need_no_ids(file: Path) -> None:
    other = file.with_name("g.jsonl")
    for path in (file, other):
        write(path, {"turns": ["a"]}, {"turns": ["b"]})
    ids = [prompt.id for path in (file, other) for prompt in read_prompts(path)]
    assert ids == ["f-1", "f-2", "g-1", "g-2"]


def test_blank_lines_are_skipped_and_counted(file: Path) -> None:
    file.write_bytes(b'\n  \r\n{"turns": ["caf\xc3\xa9"]}\r\n\n{"turns": ["b"]}')
    assert [(p.where, p.id) for p in read_prompts(file)] == [
        ("f.jsonl:3", "f-3"),
        ("f.jsonl:5", "f-5"),
    ]


def test_lines_before_a_bad_one_are_given_first(file: Path) -> None:
    file.write_text('{"turns": ["a"]}\n{"turns": []}\n', encoding="utf-8")
    prompts = read_prompts(file)
    assert next(prompts).id == "f-1"
    with pytest.raises(ValueError, match=r"f\.jsonl:2: turns is "):
        next(prompts)


def test_an_id_that_comes_twice_is_refused(file: Path) -> None:
    write(file, {"id": "f-2", "turns": ["a"]}, {"turns": ["b"]})
    with pytest.raises(ValueError) as caught:
        list(read_prompts(file))
    assert str(caught.value) == "f.jsonl:2: id 'f-2' is that of f.jsonl:1 too"


ANY_FILE: list[tuple[bytes, str]] = [
    (b'{"turns": [', "f.jsonl:1: not valid JSON: Expecting value: line 1 column 12 (char 11)"),
    (b'\n{"a": "\xff"}', "f.jsonl:2: not UTF-8: byte 0xff at 7"),
    (b"[1, 2]", "f.jsonl:1: the line is [1, 2]; it must be a JSON object"),
    (b"null", "f.jsonl:1: the line is null; it must be a JSON object"),
    (b"[" * 100_000, "f.jsonl:1: not valid JSON: nested too deeply"),
    (
        b'{"messages": []}',
        "f.jsonl:1: messages is []; it must be a list of messages",
    ),
    (
        b'{"messages": "hello"}',
        'f.jsonl:1: messages is "hello"; it must be a list of messages',
    ),
    (
        b'{"messages": ["hello"]}',
        'f.jsonl:1: messages[0] is "hello"; it must be an object with role and content',
    ),
    (
        b'{"messages": [{"content": "a"}]}',
        'f.jsonl:1: messages[0].role is null; it must be "system" or "user"',
    ),
    (
        b'{"messages": [{"role": "tool", "content": "a"}]}',
        'f.jsonl:1: messages[0].role is "tool"; it must be "system" or "user"',
    ),
    (
        b'{"messages": [{"role": "assistant", "content": "a"}]}',
        'f.jsonl:1: messages[0].role is "assistant"; it must be "system" or "user"',
    ),
    (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        'f.jsonl:1: messages[1].role is "user"; it must be "assistant"',
    ),
    (
        b'{"messages": [{"role": "user", "content": " \\n"}]}',
        'f.jsonl:1: messages[0].content is " \\n"; it must be a text that is not empty',
    ),
    (
        b'{"messages": [{"role": "user", "content": ["a"]}]}',
        'f.jsonl:1: messages[0].content is ["a"]; it must be a text that is not empty',
    ),
    (
        b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
        "f.jsonl:1: messages[0].tool_calls is not supported; role and content are",
    ),
]
PROMPTS: list[tuple[bytes, str]] = [
    (b"", f"f.jsonl:0: the file is empty; a line is {PROMPT_LINE}"),
    (b"\n \n", f"f.jsonl:2: the file is empty; a line is {PROMPT_LINE}"),
    (b'{"prompt": "a"}', f"f.jsonl:1: neither messages nor turns; a line is {PROMPT_LINE}"),
    (b'{"turns": "a"}', 'f.jsonl:1: turns is "a"; it must be a list of texts'),
    (
        b'{"turns": ["a", ""]}',
        'f.jsonl:1: turns[1] is ""; it must be a text that is not empty',
    ),
    (b'{"turns": [3]}', "f.jsonl:1: turns[0] is 3; it must be a text that is not empty"),
    (
        b'{"id": 1.5, "turns": ["a"]}',
        "f.jsonl:1: id is 1.5; it must be a text or an integer",
    ),
    (
        b'{"id": true, "turns": ["a"]}',
        "f.jsonl:1: id is true; it must be a text or an integer",
    ),
    (
        json.dumps({"messages": [USER, ANSWER]}).encode(),
        'f.jsonl:1: messages[1].role is "assistant"; '
        'it must be "user" in the last message of a prompt',
    ),
    (
        json.dumps({"turns": {"x" * 70: 1}}).encode(),
        'f.jsonl:1: turns is {"' + "x" * 58 + "...; it must be a list of texts",
    ),
]
CONVERSATIONS: list[tuple[bytes, str]] = [
    (b"", f"f.jsonl:0: the file is empty; a line is {CONVERSATION_LINE}"),
    (
        b'{"turns": ["a"]}',
        f"f.jsonl:1: neither messages nor token_ids; a line is {CONVERSATION_LINE}",
    ),
    (
        b'{"messages": [], "token_ids": []}',
        f"f.jsonl:1: both messages and token_ids; a line is {CONVERSATION_LINE}",
    ),
    (
        json.dumps({"messages": [SYSTEM, USER]}).encode(),
        "f.jsonl:1: messages hold no answer; one must be of the assistant",
    ),
    (
        json.dumps({"messages": [USER, ANSWER], "finish_reason": "eos"}).encode(),
        'f.jsonl:1: finish_reason is "eos"; it must be "stop", "length" or null',
    ),
    (
        b'{"token_ids": 5, "num_prompt": 1}',
        "f.jsonl:1: token_ids is 5; it must be a list of integers from 0",
    ),
    (
        b'{"token_ids": [5, true], "num_prompt": 1}',
        "f.jsonl:1: token_ids[1] is true; it must be an integer from 0",
    ),
    (
        b'{"token_ids": [5, -1], "num_prompt": 1}',
        "f.jsonl:1: token_ids[1] is -1; it must be an integer from 0",
    ),
    (
        b'{"token_ids": [5], "num_prompt": 1}',
        "f.jsonl:1: token_ids is [5]; it must be a prompt and an answer, 2 tokens or more",
    ),
    (
        b'{"token_ids": [5, 6]}',
        "f.jsonl:1: num_prompt is null; it must be 1 to 1, so that an answer is left",
    ),
    (
        b'{"token_ids": [5, 6, 7], "num_prompt": 3}',
        "f.jsonl:1: num_prompt is 3; it must be 1 to 2, so that an answer is left",
    ),
    (
        b'{"token_ids": [5, 6, 7], "num_prompt": 0}',
        "f.jsonl:1: num_prompt is 0; it must be 1 to 2, so that an answer is left",
    ),
]
BAD: list[tuple[Reader, bytes, str]] = [
    *((reader, *case) for reader in (read_prompts, read_conversations) for case in ANY_FILE),
    *((read_prompts, *case) for case in PROMPTS),
    *((read_conversations, *case) for case in CONVERSATIONS),
]


def a_name(value: object) -> str:
    """A test's part of a name, the same in every process."""
    return str(getattr(value, "__name__", value))[:40]


@pytest.mark.parametrize(("reader", "content", "message"), BAD, ids=a_name)
def test_a_bad_line_is_refused_in_these_words(
    file: Path, reader: Reader, content: bytes, message: str
) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(reader(file))
    assert str(caught.value) == message


@pytest.mark.parametrize("reader", [read_prompts, read_conversations])
def test_a_file_that_is_not_there_is_an_os_error(file: Path, reader: Reader) -> None:
    with pytest.raises(FileNotFoundError):
        list(reader(file))
