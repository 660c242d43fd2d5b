"""Lets the draft head learn from live requests: trains it in another process while no request runs,
puts it to use once it is better, and takes it back if live requests say otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from configs.env import engine_environment
from configs.resolve import HostConfig
from configs.training import (
    DataConfig,
    HeadSettings,
    HostTrainingConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
)
from engine.messages import DraftFacts, DraftSwapped, EngineInfo, EngineStats
from server.http.monitoring.learning import Learning
from server.process.learning.captured_text import Prepared, complete_shards, prepare

FOLDER = "learning"  # in capture.dir
POLL = 1.0  # seconds between looks at shards and counts
IDLE = 0.25  # seconds without requests before training goes on
NEWEST = 4  # shards that a round learns from
LONGEST = 1024  # tokens of an example
UNROLL, LEARNING_RATE, WARM_UP = 3, 5e-4, 5
BATCH_TOKENS = 1024
SLACK = 0.05  # share by which live acceptance may fall; it varies with what clients ask
LEAST_KNOWN = 4  # a head is judged by those before if they drafted learn_trial / 4 trees
LOWEST_PRIORITY = 19

logger = logging.getLogger(__name__)


class Client(Protocol):
    """What a learner needs of the engine's client."""

    on_busy: Callable[[bool], None] | None

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def stats(self) -> EngineStats | None: ...

    @property
    def awaits_engine(self) -> bool: ...

    async def swap_draft(self, path: str | None) -> DraftSwapped: ...


class TrainingProcess:
    """One round of training, which can stand still."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: HostTrainingConfig, log: Path) -> TrainingProcess:
        """OSError if the process cannot be started, or `log` cannot be written."""
        log.touch(mode=0o600)
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", f"{__package__}.trainee"),
                stdin=asyncio.subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=engine_environment(),
                start_new_session=True,
            )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST_PRIORITY)
        assert process.stdin is not None
        process.stdin.write(config.model_dump_json().encode() + b"\n")
        return cls(process)

    def let_run(self, *, runs: bool) -> None:
        self._signal(signal.SIGCONT if runs else signal.SIGSTOP)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def wait(self) -> int:
        return await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


Start = Callable[[HostTrainingConfig, Path], Awaitable[TrainingProcess]]


@dataclass(frozen=True, slots=True)
class Counts:
    """Trees and accepted tokens of one engine until some time."""

    num_drafts: int = 0
    num_accepted: int = 0

    @classmethod
    def of(cls, stats: EngineStats | None) -> Counts:
        return cls() if stats is None else cls(stats.num_drafts, stats.num_accepted_tokens)

    def since(self, earlier: Counts) -> Counts | None:
        """None where another engine counts."""
        if self.num_drafts < earlier.num_drafts:
            return None
        return Counts(
            self.num_drafts - earlier.num_drafts, self.num_accepted - earlier.num_accepted
        )

    @property
    def rate(self) -> float:
        """Accepted tokens per tree."""
        return self.num_accepted / max(self.num_drafts, 1)


class Learner:
    """One per server; runs on the event loop of the HTTP process."""

    def __init__(
        self,
        config: HostConfig,
        client: Client,
        learning: Learning,
        start: Start = TrainingProcess.start,
        poll: float = POLL,
        idle: float = IDLE,
    ) -> None:
        assert config.capture.dir is not None
        self._config = config
        self._client = client
        self._learning = learning
        self._start = start
        self._poll = poll
        self._idle = idle
        self._folder = config.capture.dir / FOLDER
        self._seen = set(complete_shards(config.capture.dir))
        self._training: TrainingProcess | None = None
        self._is_busy = client.awaits_engine
        self._timer: asyncio.TimerHandle | None = None
        self._shortcoming: str | None = None  # of the newest round
        self._since = Counts()  # counts when the head in use began to draft
        self._round = max(map(_number, self._folder.glob("round-*")), default=0)
        client.on_busy = self._note_busy
        learning.on_pause = self._apply

    async def run(self) -> None:
        """Learn until cancelled."""
        try:
            while True:
                await self._one_round()
        finally:
            self._client.on_busy = None
            if self._training is not None:
                self._training.kill()

    async def _one_round(self) -> None:
        shards = await self._new_text()
        info = self._client.info
        base = None if info is None else info.draft
        if info is None or base is None or self._problem(info) is not None:
            await asyncio.sleep(self._poll)
            return
        self._shortcoming = self._learning.problem = None
        self._seen.update(shards)
        self._round += 1
        folder = self._folder / f"round-{self._round:05}"
        try:
            text = await asyncio.to_thread(prepare, shards[-NEWEST:], folder)
            if text.is_enough:
                await self._learn(base, info, text, folder)
            else:
                self._shortcoming = (
                    f"too few sequences: {text.num_training} to learn from and "
                    f"{text.num_held_out} to measure on; more are awaited"
                )
        except (OSError, ValueError) as error:
            self._failed(str(error))
        finally:
            self._learning.phase = "waiting"
            await asyncio.to_thread(self._tidy)

    async def _new_text(self) -> list[Path]:
        """All complete shards, once one is new and nobody has paused learning."""
        assert self._config.capture.dir is not None
        while True:
            self._learning.problem = self._problem(self._client.info) or self._shortcoming
            found = complete_shards(self._config.capture.dir)
            if not self._learning.paused and set(found) - self._seen:
                return found
            await asyncio.sleep(self._poll)

    def _problem(self, info: EngineInfo | None) -> str | None:
        """Why the head in use cannot be trained here."""
        if info is None:
            return "the engine is not ready"
        if info.draft is None:
            return "no draft head is in use"
        if info.draft.kind != "eagle3":
            return f"only eagle3 heads learn while serving; {info.draft.kind} is in use"
        if not info.device.startswith("cpu"):
            return f"a head learns on a CPU only; the engine runs on {info.device}"
        if self._config.speculation.aux_layers != "auto":
            return "speculation.aux_layers is not 'auto': training would read other layers"
        return None

    async def _learn(
        self, base: DraftFacts, info: EngineInfo, text: Prepared, folder: Path
    ) -> None:
        self._learning.phase = "training"
        config = self._settings(base, info, text, folder)
        self._training = await self._start(config, folder / "log.txt")
        self._apply()
        try:
            code = await self._training.wait()
        finally:
            self._training.kill()
            self._training = None
        self._learning.num_rounds += 1
        if code != 0:
            self._failed(f"training ended with exit code {code}; see {folder / 'log.txt'}")
            return
        before, after = measured(folder / "run" / "history.jsonl")
        self._learning.held_out_before, self._learning.held_out_after = before, after
        better = after >= before * (1 + self._config.speculation.learn_gain)
        logger.info(
            "a round of learning: %.3f -> %.3f tokens per step on %d held-out sequences%s",
            before,
            after,
            text.num_held_out,
            "" if better else "; the head stays",
        )
        if better:
            await self._adopt(base, folder / "run" / "head")

    async def _adopt(self, base: DraftFacts, head: Path) -> None:
        """Draft with the new head; with the one before again if live requests accept less."""
        earlier = Counts.of(self._client.stats).since(self._since)
        if not await self._swap(str(head), base.path):
            return
        self._learning.num_adopted += 1
        trial = self._config.speculation.learn_trial
        if earlier is None or earlier.num_drafts * LEAST_KNOWN < trial:
            return
        self._learning.phase = "trial"
        now = await self._trial(str(head), trial)
        if now is not None and now.rate < earlier.rate * (1 - SLACK):
            logger.warning(
                "the new head is taken back: %.3f accepted tokens per tree, %.3f before",
                now.rate,
                earlier.rate,
            )
            if await self._swap(base.path, str(head)):
                self._learning.num_reverted += 1

    async def _trial(self, head: str, num_drafts: int) -> Counts | None:
        """What a head drafted in so many trees; None if it was replaced, or the engine was."""
        while True:
            await asyncio.sleep(self._poll)
            info = self._client.info
            found = Counts.of(self._client.stats).since(self._since)
            if found is None or (info is not None and _path(info) != head):
                return None
            if found.num_drafts >= num_drafts:
                return found

    async def _swap(self, path: str, expected: str) -> bool:
        """Whether the head `path` drafts now, instead of `expected`."""
        info = self._client.info
        if info is None or _path(info) != expected:
            logger.warning("another head was put to use meanwhile: %s is not", path)
            return False
        try:
            answer = await self._client.swap_draft(path)
        except ConnectionError as error:
            self._failed(str(error))
            return False
        if answer.error is not None:
            self._failed(answer.error)
            return False
        self._since = Counts.of(self._client.stats)
        return True

    def _settings(
        self, base: DraftFacts, info: EngineInfo, text: Prepared, folder: Path
    ) -> HostTrainingConfig:
        steps = self._config.speculation.learn_steps
        return HostTrainingConfig(
            model=self._config.model,
            kernels=self._config.kernels,
            files=self._config.files,
            data=DataConfig(
                conversations=(text.training,),
                measure_on=(text.held_out,),
                max_tokens=min(LONGEST, info.max_model_len - UNROLL),
            ),
            head=HeadSettings(
                init=str(Path(base.path).absolute()),
                num_layers=base.num_layers,
                draft_vocab_size=base.draft_vocab_size,
            ),
            loss=LossConfig(unroll_steps=UNROLL),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=WARM_UP),
            run=RunConfig(
                output=folder / "run",
                steps=steps,
                batch_tokens=BATCH_TOKENS,
                evaluate_every=steps,
                checkpoint_every=steps,
                seed=self._round,
            ),
        )

    def _failed(self, reason: str) -> None:
        self._learning.num_failed += 1
        self._shortcoming = self._learning.problem = reason
        logger.error("the draft head did not learn: %s", reason)

    def _note_busy(self, is_busy: bool) -> None:
        """Training stops at once when a request comes, before the engine hears of it."""
        self._is_busy = is_busy
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if is_busy:
            self._apply()
        else:
            self._timer = asyncio.get_running_loop().call_later(self._idle, self._apply)

    def _apply(self) -> None:
        stands = self._is_busy or self._learning.paused
        self._learning.interrupted = stands and self._training is not None
        if self._training is not None:
            self._training.let_run(runs=not stands)

    def _tidy(self) -> None:
        """Delete rounds but those of the heads in use now and before."""
        info = self._client.info
        used = None if info is None else _path(info)
        rounds = sorted(self._folder.glob("round-*"), key=_number)
        for folder in rounds[:-2]:
            if used is None or not Path(used).is_relative_to(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("round-")
    return int(digits) if digits.isdecimal() else 0


def _path(info: EngineInfo) -> str | None:
    return None if info.draft is None else info.draft.path


def measured(history: Path) -> tuple[float, float]:
    """Tokens per step on held-out sequences, before and after. ValueError, OSError without them."""
    lines = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    found = [line["acceptance_length"] for line in lines if line["kind"] == "held out"]
    if len(found) < 2 or None in found:
        raise ValueError(f"{history} does not tell how the head was measured before and after")
    return found[0], found[-1]
