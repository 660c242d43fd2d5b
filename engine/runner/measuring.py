"""Measures what a step with each tree shape costs on this machine."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.progress import report
from engine.request import Request, SamplingParams
from engine.speculation.costs import Padding, Sample, StepCosts, sample_of
from engine.step.executor import Executor, execute
from engine.step.plan import Admission, RowPlan, StepOutcome, StepPlan
from engine.step.shape import MAX_NODES, ROOT, TreeShape

PROMPT = 8  # tokens in the cache before measuring
REPEATS = 3
ENOUGH = 0.05  # seconds per tree shape; slower steps are repeated less often
ROW_COUNTS = (1, 4, 16, 64)
AGREEMENT = 1.3  # known costs may be off by this factor
BUDGET = 1.0  # seconds of made-up steps after which no more rows are tried
GROWTH = 3.0  # times that the steps of the next number of rows are expected to take

logger = logging.getLogger(__name__)
replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class StepMeter:
    """Runs made-up rows through an executor whose blocks are all free."""

    executor: Executor
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    padding: Padding = field(default_factory=Padding)

    def fits(self, shape: TreeShape) -> bool:
        """Whether one row has room for such a tree after the made-up prompt."""
        slots = self._num_prompt + shape.slots_for(shape.num_nodes) + 1
        return (
            slots <= self._slots_per_row
            and self._blocks_per_row <= self.num_blocks
            and max(self._num_prompt, shape.num_nodes) <= self.max_num_batched_tokens
        )

    def measure(self, shapes: Sequence[TreeShape]) -> StepCosts:
        """Costs of decode steps, from steps with these shapes and several numbers of rows. All
        shapes must fit."""
        steps = self.steps(shapes)
        number = 0
        while True:
            report("measuring draft trees: step", number := number + 1)
            try:
                next(steps)
            except StopIteration as end:
                costs: StepCosts = end.value
                return costs

    def agrees(self, costs: StepCosts, shape: TreeShape) -> bool:
        """Whether a few steps of one row take about what known costs say of them, relative to each
        other. How fast the machine is as a whole is set right."""
        seen = dataclasses.replace(self, max_num_seqs=1).measure([ROOT, shape])
        plain, tree = (
            self.padding.work([n], shape, self._num_prompt) for n in (0, shape.num_nodes - 1)
        )
        costs.scale *= seen.of(plain) / costs.of(plain)
        error = costs.of(tree) / seen.of(tree)
        if 1 / AGREEMENT < error < AGREEMENT:
            return True
        logger.info("known step costs are off by a factor of %.2f: measuring anew", error)
        return False

    def steps(self, shapes: Sequence[TreeShape]) -> Generator[None, None, StepCosts]:
        """The same, one made-up step at a time, so that real steps can run in between."""
        samples: list[Sample] = []
        rows: list[RowPlan] = []
        spent = 0.0
        for num_rows in self._row_counts(shapes):
            own: list[Sample] = []
            rows += yield from self._start(len(rows), num_rows)
            for shape in shapes:
                own.append((yield from self._time(rows, shape)))
            samples += own
            spent += REPEATS * sum(sample.seconds for sample in own)
            if GROWTH * spent > BUDGET:
                logger.info("trees were measured for up to %d rows; steps show the rest", num_rows)
                break
        execute(self.executor, StepPlan(released=tuple(row.line for row in rows)))
        return StepCosts.fitted(samples)

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

    def _time(self, rows: Sequence[RowPlan], shape: TreeShape) -> Generator[None, None, Sample]:
        """The shortest of a few steps, because disturbances only make it longer and the first may
        compile kernels or capture a graph."""
        samples: list[Sample] = []
        current: tuple[RowPlan, ...] = ()
        while len(samples) < 2 or (
            len(samples) < REPEATS and sum(sample.seconds for sample in samples) < ENOUGH
        ):
            if not current or not all(self._has_room(row, shape) for row in current):
                current = yield from self._renewed(rows)
            drafting = (replace(row, num_draft=shape.num_nodes - 1) for row in current)
            plan = StepPlan(rows=tuple(drafting), shape=shape)
            started = time.perf_counter()
            outcome = execute(self.executor, plan)
            sample = sample_of(plan, outcome, time.perf_counter() - started, self.padding)
            assert sample is not None, "made-up rows only decode"
            samples.append(sample)
            yield
            current = _after(current, outcome)
        return min(samples, key=lambda sample: sample.seconds)

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
    """Compute a prompt of `num_tokens` tokens in one step, which scores and pools them all. All
    blocks must be free."""
    params = SamplingParams(
        max_tokens=1, temperature=1.0, logprobs=1, prompt_logprobs=1, pooling="mean"
    )
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
