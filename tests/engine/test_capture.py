"""Sequences on disk: complete shards, within limits, without delaying a step."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest
from pydantic import ValidationError

from configs.schema import CaptureConfig
from engine.capture import (
    QUEUE_SIZE,
    CapturedSequence,
    CaptureWriter,
    ShardWriter,
    is_sampled,
)
from engine.core import EngineCore
from engine.messages import Abort, Finished, Submit
from engine.request import FinishReason, Sequence
from tests.support.engines.fake_executor import FakeEngine
from tests.support.engines.in_process import ask, generate
from tests.support.engines.scripted_engine import INFO
from tests.support.waiting import DEADLINE

Line = dict[str, Any]


@pytest.fixture(autouse=True)
def _patience_with_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.capture.CLOSING", DEADLINE)


def settings(folder: Path, **changes: object) -> CaptureConfig:
    fields = {"dir": folder, "consent": True, "sample_rate": 1.0} | changes
    return CaptureConfig.model_validate(fields)


def ended(name: str, num_prompt: int = 3, num_output: int = 2) -> Sequence:
    request = ask(name, list(range(1, num_prompt + 1)), temperature=0.5)
    seq = Sequence.from_request(request)
    seq.own_tokens()
    seq.token_ids += range(100, 100 + num_output)
    return seq


def shards(folder: Path) -> dict[str, list[Line]]:
    return {
        path.name: [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        for path in sorted(folder.iterdir())
    }


def open_writer(config: CaptureConfig, queue_size: int = QUEUE_SIZE) -> CaptureWriter:
    assert config.dir is not None
    into = ShardWriter(config.dir, config.max_bytes, config.shard_tokens)
    return CaptureWriter(into, config.sample_rate, queue_size)


def write(config: CaptureConfig, *sequences: Sequence) -> CaptureWriter:
    writer = open_writer(config)
    writer.start()
    for seq in sequences:
        writer.take(seq, FinishReason.STOP)
    writer.close()
    return writer


def line(seq: Sequence) -> Line:
    return {"token_ids": seq.token_ids, "num_prompt": seq.num_prompt, "temperature": 0.5}


def line_size() -> int:
    seq = ended("a")
    return len(msgspec.json.encode(CapturedSequence(seq.token_ids, seq.num_prompt, 0.5))) + 1


def test_an_engine_captures_the_texts_of_its_requests(tmp_path: Path) -> None:
    writer = open_writer(settings(tmp_path / "new" / "folder"))
    fake = FakeEngine(on_finish=writer.take)
    core = EngineCore(fake.scheduler, fake.executor, INFO, captured=writer)
    writer.start()
    asked = [
        ask(f"r{n}", [1] * (n + 1), max_tokens=3 + n, ignore_eos=True, temperature=n / 4)
        for n in range(5)
    ]
    heard = generate(core, asked)
    writer.close()
    (found,) = shards(tmp_path / "new" / "folder").values()
    expected = [
        {
            "token_ids": request.prompt_ids + heard[request.request_id].token_ids,
            "num_prompt": len(request.prompt_ids),
            "temperature": request.params.temperature,
        }
        for request in asked
    ]
    assert sorted(found, key=lambda row: int(row["num_prompt"])) == expected
    assert (core.stats().num_captured, core.stats().num_capture_dropped) == (5, 0)


def test_aborted_text_is_captured_and_failed_or_empty_text_is_not(tmp_path: Path) -> None:
    writer = open_writer(settings(tmp_path))
    fake = FakeEngine(on_finish=writer.take)
    core = EngineCore(fake.scheduler, fake.executor, INFO, captured=writer)
    writer.start()
    for name in ("stopped-by-client", "silent", "failed"):
        core.add(Submit(ask(name, [1, 2], max_tokens=50, ignore_eos=True)))
        if name == "silent":
            core.add(Abort(name))
        core.step()
    core.add(Abort("stopped-by-client"))
    events = core.step()
    assert any(isinstance(event, Finished) for event in events)
    core.abort_all("the end")
    writer.close()
    (found,) = shards(tmp_path).values()
    assert [len(row["token_ids"]) > row["num_prompt"] for row in found] == [True]


def test_shards_end_after_their_tokens_and_numbers_continue(tmp_path: Path) -> None:
    sequences = [ended(str(n), num_prompt=4 + n % 3) for n in range(9)]
    config = settings(tmp_path, shard_tokens=12)  # two sequences
    write(config, *sequences[:5])
    write(config)
    write(config, *sequences[5:])
    found = shards(tmp_path)
    assert list(found) == [f"captured-{n:05}.jsonl" for n in range(5)]
    assert [row for rows in found.values() for row in rows] == [line(seq) for seq in sequences]
    assert [len(rows) for rows in found.values()] == [2, 2, 1, 2, 2]


def test_numbers_pass_over_a_shard_that_was_never_completed(tmp_path: Path) -> None:
    left = tmp_path / "captured-00007.jsonl.part"
    left.write_text("half a li")
    write(settings(tmp_path), ended("a"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "captured-00007.jsonl.part",
        "captured-00008.jsonl",
    ]
    assert left.read_text() == "half a li"


def test_a_shard_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path, 10**6, shard_tokens=10)
    shard.write(b"1\n", 9)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    shard.write(b"2\n", 1)
    (path,) = tmp_path.iterdir()
    assert (path.name, path.read_bytes()) == ("captured-00000.jsonl", b"1\n2\n")


def test_only_the_owner_can_read_shards(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        write(settings(tmp_path / "shards"), ended("a"))
    finally:
        os.umask(mask)
    (path,) = (tmp_path / "shards").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("room", [0, 1, 3])
def test_capturing_stops_at_max_bytes_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    max_bytes = room * line_size() + line_size() - 1
    config = settings(tmp_path, max_bytes=max_bytes, shard_tokens=10)
    with caplog.at_level(logging.INFO):
        writer = write(config, *(ended(f"{n}") for n in range(6)))
    assert len([r for r in caplog.records if "capture.max_bytes" in r.message]) == 1
    assert sum(len(rows) for rows in shards(tmp_path).values()) == room
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= max_bytes
    assert 6 - writer.num_dropped == room
    write(config, ended("later"))
    assert sum(len(rows) for rows in shards(tmp_path).values()) == room, "of all runs together"


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    writer = open_writer(settings(tmp_path), queue_size=2)
    for n in range(5):  # nothing takes from the queue yet
        writer.take(ended(str(n)), FinishReason.LENGTH)
    assert (writer.num_captured, writer.num_dropped) == (2, 3)
    writer.start()
    writer.close()
    assert [len(rows) for rows in shards(tmp_path).values()] == [2]


class FullDisk:
    """A file on a disk with room for `room` lines."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, line: bytes) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_capturing_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fdopen(number: int, mode: str) -> FullDisk:
        os.close(number)
        return FullDisk(room=2)

    monkeypatch.setattr("engine.capture.os.fdopen", fdopen)
    writer = write(settings(tmp_path), *(ended(str(n)) for n in range(6)))
    (record,) = [r for r in caplog.records if r.name == "engine.capture"]
    assert record.levelno == logging.ERROR
    assert "No space left on device" in record.message
    assert list(tmp_path.iterdir()) == [], "the space is given back"
    assert writer.num_dropped == 6
    before = writer.num_captured
    writer.take(ended("later"), FinishReason.STOP)
    assert (writer.num_captured, writer.num_dropped) == (before, 7)


def test_a_shard_that_cannot_be_opened_loses_the_sequence_it_was_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_writer(settings(tmp_path, shard_tokens=10))  # two sequences
    for n in range(5):
        writer.take(ended(str(n)), FinishReason.STOP)
    opened, open_shard = 0, ShardWriter._open

    def fail_the_second(shard: ShardWriter) -> BinaryIO:
        nonlocal opened
        opened += 1
        if opened == 2:
            raise OSError(28, "No space left on device")
        return open_shard(shard)

    monkeypatch.setattr(ShardWriter, "_open", fail_the_second)
    writer.start()
    writer.close()
    assert (writer.num_captured, writer.num_dropped) == (5, 3)
    assert sum(len(rows) for rows in shards(tmp_path).values()) == 2


def test_taking_never_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(
        ShardWriter, "write", lambda shard, text, num_tokens: held.wait(DEADLINE) and None
    )
    writer = open_writer(settings(tmp_path), queue_size=3)
    writer.start()
    for n in range(50):
        writer.take(ended(str(n)), FinishReason.STOP)
    assert writer.num_captured + writer.num_dropped == 50
    assert writer.num_dropped >= 46
    held.set()
    writer.close()


def test_the_sample_is_a_share_and_depends_on_the_request_alone(tmp_path: Path) -> None:
    names = [f"req_{n}-0" for n in range(4000)]
    kept = {name for name in names if is_sampled(name, 0.25)}
    assert abs(len(kept) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert kept < {name for name in names if is_sampled(name, 0.5)}
    assert not any(is_sampled(name, 0.0) for name in names)
    assert all(is_sampled(name, 1.0) for name in names)
    writer = write(settings(tmp_path, sample_rate=0.25), *(ended(name) for name in names[:99]))
    assert writer.num_captured + writer.num_dropped == len(kept.intersection(names[:99]))


@pytest.mark.parametrize("consent", [False, None])
def test_a_directory_without_consent_is_refused(tmp_path: Path, consent: bool | None) -> None:
    fields = {"dir": tmp_path} | ({} if consent is None else {"consent": consent})
    with pytest.raises(ValidationError, match=r"capture\.consent is not true: captured token ids"):
        CaptureConfig.model_validate(fields)


def test_consent_alone_captures_nothing() -> None:
    assert CaptureConfig(consent=True).dir is None


def test_a_directory_that_cannot_be_made_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"capture\.dir .*file/below cannot be used"):
        open_writer(settings(tmp_path / "file" / "below"))
