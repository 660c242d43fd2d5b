"""The target answers very many prompts at once: one token per row and step, all rows together.

Each row holds one running answer in pages of its own, and everything that a step needs lies on the
device. So a step costs the host nothing per row, and on CUDA it is a single captured graph. After
every few steps the host looks which answers have ended and gives their rows new questions. There
is no scheduler, prefix cache or draft: this makes text to learn from; `EngineCore` serves.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.copies import Fetch, join, upload, view
from engine.kv.scratch import Scratch
from engine.kv.storage import SCRATCH_BLOCKS, KVStorage
from engine.models.interface import LoadedModel
from engine.runner.graphs import capture
from engine.step.batch import ForwardBatch, ForwardContext, logit_slices
from engine.step.group import TPGroup
from kernels.ops import AttentionMeta, Ops
from kernels.sampling.settings import DrawSettings

BLOCK_SIZE = 16

logger = logging.getLogger(__name__)
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer."""

    prompt_ids: list[int]
    temperature: float  # 0: always the likeliest token
    tag: int  # the caller's


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target answered."""

    question: Question
    token_ids: list[int]  # with the end-of-text token, if it ended by itself
    ended: bool  # False: it was cut at `max_new_tokens`


@dataclass(frozen=True, slots=True)
class Pace:
    """How host and device take turns."""

    steps: int  # from one look of the host to the next
    unread: int  # looks that the host leaves for later, so that the device always has work
    prompt_tokens: int = 16384  # in one forward, unless a single prompt is longer
    # Prompts are padded to multiples, so that kernels see, and compile for, few sizes
    padded_prompts: int = 1
    padded_tokens: int = 1


ON_CPU = Pace(steps=2, unread=0)
ON_DEVICE = Pace(steps=8, unread=1, padded_prompts=16, padded_tokens=512)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The device's state of R rows, changed in place only: a captured step has its addresses."""

    tokens: Tensor  # [R] int64, the newest token of each row; its KV is not yet written
    positions: Tensor  # [R] int64, its position
    done: Tensor  # [R] bool: the answer has ended, or there is none
    temperatures: Tensor  # [R] float32
    seeds: Tensor  # [R] int64
    counts: Tensor  # [R] int64, tokens of the answer
    answers: Tensor  # [R, max_new_tokens + 1] int32; the last column takes what nobody asked for

    @classmethod
    def idle(cls, num_rows: int, max_new_tokens: int, device: torch.device) -> _Rows:
        def zeros(*more: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_rows, *more, dtype=dtype, device=device)

        return cls(
            tokens=zeros(),
            positions=zeros(),
            done=torch.ones(num_rows, dtype=torch.bool, device=device),
            temperatures=zeros(dtype=torch.float32),
            seeds=zeros(),
            counts=zeros(),
            answers=zeros(max_new_tokens + 1, dtype=torch.int32),
        )

    def begin(self, prompts: _Prompts, drawn: Tensor, done: Tensor) -> None:
        """Rows `prompts.rows` begin an answer with the tokens `drawn` [B]."""
        rows = prompts.rows
        self.tokens.index_copy_(0, rows, drawn)
        self.positions.index_copy_(0, rows, prompts.lengths)
        self.done.index_copy_(0, rows, done)
        self.temperatures.index_copy_(0, rows, prompts.temperatures)
        self.seeds.index_copy_(0, rows, prompts.seeds)
        self.counts.index_fill_(0, rows, 1)
        self.answers[:, 0].index_copy_(0, rows, drawn.int())

    def advance(self, drawn: Tensor, ends: Tensor) -> None:
        """Append the tokens `drawn` [R]; `ends` [R] bool says which are end-of-text tokens.

        A row that is done stays at position 0 of its pages: nothing there is needed any more, and
        attention over one key costs little.
        """
        most = self.answers.shape[1] - 1
        at = self.counts.masked_fill(self.done, most)
        self.answers.scatter_(1, at[:, None], drawn.int()[:, None])
        self.counts.add_(~self.done)
        self.done.logical_or_(ends).logical_or_(self.counts >= most)
        self.tokens.copy_(drawn)
        self.positions.add_(1).masked_fill_(self.done, 0)


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The prompts of B rows, packed along T; padding follows prompts and tokens."""

    rows: Tensor  # [B] int64
    lengths: Tensor  # [B] int64
    temperatures: Tensor  # [B] float32
    seeds: Tensor  # [B] int64
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    cu_q: Tensor  # [B, padded + 1] int32
    tables: Tensor  # [B, padded; blocks of a row] int32


@dataclass(frozen=True, slots=True)
class _Look:
    """What the host sees of all rows after some steps."""

    number: int
    fetch: Fetch


class LockstepTarget:
    """Answers prompts in a fixed number of rows that all take each step together."""

    def __init__(
        self,
        model: LoadedModel,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        eos_ids: frozenset[int],
        *,
        rows: int,
        max_new_tokens: int,
        max_prompt_tokens: int,
        seed: int,
        pace: Pace | None = None,
    ) -> None:
        """Allocates pages of `dtype` for `rows` answers of the greatest length, and on CUDA
        captures the step. `model` was loaded for at least max_prompt_tokens + max_new_tokens
        positions. `pace`: what suits the device, if None.

        Raises:
            ValueError: a size is below 1 or beyond the model's positions, or the model has layers
                that see only a chunk of the positions.
            torch.OutOfMemoryError: the pages do not fit.
        """
        _check_sizes(model, rows, max_new_tokens, max_prompt_tokens)
        self._model = model
        self._device = device
        self._eos_ids = eos_ids
        self._eos = upload(torch.tensor(sorted(eos_ids), dtype=torch.int64), device)
        self._max_prompt_tokens = max_prompt_tokens
        self._seed = seed
        self._pace = pace or (ON_CPU if device.type == "cpu" else ON_DEVICE)
        self._blocks_per_row = -(-(max_prompt_tokens + max_new_tokens) // BLOCK_SIZE)
        self._ctx = ForwardContext(ops, self._pages(rows, dtype), TPGroup())
        self._state = _Rows.idle(rows, max_new_tokens, device)
        self._first_slots, self._attention = self._fixed(rows)
        # What the host knows of each row
        self._questions: list[Question | None] = [None] * rows
        self._busy = np.zeros(rows, dtype=np.bool_)
        self._since = np.zeros(rows, dtype=np.int64)  # first look that shows the row's question
        self._seen = np.zeros(rows, dtype=np.int64)  # tokens of running answers at the last look
        self._num_ended_tokens = 0
        self._num_asked = 0
        self._num_looks = 0
        self._asked: deque[Question] = deque()  # wait for a row
        self._looks: deque[_Look] = deque()  # not yet read, the oldest first
        self._ready: deque[Answer] = deque()
        self._run_step = self._captured()
        self.num_steps = 0
        self.seconds_waited = 0.0  # by the host for the device; near 0, the host is the limit

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers, unfinished ones included, as far as the host has looked."""
        return self._num_ended_tokens + int(self._seen.sum())

    def answers(self, ask: Callable[[], Question | None]) -> Iterator[Answer]:
        """Answers as they end, not in the order of the questions.

        `ask` is called for every free row after every few steps; None means that there is nothing
        to ask now. Ends when it gives None while no row is busy. An answer depends on the model,
        the seed, the question and how many were asked before it (and, where kernels round
        differently in other batches, on its neighbours). All state is in this object: the
        generator may wait as long as it likes between two answers, and if it is dropped, another
        one goes on.

        Raises:
            ValueError: a prompt has no tokens or more than `max_prompt_tokens`, or a temperature
                is negative. Other questions keep their places.
        """
        while True:
            while self._ready:
                yield self._ready.popleft()
            self._refill(ask)
            if not self._busy.any():
                self._looks.clear()
                return
            for _ in range(self._pace.steps):
                self._run_step()
            self.num_steps += self._pace.steps
            self._look()
            if len(self._looks) > self._pace.unread:
                self._collect(self._looks.popleft())

    def _captured(self) -> Callable[[], object]:
        """The step; on CUDA as a graph. All rows are idle, so launches change nothing."""
        if self._device.type != "cuda":
            return self._step
        try:
            graph, _ = capture(self._step, torch.cuda.graph_pool_handle())
        except RuntimeError:  # out of memory, or something that cannot be captured
            logger.exception("no CUDA graph for answering: steps run without one, slower")
            return self._step
        return graph.replay

    @torch.no_grad()
    def _step(self) -> None:
        """One token for each row."""
        rows, fixed = self._state, self._attention
        batch = ForwardBatch(
            token_ids=rows.tokens,
            positions=rows.positions,
            slots=self._first_slots + rows.positions,
            attention=AttentionMeta(
                cu_q=fixed.cu_q,
                prefix_lens=rows.positions.int(),
                first_keys=fixed.first_keys,
                block_tables=fixed.block_tables,
                ancestors=fixed.ancestors,
                max_q=fixed.max_q,
                max_context=fixed.max_context,
            ),
            only_roots=True,
        )
        hidden = self._model.forward(batch, self._ctx)
        drawn = self._draw(hidden, rows.temperatures, rows.seeds, rows.positions + 1)
        rows.advance(drawn, self._ends(drawn))

    def _draw(
        self, hidden: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor
    ) -> Tensor:
        """Tokens for `positions` [B] after hidden states [B, H], [B] int64."""
        drawn = []
        for part in logit_slices(len(hidden)):
            settings = DrawSettings(temperatures[part], seeds[part], positions[part])
            logits = self._model.logits(hidden[part], self._ctx)
            drawn.append(self._ctx.ops.draw(logits, settings))
        return torch.cat(drawn)

    def _ends(self, tokens: Tensor) -> Tensor:
        """[B] bool: the end-of-text tokens among `tokens` [B]."""
        return (tokens[:, None] == self._eos).any(dim=1)

    def _look(self) -> None:
        """Start to copy what the host wants to know of the rows."""
        self._looks.append(_Look(self._num_looks, Fetch(join(self._looked_at()))))
        self._num_looks += 1

    def _looked_at(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._state.counts, self._state.answers, self._state.done

    def _collect(self, look: _Look) -> None:
        """Wait for the look; its finished answers are ready, and their rows free."""
        started = time.perf_counter()
        here, parts, first = look.fetch.wait(), [], 0
        self.seconds_waited += time.perf_counter() - started
        for like in self._looked_at():
            parts.append(view(here, first, like).numpy())
            first += like.numel() * like.itemsize
        counts, answers, done = parts
        shown = self._busy & (self._since <= look.number)  # others still show an older answer
        self._seen = np.where(shown & ~done, counts, 0)
        finished = np.flatnonzero(shown & done)
        self._num_ended_tokens += int(counts[finished].sum())
        self._busy[finished] = False
        for row, count in zip(finished.tolist(), counts[finished].tolist(), strict=True):
            question, token_ids = self._questions[row], answers[row, :count].tolist()
            assert question is not None
            self._ready.append(Answer(question, token_ids, token_ids[-1] in self._eos_ids))

    def _refill(self, ask: Callable[[], Question | None]) -> None:
        """Ask for every free row, and start what was asked."""
        free = np.flatnonzero(~self._busy)
        while len(self._asked) < len(free):
            question = ask()
            if question is None:
                break
            self._check(question)
            self._asked.append(question)
        first = 0
        while self._asked:
            group = self._next_group()
            self._start(group, free[first : first + len(group)])
            first += len(group)

    def _check(self, question: Question) -> None:
        length, most = len(question.prompt_ids), self._max_prompt_tokens
        if not 1 <= length <= most:
            raise ValueError(
                f"the prompt of question {question.tag} has {length} tokens; 1 to {most} are "
                "allowed (max_prompt_tokens)"
            )
        if not question.temperature >= 0:
            raise ValueError(
                f"question {question.tag} has temperature {question.temperature}; it must be 0 or "
                "more"
            )

    def _next_group(self) -> list[Question]:
        """Waiting questions for one forward."""
        group = [self._asked.popleft()]
        room = self._pace.prompt_tokens - len(group[0].prompt_ids)
        while self._asked and len(self._asked[0].prompt_ids) <= room:
            group.append(self._asked.popleft())
            room -= len(group[-1].prompt_ids)
        return group

    @torch.no_grad()
    def _start(self, questions: list[Question], rows: Integers) -> None:
        """Compute the prompts of free rows and draw the first token of each answer."""
        prompts = upload(self._packed(questions, rows), self._device)
        no_keys = torch.zeros_like(prompts.cu_q[1:])
        batch = ForwardBatch(
            token_ids=prompts.token_ids,
            positions=prompts.positions,
            slots=prompts.slots,
            attention=AttentionMeta(
                cu_q=prompts.cu_q,
                prefix_lens=no_keys,
                first_keys=no_keys,
                block_tables=prompts.tables,
                ancestors=torch.zeros_like(prompts.positions),
                max_q=self._max_prompt_tokens,
                max_context=self._max_prompt_tokens,
            ),
        )
        hidden = self._model.forward(batch, self._ctx)[prompts.lengths.cumsum(0) - 1]
        drawn = self._draw(hidden, prompts.temperatures, prompts.seeds, prompts.lengths)
        only_one = self._state.answers.shape[1] == 2
        self._state.begin(prompts, drawn, self._ends(drawn) | only_one)
        for row, question in zip(rows.tolist(), questions, strict=True):
            self._questions[row] = question
        self._busy[rows] = True
        self._since[rows] = self._num_looks

    def _packed(self, questions: Sequence[Question], rows: Integers) -> _Prompts:
        """The prompts on the host."""
        pace, width = self._pace, self._blocks_per_row
        lengths = np.array([len(question.prompt_ids) for question in questions])
        ends = lengths.cumsum()
        total, num_rows = int(ends[-1]), len(rows)
        row_of = np.arange(num_rows).repeat(lengths)
        positions = np.arange(total) - (ends - lengths)[row_of]
        padding = -total % pace.padded_tokens
        scratch = Scratch(self._ctx.kv.num_blocks - 1, BLOCK_SIZE).first_slot
        tokens = np.fromiter(chain.from_iterable(q.prompt_ids for q in questions), np.int64, total)
        all_rows = np.pad(rows, (0, -num_rows % pace.padded_prompts))
        return _Prompts(
            rows=torch.from_numpy(rows),
            lengths=torch.from_numpy(lengths),
            temperatures=torch.tensor([q.temperature for q in questions], dtype=torch.float32),
            seeds=torch.from_numpy(self._seeds(num_rows)),
            token_ids=torch.from_numpy(np.pad(tokens, (0, padding))),
            positions=torch.from_numpy(np.pad(positions, (0, padding))),
            slots=torch.from_numpy(
                np.append(
                    rows[row_of] * width * BLOCK_SIZE + positions,
                    scratch + np.arange(padding) % BLOCK_SIZE,
                )
            ),
            cu_q=torch.from_numpy(
                np.pad(ends, (1, len(all_rows) - num_rows), constant_values=(0, total))
            ).int(),
            tables=torch.from_numpy(all_rows[:, None] * width + np.arange(width)).int(),
        )

    def _seeds(self, count: int) -> Integers:
        """Of the next questions: bits of seed * 2^32 + the question's number."""
        first = (self._seed << 32) + self._num_asked
        self._num_asked += count
        bits = [(first + number) % 2**64 for number in range(count)]
        return np.array(bits, dtype=np.uint64).view(np.int64)

    def _pages(self, rows: int, dtype: torch.dtype) -> KVStorage:
        """Row r has blocks r * w .. (r + 1) * w - 1, where w is the number of blocks of a row."""
        arch, num_blocks = self._model.arch, rows * self._blocks_per_row + SCRATCH_BLOCKS
        shape = (arch.num_layers, num_blocks, BLOCK_SIZE, arch.num_kv_heads, arch.head_dim)
        return KVStorage.allocate(*shape, dtype, self._device)

    def _fixed(self, rows: int) -> tuple[Tensor, AttentionMeta]:
        """What is the same in all steps: each row's first slot, [R] int64, and one query per
        row."""
        width, device = self._blocks_per_row, self._device
        order = torch.arange(rows, device=device)
        zeros = torch.zeros(rows, dtype=torch.int32, device=device)
        return order * (width * BLOCK_SIZE), AttentionMeta(
            cu_q=torch.arange(rows + 1, dtype=torch.int32, device=device),
            prefix_lens=zeros,
            first_keys=zeros,
            block_tables=torch.arange(rows * width, dtype=torch.int32, device=device).view(
                rows, -1
            ),
            ancestors=torch.zeros(rows, dtype=torch.int64, device=device),
            max_q=1,
            max_context=width * BLOCK_SIZE,
        )


def _check_sizes(
    model: LoadedModel, rows: int, max_new_tokens: int, max_prompt_tokens: int
) -> None:
    sizes = {
        "rows": rows,
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be 1 or more")
    reach, most = max_prompt_tokens + max_new_tokens, model.arch.max_position_embeddings
    if reach > most:
        raise ValueError(
            f"max_prompt_tokens {max_prompt_tokens} and max_new_tokens {max_new_tokens} need "
            f"{reach} positions; the model has {most}"
        )
    if model.attention_chunk is not None:
        raise ValueError(
            f"the model has layers that see only chunks of {model.attention_chunk} positions "
            "(attention_chunk); here every layer must see all positions"
        )
