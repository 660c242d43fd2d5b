"""The loop of the engine process, around a scripted engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from configs.load import load_config
from configs.schema import Config
from engine.capture import CaptureWriter, ShardWriter
from engine.core import EngineCore
from engine.messages import (
    Abort,
    ClientMessage,
    DraftSwapped,
    EngineFailed,
    EngineMessage,
    EngineStats,
    ErrorCode,
    Finished,
    Shutdown,
    Submit,
    SwapDraft,
    Tokens,
)
from engine.request import FinishReason
from server.process import engine_process
from server.process.channel.wire import decode_engine, encode, unbounded
from server.process.engine_process import STOPPING, EngineChannel
from tests.support.engines.fake_executor import FakeEngine, expected_text
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import INFO
from tests.support.waiting import DEADLINE


class Front:
    """The HTTP process's end of the ZeroMQ pair."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        unbounded(self._socket)
        self._socket.setsockopt(zmq.RCVTIMEO, int(1000 * DEADLINE))
        self._socket.bind(endpoint)
        self._heard: list[EngineMessage] = []

    def say(self, *messages: ClientMessage) -> None:
        self._socket.send(encode(messages))

    def hear(self) -> EngineMessage:
        while not self._heard:
            self._heard = decode_engine(self._socket.recv())
        return self._heard.pop(0)

    def until_finished(self, count: int) -> list[Tokens | Finished]:
        """Events up to the `count`-th `Finished`, without statistics."""
        events: list[Tokens | Finished] = []
        while sum(isinstance(event, Finished) for event in events) < count:
            event = self.hear()
            if isinstance(event, Tokens | Finished):
                events.append(event)
        return events

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class SlowSwaps:
    """Swaps whose loading takes a number of calls of `settle`."""

    def __init__(self, patience: int = 3) -> None:
        self._asked: list[SwapDraft] = []
        self._patience = patience

    @property
    def busy(self) -> bool:
        return bool(self._asked)

    def ask(self, message: SwapDraft) -> None:
        self._asked.append(message)

    def settle(self) -> list[DraftSwapped]:
        self._patience -= self.busy
        if self._patience or not self.busy:
            return []
        return [DraftSwapped(self._asked.pop().request_id)]


class Engine(threading.Thread):
    """An engine that serves on a thread; keeps its exception."""

    def __init__(
        self, core: EngineCore, endpoint: str, capture: CaptureWriter | None = None
    ) -> None:
        super().__init__(daemon=True)
        self._core = core
        self._endpoint = endpoint
        self._capture = capture
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            engine_process._serve(self._endpoint, self._core, SlowSwaps(), self._capture)
        except RuntimeError as error:
            self.error = error

    def ended(self) -> bool:
        self.join(DEADLINE)
        return not self.is_alive()


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/engine"


@pytest.fixture
def front(endpoint: str) -> Iterator[Front]:
    end = Front(endpoint)
    yield end
    end.close()


def core_of(fake: FakeEngine) -> EngineCore:
    return EngineCore(fake.scheduler, fake.executor, INFO)


def test_requests_run_until_shutdown(front: Front, endpoint: str) -> None:
    fake = FakeEngine()
    engine = Engine(core_of(fake), endpoint)
    engine.start()
    assert front.hear() == INFO
    a = ask("a", [1, 2, 3], max_tokens=5, ignore_eos=True)
    front.say(Submit(a))
    events = front.until_finished(1)
    text = [i for event in events if isinstance(event, Tokens) for i in event.token_ids]
    assert text == expected_text(a, fake.max_len, fake.vocab_size)
    front.say(Shutdown())
    assert engine.ended()
    assert engine.error is None


def test_what_was_captured_is_complete_at_the_end(
    front: Front, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.capture.CLOSING", DEADLINE)
    folder = tmp_path / "captured"
    capture = CaptureWriter(ShardWriter(folder, 10**6, 10**6), 1.0)
    fake = FakeEngine(on_finish=capture.take)
    capture.start()
    engine = Engine(EngineCore(fake.scheduler, fake.executor, INFO), endpoint, capture)
    engine.start()
    front.say(Submit(ask("a", [1, 2, 3], max_tokens=5, ignore_eos=True)))
    front.until_finished(1)
    assert [path.name for path in folder.glob("*.jsonl")] == []
    front.say(Shutdown())
    assert engine.ended()
    assert [path.name for path in folder.iterdir()] == ["captured-00000.jsonl"]


def test_shutdown_ends_open_requests_with_an_error(front: Front, endpoint: str) -> None:
    engine = Engine(core_of(FakeEngine()), endpoint)
    engine.start()
    requests = [ask(name, [1], max_tokens=50, ignore_eos=True) for name in ("a", "b")]
    front.say(*(Submit(request) for request in requests), Shutdown())
    ends = [event for event in front.until_finished(2) if isinstance(event, Finished)]
    assert engine.ended()
    assert {end.request_id for end in ends} == {"a", "b"}
    said = {(end.reason, end.error, end.error_code) for end in ends}
    assert said == {(FinishReason.ERROR, STOPPING, ErrorCode.STOPPING)}


def test_a_swap_is_answered_while_nothing_runs(
    front: Front, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "BEAT", DEADLINE)
    engine = Engine(core_of(FakeEngine()), endpoint)
    engine.start()
    assert front.hear() == INFO
    front.say(SwapDraft("swap", "/heads/new"))
    assert front.hear() == DraftSwapped("swap")
    front.say(Shutdown())
    assert engine.ended()


def test_an_idle_engine_shows_life_while_a_head_is_loaded(
    front: Front, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "BEAT", 0.0)
    engine = Engine(core_of(FakeEngine()), endpoint)
    engine.start()
    assert front.hear() == INFO
    front.say(SwapDraft("swap", "/heads/new"))
    assert isinstance(front.hear(), EngineStats)
    front.say(Shutdown())
    assert engine.ended()


def test_requests_go_on_while_a_head_is_loaded(front: Front, endpoint: str) -> None:
    fake = FakeEngine()
    engine = Engine(core_of(fake), endpoint)
    engine.start()
    a = ask("a", [1, 2, 3], max_tokens=9, ignore_eos=True)
    front.say(Submit(a), SwapDraft("swap", None))
    heard = []
    while not any(isinstance(event, Finished) for event in heard):
        heard.append(front.hear())
    text = [i for event in heard if isinstance(event, Tokens) for i in event.token_ids]
    assert text == expected_text(a, fake.max_len, fake.vocab_size)
    swapped = heard.index(DraftSwapped("swap"))
    assert any(isinstance(event, Tokens) for event in heard[:swapped])
    assert any(isinstance(event, Tokens) for event in heard[swapped:])
    front.say(Shutdown())
    assert engine.ended()


def test_an_abort_ends_a_request(front: Front, endpoint: str) -> None:
    engine = Engine(core_of(FakeEngine()), endpoint)
    engine.start()
    front.say(Submit(ask("a", [1], max_tokens=50, ignore_eos=True)), Abort("a"), Abort("nobody"))
    (end,) = front.until_finished(1)
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.ABORT
    front.say(Shutdown())
    assert engine.ended()


@pytest.mark.parametrize("part", ["launch", "collect"])
def test_an_exception_in_a_step_ends_every_request_and_the_process(
    front: Front, endpoint: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(step: object) -> None:
        raise RuntimeError("device lost at 0xdead")

    fake = FakeEngine()
    monkeypatch.setattr(fake.executor, part, fail)
    engine = Engine(core_of(fake), endpoint)
    engine.start()
    assert front.hear() == INFO
    front.say(*(Submit(ask(name, [1, 2])) for name in ("a", "b")))
    assert front.hear() == EngineFailed(), "before the requests end"
    ends = front.until_finished(2)
    assert engine.ended()
    assert str(engine.error) == "device lost at 0xdead"
    assert sorted(end.request_id for end in ends) == ["a", "b"]
    for end in ends:
        assert isinstance(end, Finished)
        assert end.reason is FinishReason.ERROR
        assert end.error == "the engine failed: RuntimeError", "no internals"


def test_all_waiting_messages_are_taken_together(front: Front, endpoint: str) -> None:
    channel = EngineChannel(endpoint)
    try:
        assert channel.receive(wait=False) == []
        front.say(Abort("a"), Abort("b"))
        assert channel.receive(wait=True) == [Abort("a"), Abort("b")]
    finally:
        channel.close()


def test_the_configuration_survives_the_way_to_the_engine() -> None:
    config = load_config(
        overrides=["files.dir=/a b/ü", "server.drain_timeout=1e3", "model.max_model_len=7"]
    )
    assert "\n" not in config.model_dump_json(), "it is read as one line"
    assert Config.model_validate_json(config.model_dump_json()) == config
