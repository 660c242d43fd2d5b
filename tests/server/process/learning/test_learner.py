"""A head that learns while serving: what it learns from, when it may run, and which head stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from configs.schema import Config
from configs.training import HostTrainingConfig
from engine.messages import DraftFacts, DraftSwapped
from server.http.monitoring.learning import Learning
from server.process.learning.captured_text import HELD_OUT, complete_shards, prepare
from server.process.learning.learner import Learner, TrainingProcess, measured
from tests.support.configurations import hosted
from tests.support.waiting import until

FIRST = DraftFacts("/heads/first", "eagle3", 2, 32, 1000)


@dataclass
class Facts:
    """What a learner reads of `EngineInfo` and `EngineStats`."""

    draft: DraftFacts | None = FIRST
    device: str = "cpu"
    max_model_len: int = 200
    num_drafts: int = 0
    num_accepted_tokens: int = 0


@dataclass
class FakeClient:
    """An engine that drafts `rates[path]` tokens per tree."""

    info: Any = field(default_factory=Facts)
    awaits_engine: bool = False
    on_busy: Callable[[bool], None] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    refusal: str | None = None
    swaps: list[str | None] = field(default_factory=list)

    @property
    def stats(self) -> Any:
        """A hundred trees between any two looks."""
        self.info.num_drafts += 100
        rate = self.rates.get(Path(self.info.draft.path).name, 1.0)
        self.info.num_accepted_tokens += int(100 * rate)
        return Facts(
            num_drafts=self.info.num_drafts, num_accepted_tokens=self.info.num_accepted_tokens
        )

    async def swap_draft(self, path: str | None) -> DraftSwapped:
        self.swaps.append(path)
        assert path is not None
        if self.refusal is None:
            self.info.draft = DraftFacts(path, "eagle3", 2, 32, 1000)
        return DraftSwapped("swap", self.info.draft, self.refusal)


@dataclass
class FakeTraining:
    """Ends when told; notes when it may run."""

    code: int = 0
    runs: list[bool] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def let_run(self, *, runs: bool) -> None:
        self.runs.append(runs)

    def kill(self) -> None:
        self.ended.set()

    async def wait(self) -> int:
        await self.ended.wait()
        return self.code


@dataclass
class Lab:
    """A learner whose rounds end at once, with the given lengths before and after."""

    folder: Path
    lengths: tuple[float, float] = (1.5, 1.6)
    code: int = 0
    at_once: bool = True
    client: FakeClient = field(default_factory=FakeClient)
    learning: Learning = field(default_factory=Learning)
    configs: list[HostTrainingConfig] = field(default_factory=list)
    trainings: list[FakeTraining] = field(default_factory=list)

    def config(self, **speculation: object) -> Any:
        settings = {"learn": True, "learn_trial": 200} | speculation
        return hosted(
            Config.model_validate(
                {
                    "speculation": settings,
                    "capture": {"dir": self.folder, "consent": True},
                }
            )
        )

    def learner(self, **speculation: object) -> Learner:
        config = self.config(**speculation)
        return Learner(config, self.client, self.learning, self.start, poll=0.001, idle=0.001)

    async def start(self, config: HostTrainingConfig, log: Path) -> TrainingProcess:
        self.configs.append(config)
        output = config.run.output
        (output / "head").mkdir(parents=True)
        lines = [{"kind": "held out", "acceptance_length": each} for each in self.lengths]
        text = "".join(
            json.dumps(line) + "\n" for line in [*lines[:1], {"kind": "train"}, lines[1]]
        )
        (output / "history.jsonl").write_text(text)
        training = FakeTraining(self.code)
        self.trainings.append(training)
        if self.at_once:
            training.ended.set()
        return cast(TrainingProcess, training)

    def capture(self, number: int, num_lines: int = 80) -> None:
        lines = [{"token_ids": [number, i], "num_prompt": 1} for i in range(num_lines)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.folder / f"captured-{number:05}.jsonl").write_text(text)

    async def until(self, condition: Callable[[], bool], learner: Learner) -> None:
        """Run the learner until something is so."""
        task = asyncio.create_task(learner.run())
        try:
            await until(lambda: task.done() or condition())
            assert not task.done(), task
        finally:
            task.cancel()


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def run(lab: Lab, condition: Callable[[], bool], **speculation: object) -> None:
    async def body() -> None:
        learner = lab.learner(**speculation)
        lab.capture(1)
        await lab.until(condition, learner)

    lab.capture(0)
    asyncio.run(body())


def idle_after_round(lab: Lab) -> bool:
    return lab.learning.num_rounds > 0 and lab.learning.phase == "waiting"


def test_a_better_head_is_put_to_use_and_learnt_from_what_was_captured(lab: Lab) -> None:
    run(lab, lambda: idle_after_round(lab))
    found = lab.learning
    assert (found.num_rounds, found.num_adopted, found.num_reverted) == (1, 1, 0)
    assert (found.held_out_before, found.held_out_after, found.problem) == (1.5, 1.6, None)
    (config,) = lab.configs
    assert lab.client.swaps == [str(config.run.output / "head")]
    assert (config.head.init, config.head.num_layers) == (FIRST.path, 2)
    assert config.head.draft_vocab_size == FIRST.draft_vocab_size
    assert config.data.max_tokens < Facts().max_model_len
    trained, held_out = (
        path[0].read_text() for path in (config.data.conversations, config.data.measure_on)
    )
    assert trained.count("\n") + held_out.count("\n") == 160, "shards that were there, too"


@pytest.mark.parametrize(
    ("lengths", "code", "refusal", "problem"),
    [
        ((1.5, 1.505), 0, None, None),
        ((1.5, 1.6), 3, None, "training ended with exit code 3; see "),
        ((1.5, 1.6), 0, "no memory", "no memory"),
    ],
    ids=["not better", "training failed", "refused"],
)
def test_otherwise_the_head_stays(
    lab: Lab,
    lengths: tuple[float, float],
    code: int,
    refusal: str | None,
    problem: str | None,
) -> None:
    lab.lengths, lab.code, lab.client.refusal = lengths, code, refusal
    run(lab, lambda: idle_after_round(lab))
    assert lab.client.info.draft == FIRST
    assert lab.learning.num_adopted == 0
    assert lab.learning.num_failed == (0 if problem is None else 1)
    assert (lab.learning.problem or "").startswith(problem or "")


@pytest.mark.parametrize(("rate", "reverted"), [(0.99, 0), (0.5, 1)])
def test_a_head_that_accepts_less_of_live_requests_is_taken_back(
    lab: Lab, rate: float, reverted: int
) -> None:
    """The head before is known from enough trees: the fake engine counts 100 at every look."""
    lab.client.rates["head"] = rate
    run(lab, lambda: idle_after_round(lab), learn_trial=50)
    assert lab.learning.num_adopted == 1
    assert lab.learning.num_reverted == reverted
    assert (lab.client.info.draft.path == FIRST.path) == bool(reverted)


def test_a_head_that_an_administrator_chose_meanwhile_stays(lab: Lab) -> None:
    lab.at_once = False
    other = DraftFacts("/heads/other", "eagle3", 1, 32, 1000)

    def ready() -> bool:
        if lab.trainings and not lab.trainings[0].ended.is_set():
            lab.client.info.draft = other
            lab.trainings[0].ended.set()
        return idle_after_round(lab)

    run(lab, ready)
    assert lab.client.swaps == []
    assert lab.learning.num_adopted == 0


def test_training_stands_still_while_requests_run_or_an_operator_says_so(lab: Lab) -> None:
    lab.at_once = False

    async def body() -> None:
        learner = lab.learner()
        lab.capture(1)
        await lab.until(lambda: bool(lab.trainings) and lab.trainings[0].runs == [True], learner)

    async def with_requests() -> None:
        learner = lab.learner()
        task = asyncio.create_task(learner.run())
        lab.capture(2)
        await until(lambda: len(lab.trainings) == 2)
        training, busy = lab.trainings[1], lab.client.on_busy
        assert busy is not None
        busy(True)
        assert training.runs[-1] is False, "at once"
        assert lab.learning.interrupted
        busy(False)
        busy(True)
        await asyncio.sleep(0.01)
        assert training.runs[-1] is False, "another request came before the pause was over"
        busy(False)
        await until(lambda: training.runs[-1])
        lab.learning.pause(paused=True)
        assert training.runs[-1] is False
        busy(True)
        busy(False)
        await asyncio.sleep(0.01)
        assert training.runs[-1] is False
        lab.learning.pause(paused=False)
        assert training.runs[-1] is True
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert training.ended.is_set(), "it ends with the server"

    asyncio.run(body())
    asyncio.run(with_requests())


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (Facts(draft=None), "no draft head is in use"),
        (Facts(draft=DraftFacts("/h", "dflash", 1, 32, 9)), "only eagle3 heads learn"),
        (Facts(device="cuda:0 (H100)"), "a head learns on a CPU only"),
    ],
)
def test_why_there_is_no_learning_is_said(lab: Lab, facts: Facts, problem: str) -> None:
    lab.client.info = facts
    run(lab, lambda: (lab.learning.problem or "").startswith(problem))
    assert lab.configs == []


def test_too_little_text_is_said_and_more_is_awaited(lab: Lab) -> None:
    async def body() -> None:
        learner = lab.learner()
        lab.capture(0, num_lines=1)
        await lab.until(
            lambda: (lab.learning.problem or "").startswith("too few sequences: "), learner
        )
        lab.capture(1)
        await lab.until(lambda: idle_after_round(lab), learner)

    asyncio.run(body())
    assert lab.learning.num_adopted == 1
    assert lab.learning.problem is None


def test_what_is_held_out_depends_on_the_line_alone(lab: Lab) -> None:
    lab.capture(0, 400)
    shards = complete_shards(lab.folder)
    one = prepare(shards, lab.folder / "one")
    held_out = set(one.held_out.read_bytes().splitlines())
    lab.capture(1, 100)
    again = prepare(complete_shards(lab.folder), lab.folder / "two")
    assert not held_out & set(again.training.read_bytes().splitlines())
    assert 0 < one.num_held_out < 2 * 400 / HELD_OUT
    assert again.is_enough
    assert not prepare([], lab.folder / "none").is_enough
    assert one.training.stat().st_mode & 0o077 == 0


def test_a_history_without_two_measurements_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"kind": "held out", "acceptance_length": 1.5}\n')
    with pytest.raises(ValueError, match="before and after"):
        measured(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculation": {"learn": True}}, "capture.dir is not set"),
        (
            {
                "speculation": {"learn": True, "draft": None},
                "capture": {"dir": "x", "consent": True},
            },
            "speculation.draft is null",
        ),
        ({"speculation": {"learn": True}, "capture": {"dir": "x"}}, "capture.consent is not true"),
    ],
)
def test_learning_needs_text_consent_and_a_head(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(settings)
