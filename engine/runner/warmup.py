"""Measures what a step with each tree shape costs on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import msgspec

from engine.request import Request, SamplingParams
from engine.speculation.planner import StepCosts
from engine.step.executor import Executor, execute
from engine.step.plan import Admission, RowPlan, StepOutcome, StepPlan
from engine.step.shape import MAX_NODES, TreeShape

PROMPT = 8  # tokens in the cache before measuring
REPEATS = 3
ENOUGH = 0.15  # seconds per tree shape; slower steps are repeated less often
ROW_COUNTS = (1, 4, 16, 64)
PATIENCE = 5.0  # seconds of one step of each shape; if they take longer, more rows are not tried

logger = logging.getLogger(__name__)
replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Runs made-up rows through an executor whose blocks are all free."""

    executor: Executor
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    def fits(self, shape: TreeShape) -> bool:
        """Whether one row has room for such a tree after the made-up prompt."""
        slots = self._num_prompt + shape.slots_for(shape.num_nodes) + 1
        return (
            slots <= self._slots_per_row
            and self._blocks_per_row <= self.num_blocks
            and max(self._num_prompt, shape.num_nodes) <= self.max_num_batched_tokens
        )

    def measure(self, shapes: Sequence[TreeShape]) -> StepCosts:
        """Seconds of a decode step with each shape, for several numbers of rows. All shapes must
        fit."""
        steps = self.steps(shapes)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                costs: StepCosts = end.value
                return costs

    def steps(self, shapes: Sequence[TreeShape]) -> Generator[None, None, StepCosts]:
        """The same, one made-up step at a time, so that real steps can run in between."""
        seconds: dict[str, list[tuple[int, float]]] = {shape.name: [] for shape in shapes}
        rows: list[RowPlan] = []
        for num_rows in self._row_counts(shapes):
            if sum(measured[-1][1] for measured in seconds.values() if measured) > PATIENCE:
                logger.warning("steps are slow: trees are measured for %d rows at most", len(rows))
                break
            rows += yield from self._start(len(rows), num_rows)
            for shape in shapes:
                cost = yield from self._time(rows, shape)
                seconds[shape.name].append((num_rows, cost))
        execute(self.executor, StepPlan(released=tuple(row.line for row in rows)))
        return StepCosts(seconds)

    def _row_counts(self, shapes: Sequence[TreeShape]) -> list[int]:
        """The ROW_COUNTS that fit; one row always does."""
        widest = max(shape.num_nodes for shape in shapes)
        most = min(
            self.max_num_seqs,
            self.num_blocks // self._blocks_per_row,
            self.max_num_batched_tokens // widest,
        )
        return [count for count in ROW_COUNTS if count <= max(most, 1)]

    @property
    def _num_prompt(self) -> int:
        return min(PROMPT, max(1, self.max_model_len // 4))

    @property
    def _blocks_per_row(self) -> int:
        return blocks_per_row(self.max_model_len, self.block_size)

    def _start(self, first: int, last: int) -> Generator[None, None, list[RowPlan]]:
        """Fill the cache with the prompts of rows [first, last); returns them without new
        blocks."""
        params = SamplingParams(max_tokens=1 << 20, temperature=0.0)
        size = self._blocks_per_row
        rows, admissions = [], []
        for number in range(first, last):
            prompt = [(7 * number + 3 * i) % 97 + 3 for i in range(self._num_prompt)]
            request = Request(request_id=f"warm-up-{number}", prompt_ids=prompt, params=params)
            blocks = tuple(range(number * size, (number + 1) * size))
            rows.append(
                RowPlan(
                    line=number,
                    start=0,
                    token_ids=tuple(prompt),
                    first_block=0,
                    new_blocks=blocks,
                    samples=True,
                )
            )
            admissions.append(Admission(number, request))
        together = max(1, self.max_num_batched_tokens // self._num_prompt)
        for begin in range(0, len(rows), together):
            part = slice(begin, begin + together)
            execute(
                self.executor, StepPlan(rows=tuple(rows[part]), admitted=tuple(admissions[part]))
            )
            yield
        return [replace(row, first_block=size, new_blocks=()) for row in rows]

    def _time(self, rows: Sequence[RowPlan], shape: TreeShape) -> Generator[None, None, float]:
        """Seconds of a step: the minimum of a few, because disturbances only make it longer and the
        first may compile kernels or capture a graph."""
        times: list[float] = []
        current: tuple[RowPlan, ...] = ()
        while len(times) < 2 or (len(times) < REPEATS and sum(times) < ENOUGH):
            if not current or not all(self._has_room(row, shape) for row in current):
                current = yield from self._renewed(rows)
            drafting = (replace(row, num_draft=shape.num_nodes - 1) for row in current)
            plan = StepPlan(rows=tuple(drafting), shape=shape)
            started = time.perf_counter()
            outcome = execute(self.executor, plan)
            times.append(time.perf_counter() - started)
            yield
            current = _after(current, outcome)
        return min(times)

    def _renewed(self, rows: Sequence[RowPlan]) -> Generator[None, None, tuple[RowPlan, ...]]:
        """Go back to the end of the prompt and compute its last token again, so that the drafter
        has its state for the next token."""
        last = self._num_prompt - 1
        again = tuple(replace(row, start=last, token_ids=row.token_ids[-1:]) for row in rows)
        outcome = execute(self.executor, StepPlan(rows=again))
        yield
        return _after(again, outcome)

    def _has_room(self, row: RowPlan, shape: TreeShape) -> bool:
        return row.start + shape.slots_for(shape.num_nodes) + 1 <= self._slots_per_row

    @property
    def _slots_per_row(self) -> int:
        return min(self.max_model_len, self._blocks_per_row * self.block_size)


def run_largest(executor: Executor, num_tokens: int, block_size: int) -> None:
    """Compute a prompt of `num_tokens` tokens in one step, which scores them all. All blocks must
    be free."""
    params = SamplingParams(max_tokens=1, temperature=1.0, logprobs=1, prompt_logprobs=1)
    prompt = [3 + at % 97 for at in range(num_tokens)]
    request = Request(request_id="warm-up", prompt_ids=prompt, params=params)
    row = RowPlan(
        line=0,
        start=0,
        token_ids=tuple(prompt),
        first_block=0,
        new_blocks=tuple(range(-(-num_tokens // block_size))),
        samples=True,
    )
    execute(executor, StepPlan(rows=(row,), admitted=(Admission(0, request),)))
    execute(executor, StepPlan(released=(0,)))


def _after(rows: Sequence[RowPlan], outcome: StepOutcome) -> tuple[RowPlan, ...]:
    """The rows after a step: the last emitted token is the next root. A model with unsound logits
    emits none, which requests will be told; here only times matter."""
    return tuple(
        replace(
            row,
            start=row.start + len(result.emitted),
            token_ids=result.emitted[-1:] or row.token_ids,
        )
        for row, result in zip(rows, outcome.rows, strict=True)
    )


def blocks_per_row(max_model_len: int, block_size: int) -> int:
    """Blocks of one made-up row, trees included."""
    return -(-min(PROMPT + 2 * MAX_NODES, max_model_len) // block_size)
