"""Answers of a tiny random model equal those of the offline engine, for any order, concurrency and
interruption."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drafter.train.answers.generate import (
    GenerationReport,
    GenerationSettings,
    generate_answers,
    progress_bar,
    sampling_of,
)
from drafter.train.data.conversations import Prompt, read_conversations
from engine.checkpoints.source import ModelFiles
from engine.core import EngineCore
from engine.messages import Abort, Submit
from engine.request import Request
from kernels.ops import Ops
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import ChatCodec
from server.text.template.chat_template import ChatTemplate
from server.text.tokens.tokenizer_files import load_tokenizer
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.models.tiny_llama import write_tokenizer

VOCAB = 384
# Every ninth token ends a text, so that many answers stop, some immediately.
EOS_IDS = frozenset(range(2, VOCAB, 9))
SETTINGS = GenerationSettings(max_tokens=12, max_turns=3, concurrency=5, seed=3)
TURNS = ("a server answers", "the lazy dog?", "def main():", "once more")
LONG = "jumps over " * 200  # more than the context of 256 tokens


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder, VOCAB)
    tokenizer = load_tokenizer(ModelFiles("hf", folder, "tiny"), folder, None)
    return ChatCodec(tokenizer, ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens))


@pytest.fixture(scope="module")
def tiny(native_ops: Ops) -> TinyEngine:
    return TinyEngine(random_llama(vocab_size=VOCAB), native_ops, eos_token_ids=EOS_IDS)


def prompt(prompt_id: str, *turns: str) -> Prompt:
    return Prompt(f"f:{prompt_id}", prompt_id, ({"role": "user", "content": turns[0]},), turns[1:])


PROMPTS = [prompt(f"p{n}", f"{n}: {TURNS[n % 4]}", *TURNS[: n % 5]) for n in range(30)]


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by id; each id occurs once."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def one_by_one(
    tiny: TinyEngine, codec: ChatCodec, prompts: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """The expected lines: every turn runs alone in the offline engine."""
    engine = OfflineEngine(tiny.build())
    lines: dict[str, dict[str, Any]] = {}
    for one in prompts:
        params = sampling_of(one.id, SETTINGS)
        turns = [one.messages[0]["content"], *one.later_turns][: SETTINGS.max_turns]
        messages: list[dict[str, str]] = []
        reason = None
        for turn in turns:
            asked = [*messages, {"role": "user", "content": turn}]
            ids = codec.encode(asked, True)
            done = engine.generate([Request(request_id="x", prompt_ids=ids, params=params)])["x"]
            assert done.finished is not None
            stopped = done.finished.reason == "stop"
            text = codec.decode(done.token_ids[:-1] if stopped else done.token_ids)
            text = text if stopped else text.rstrip("\ufffd")
            if not text.strip():
                break
            messages = [*asked, {"role": "assistant", "content": text}]
            reason = done.finished.reason.value
            if not stopped:
                break
        if messages:
            lines[one.id] = {
                "id": one.id,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "finish_reason": reason,
                "messages": messages,
            }
    return lines


@pytest.fixture(scope="module")
def expected(tiny: TinyEngine, codec: ChatCodec) -> dict[str, dict[str, Any]]:
    return one_by_one(tiny, codec, PROMPTS)


def test_answers_are_those_of_the_offline_engine_turn_by_turn(
    tiny: TinyEngine, codec: ChatCodec, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    report = generate_answers(tiny.build(), codec, PROMPTS, path, SETTINGS)
    assert lines_of(path) == expected
    assert report.num_answered == len(expected)
    assert report.num_empty == len(PROMPTS) - len(expected) > 0
    assert report.num_done == report.num_total == len(PROMPTS)
    # The prompts cover all temperatures, both finish reasons, and one to three turns.
    assert {line["temperature"] for line in expected.values()} == {0.0, 0.8, 1.0}
    assert {line["finish_reason"] for line in expected.values()} == {"stop", "length"}
    assert {len(line["messages"]) for line in expected.values()} == {2, 4, 6}


def test_what_is_written_reads_as_conversations(
    tiny: TinyEngine, codec: ChatCodec, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    generate_answers(tiny.build(), codec, PROMPTS, path, SETTINGS)
    assert len(list(read_conversations(path))) == len(lines_of(path))


def test_answers_to_other_prompts_are_not_taken_for_those_asked_now(
    tiny: TinyEngine, codec: ChatCodec, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    first, second = PROMPTS[:2]
    generate_answers(tiny.build(), codec, [first], path, SETTINGS)
    before = path.read_bytes()
    changed = replace(second, id=first.id)
    with pytest.raises(ValueError, match=r"has an answer under its id, .* to another prompt"):
        generate_answers(tiny.build(), codec, [changed], path, SETTINGS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("concurrency", [1, 64])
def test_neither_order_nor_concurrency_changes_an_answer(
    tiny: TinyEngine,
    codec: ChatCodec,
    expected: dict[str, dict[str, Any]],
    tmp_path: Path,
    concurrency: int,
) -> None:
    path = tmp_path / "out.jsonl"
    settings = replace(SETTINGS, concurrency=concurrency)
    generate_answers(tiny.build(), codec, PROMPTS[::-1], path, settings)
    assert lines_of(path) == expected


@pytest.mark.parametrize("steps", [1, 15, 40])
@pytest.mark.parametrize("torn_bytes", [0, 1, 30])
def test_an_interrupted_run_goes_on_to_the_same_lines(
    tiny: TinyEngine,
    codec: ChatCodec,
    expected: dict[str, dict[str, Any]],
    tmp_path: Path,
    steps: int,
    torn_bytes: int,
) -> None:
    path = tmp_path / "out.jsonl"
    left = iter(range(steps))

    def interrupt(report: GenerationReport) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_answers(tiny.build(), codec, PROMPTS, path, SETTINGS, interrupt)
    num_kept = len(lines_of(path))
    with path.open("ab") as file:  # as if killed while writing
        file.write(b'{"id": "p29", "temperature": 0.8, "top'[:torn_bytes])
    report = generate_answers(tiny.build(), codec, PROMPTS, path, SETTINGS)
    assert report.num_earlier == num_kept < len(expected)
    assert report.num_answered == len(expected) - num_kept
    assert lines_of(path) == expected


def test_a_finished_file_is_left_as_it_is(
    tiny: TinyEngine, codec: ChatCodec, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    answered = [p for p in PROMPTS if p.id in ("p0", "p1")]
    generate_answers(tiny.build(), codec, answered, path, SETTINGS)
    content = path.read_bytes()
    report = generate_answers(tiny.build(), codec, answered, path, SETTINGS)
    assert path.read_bytes() == content
    assert (report.num_earlier, report.num_answered, report.num_tokens) == (2, 0, 0)


def test_limit_takes_the_first_prompts(
    tiny: TinyEngine, codec: ChatCodec, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    report = generate_answers(tiny.build(), codec, PROMPTS, path, replace(SETTINGS, limit=7))
    first = {one.id for one in PROMPTS[:7]}
    assert lines_of(path) == {name: line for name, line in expected.items() if name in first}
    assert report.num_total == 7


def test_prompts_that_are_too_long_are_counted_and_answers_before_them_kept(
    tiny: TinyEngine, codec: ChatCodec, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    stopping = next(
        one
        for one in PROMPTS
        if one.later_turns and len(expected.get(one.id, {"messages": ()})["messages"]) > 2
    )
    prompts = [prompt("long", LONG), replace(stopping, later_turns=(LONG,)), PROMPTS[0]]
    report = generate_answers(tiny.build(), codec, prompts, path, SETTINGS)
    lines = lines_of(path)
    assert lines.keys() == {stopping.id, "p0"}
    assert lines[stopping.id]["messages"] == expected[stopping.id]["messages"][:2]
    assert lines[stopping.id]["finish_reason"] == "stop"
    assert (report.num_refused, report.num_answered, report.num_done) == (1, 2, 3)
    assert report.refusal is not None
    assert report.refusal.startswith("f:long: This model's maximum context length is 256 tokens")


class CountingCore:
    """Records how many requests are in the engine at each step."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.info = core.info
        self.open = 0
        self.seen: list[int] = []

    def add(self, message: Submit | Abort) -> None:
        self.open += 1
        self._core.add(message)

    def step(self) -> list[Any]:
        self.seen.append(self.open)
        events = self._core.step()
        self.open -= sum(type(event).__name__ == "Finished" for event in events)
        return events


def test_the_engine_is_kept_full_until_no_prompt_waits(
    tiny: TinyEngine, codec: ChatCodec, tmp_path: Path
) -> None:
    core = CountingCore(tiny.build())
    generate_answers(core, codec, PROMPTS, tmp_path / "out.jsonl", SETTINGS)  # type: ignore[arg-type]
    draining = core.seen.index(4)
    assert set(core.seen[:draining]) == {5}
    assert core.seen[draining:] == sorted(core.seen[draining:], reverse=True)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes after `num_bytes` fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_leaves_complete_lines(
    tiny: TinyEngine, codec: ChatCodec, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    core = tiny.build()
    with (
        pytest.raises(OSError, match="the lines before are complete; run again") as caught,
        file_size_limit(1000),
    ):
        generate_answers(core, codec, PROMPTS, path, SETTINGS)
    assert caught.value.filename == str(path)
    assert path.read_bytes().endswith(b"\n")
    assert 0 < len(lines_of(path)) < len(expected)
    generate_answers(tiny.build(), codec, PROMPTS, path, SETTINGS)
    assert lines_of(path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "p0", "turns": ["a"]}\n{"id": "p', "out.jsonl:1: not a line of generated answers"),
        ('{"id": 3, "finish_reason": "stop"}\n', "out.jsonl:1: not a line of generated answers"),
        ("my notes", "out.jsonl:1: not a line of generated answers"),
        ("my notes\n", "out.jsonl:1: not valid JSON"),
        ('{"id": "a", "finish_reason": "stop"}\n', "out.jsonl:1: not a line of generated answers"),
        (
            '{"id": "a", "finish_reason": "stop", "messages": []}\n[]\n',
            "out.jsonl:2: the line is []",
        ),
    ],
)
def test_some_other_file_is_refused_and_left_alone(
    tiny: TinyEngine, codec: ChatCodec, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        generate_answers(tiny.build(), codec, PROMPTS, path, SETTINGS)
    assert message in str(caught.value)
    assert path.read_text(encoding="utf-8") == content


def test_prompts_that_share_an_id_are_refused(
    tiny: TinyEngine, codec: ChatCodec, tmp_path: Path
) -> None:
    prompts = [replace(prompt("a", "x"), where="f:1"), replace(prompt("a", "y"), where="g:2")]
    with pytest.raises(ValueError, match=r"^g:2: id .a. is that of f:1 too"):
        generate_answers(tiny.build(), codec, prompts, tmp_path / "out.jsonl", SETTINGS)


def test_a_prompt_that_cannot_be_encoded_names_its_line(
    tiny: TinyEngine, codec: ChatCodec, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^f:a: text is not valid Unicode"):
        generate_answers(
            tiny.build(), codec, [prompt("a", "\ud800")], tmp_path / "out.jsonl", SETTINGS
        )


def test_temperatures_follow_their_shares_and_seeds_differ() -> None:
    settings = GenerationSettings()
    drawn = [sampling_of(f"source-{n:05}", settings) for n in range(8000)]
    for temperature, top_p, share in settings.temperatures:
        kind = [params for params in drawn if params.temperature == temperature]
        assert len(kind) / len(drawn) == pytest.approx(share, abs=0.02)
        assert {params.top_p for params in kind} == {top_p}
    assert len({params.seed for params in drawn}) == len(drawn)
    other = [sampling_of(f"source-{n:05}", GenerationSettings(seed=1)) for n in range(100)]
    assert all(one.seed != two.seed for one, two in zip(other, drawn, strict=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"max_turns": 0}, "max_turns is 0; it must be 1 or more"),
        ({"concurrency": -1}, "concurrency is -1; it must be 1 or more"),
        ({"limit": 0}, "limit is 0; it must be 1 or more"),
        ({"temperatures": ()}, "the shares of temperatures add up to 0; it must be 1"),
        (
            {"temperatures": ((0.0, 1.0, 0.5), (1.0, 1.0, 0.4))},
            "the shares of temperatures add up to 0.9; it must be 1",
        ),
        (
            {"temperatures": ((-1.0, 1.0, 1.0),)},
            "temperatures has (-1.0, 1.0, 1.0); allowed are a temperature of 0 to 2, a top_p above "
            "0 up to 1 and a share above 0 up to 1",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        GenerationSettings(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_shows_on_a_terminal_only(terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    with progress_bar(console) as show:
        show(GenerationReport(40, num_earlier=10, num_answered=5, num_tokens=900, seconds=2.0))
    assert ("15/40" in shown.getvalue()) == terminal
    assert ("450 tokens/s" in shown.getvalue()) == terminal
    assert bool(shown.getvalue()) == terminal
