"""Plans for tests."""

from __future__ import annotations

import random

from engine.request import Request, SamplingParams
from engine.step.plan import UNKNOWN, Admission, RowPlan, StepPlan
from engine.step.shape import DynamicShape
from tests.support.drafts.scripted_proposer import random_shape


def decoding(line: int, num_draft: int = 0, draft: tuple[int, ...] = ()) -> RowPlan:
    """A row with only its root."""
    return RowPlan(
        line=line,
        start=7,
        token_ids=(7,),
        first_block=0,
        new_blocks=(line,),
        samples=True,
        num_draft=num_draft,
        draft=draft,
    )


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Any parameters that a client may send; most of them are seldom set."""

    def some(value: object, otherwise: object) -> object:
        return value if rng.random() < 0.3 else otherwise

    settings = {
        "max_tokens": rng.randint(1, 99),
        "seed": rng.choice([0, rng.randrange(2**64), 2**64 - 1]),
        "temperature": rng.choice([0.0, 1e-7, 0.7, 1.3]),
        "top_k": some(rng.randint(1, 2 * vocab_size), 0),
        "top_p": some(rng.random(), 1.0),
        "min_p": some(rng.random(), 0.0),
        "repetition_penalty": some(1.5, 1.0),
        "frequency_penalty": some(0.5, 0.0),
        "presence_penalty": some(-0.5, 0.0),
        "logit_bias": some(_bias(rng, vocab_size), {}),
        "min_tokens": some(rng.randint(1, 20), 0),
        "stop_token_ids": some(tuple(rng.sample(range(vocab_size), 2)), ()),
        "ignore_eos": rng.random() < 0.3,
        "logprobs": some(rng.randint(0, 5), None),
        "logprob_token_ids": some(tuple(rng.sample(range(vocab_size), 3)), ()),
        "prompt_logprobs": some(rng.randint(0, 5), None),
    }
    return SamplingParams(**settings)  # type: ignore[arg-type]


def random_admission(line: int, rng: random.Random, vocab_size: int) -> Admission:
    def tokens(most: int) -> list[int]:
        return rng.choices(range(vocab_size), k=rng.randint(1, most))

    params = random_params(rng, vocab_size)
    request = Request(request_id=f"r{line}", prompt_ids=tokens(30), params=params)
    return Admission(line, request, tuple(tokens(9)) if rng.random() < 0.3 else ())


def random_plan(
    rng: random.Random, admissions: list[Admission], block_size: int, *, decodes: bool = False
) -> StepPlan:
    """Rows for some of the texts of `admissions`; with `decodes`, rows of only a root. Blocks are
    made up; rows share none."""
    shape = rng.choice(
        [random_shape(rng.randint(1, 12), rng.randrange(99)), DynamicShape("d", 9, 3, 4)]
    )
    chosen = rng.sample(admissions, k=rng.randint(1, len(admissions)))
    rows = tuple(
        _random_row(rng, admission, block_size, shape.num_nodes, decodes=decodes)
        for admission in chosen
    )
    return StepPlan(rows=rows, admitted=tuple(chosen), released=(3, 1), shape=shape)


def _bias(rng: random.Random, vocab_size: int) -> dict[int, float]:
    ids = rng.sample(range(vocab_size), k=rng.randint(1, 12))
    return {token: rng.uniform(-9, 9) for token in ids}


def _random_row(
    rng: random.Random, admission: Admission, block_size: int, num_nodes: int, *, decodes: bool
) -> RowPlan:
    text = [*admission.request.prompt_ids, *admission.output_ids]
    start = len(text) - 1 if decodes else rng.randrange(len(text))
    end = len(text) if decodes else rng.randint(start + 1, len(text))
    samples = end == len(text)
    draft: tuple[int, ...] = ()
    num_draft = rng.randrange(num_nodes) if samples else 0
    if num_draft and rng.random() < 0.3:
        draft = tuple(rng.choices(range(9), k=num_draft))
    num_blocks = -(-(end + num_draft + rng.choice([0, 0, rng.randint(1, 9)])) // block_size)
    first = rng.randint(0, num_blocks)
    blocks = range(1000 * admission.line + first, 1000 * admission.line + num_blocks)
    return RowPlan(
        line=admission.line,
        start=start,
        token_ids=tuple(text[start:end]),
        first_block=first,
        new_blocks=tuple(blocks),
        samples=samples,
        num_draft=num_draft,
        draft=draft,
        next_token=UNKNOWN if samples else text[end],
    )
