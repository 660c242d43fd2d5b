"""From the outputs of a step to what is said of each of its rows."""

from __future__ import annotations

import torch

from engine.messages import DraftNodes, TokenLogprob
from engine.runner.outcomes import OutcomeBuilder
from engine.runner.step import StepOutputs
from engine.step.plan import RowOutcome, RowPlan


def row(line: int, *, samples: bool, num_draft: int = 0, draft: tuple[int, ...] = ()) -> RowPlan:
    return RowPlan(
        line=line,
        start=0,
        token_ids=(5,),
        first_block=0,
        new_blocks=(),
        samples=samples,
        num_draft=num_draft,
        draft=draft,
    )


def scores(first: float, *shape: int) -> torch.Tensor:
    """Numbers that a float holds: first, first + 1, ..."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).view(shape) + first


def numbers(*values: float) -> bytes:
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


def entry(token: int, value: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(token, value, list(top))


def test_every_row_gets_its_part_of_the_outputs_as_far_as_it_asked() -> None:
    """Four rows, then padding: a chunk that is scored, a tree, a row that asked for nothing, and
    one whose prompt ends in this step."""
    report = OutcomeBuilder(
        rows=(
            row(4, samples=False),
            row(0, samples=True, num_draft=3),
            row(2, samples=True),
            row(1, samples=True),
        ),
        num_top=[-1, 1, -1, 0],
        num_named=[0, 0, 0, 1],
        first_named=1,
        num_echo_top=[2, -1, -1, 1],
        echo=[(11, 12), (), (), (13,)],
        traced=[True, True, False, False],
        pools=[True, False, False, True],
    )
    outputs = StepOutputs(
        emitted=torch.tensor([[9, -1, -1], [7, 8, -1], [6, -1, -1], [0, -1, -1], [3, -1, -1]]),
        path=torch.tensor([[0, -1, -1], [0, 3, -1], [0, -1, -1], [0, -1, -1], [0, -1, -1]]),
        sizes=torch.tensor([1, 4, 1, 1, 0]),
        tree_tokens=torch.arange(25).view(5, 5) + 60,
        tree_parents=torch.tensor([[-1, 0, 0, 1, -1]]).expand(5, 5),
        top_ids=torch.arange(30).view(5, 3, 2),
        echo_top_ids=torch.arange(8).view(4, 2) + 50,
        logprobs=scores(100, 5, 3),
        top=scores(200, 5, 3, 2),
        echo_logprobs=scores(300, 4),
        echo_top=scores(400, 4, 2),
        pooled=torch.tensor([[1.0, 2.0], [3.0, float("nan")]]),
        faults=torch.zeros(5, dtype=torch.bool),
    )
    assert report.outcomes(outputs) == (
        RowOutcome(
            prompt_logprobs=(
                entry(11, 300, (50, 400), (51, 401)),
                entry(12, 301, (52, 402), (53, 403)),
            ),
            pooled=numbers(1, 2),
        ),
        RowOutcome(
            (7, 8),
            3,
            (3,),
            (entry(7, 103, (6, 206)), entry(8, 104, (8, 208))),
            nodes=DraftNodes((66, 67, 68), (0, 0, 1)),
        ),
        RowOutcome((6,)),
        RowOutcome(
            (0,),
            0,
            (),
            (entry(0, 109, (19, 219)),),
            (entry(13, 302, (54, 404)),),
            unsound=True,
            pooled=numbers(3, float("nan")),
        ),
    )
