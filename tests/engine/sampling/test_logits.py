"""Compares filters and edits of logits with brute force, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.request import Request, SamplingParams
from kernels.ops import Ops
from kernels.sampling.draw.torch_draw import filter_logits
from tests.support.engines.told_target import Sampled, Text, sample

VOCAB = 1000
OFF = {"top_k": VOCAB, "top_p": 1.0, "min_p": 0.0}


def kept_by_brute_force(row: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Sort the row, walk down, stop at the first filter that ends it."""
    order = sorted(range(len(row)), key=lambda token: -row[token])[:top_k]
    weights = [math.exp(row[token] - row[order[0]]) for token in order]
    total, mass, kept = sum(weights), 0.0, set()
    for token, weight in zip(order, weights, strict=True):
        if (top_p < 1 and mass >= top_p * total) or weight < min_p:
            break
        kept.add(token)
        mass += weight
    return kept


def kept(filtered: Tensor) -> set[int]:
    return set(torch.isfinite(filtered).nonzero()[:, 0].tolist())


def filter_rows(logits: Tensor, settings: list[dict[str, float]]) -> Tensor:
    return filter_logits(
        logits,
        torch.tensor([int(s["top_k"]) for s in settings]),
        torch.tensor([s["top_p"] for s in settings]),
        torch.tensor([s["min_p"] for s in settings]),
    )


SETTINGS = [
    OFF | change
    for change in (
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 999},
        {"top_p": 0.1},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.8},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    )
]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_keep_what_brute_force_keeps(settings: dict[str, float], scale: float) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * scale
    filtered = filter_rows(logits, [settings])
    expected = kept_by_brute_force(logits[0].double().tolist(), **settings)  # type: ignore[arg-type]
    # float32 sums may move the edge of the top-p mass by one token
    assert len(kept(filtered[0]) ^ expected) <= (1 if settings["top_p"] < 1 else 0)
    assert torch.equal(filtered[torch.isfinite(filtered)], logits[torch.isfinite(filtered)])


def test_a_row_is_filtered_alike_whatever_its_batch_mates_ask() -> None:
    logits = torch.randn(len(SETTINGS), VOCAB, generator=torch.Generator().manual_seed(5))
    together = filter_rows(logits, SETTINGS)
    for row, settings in enumerate(SETTINGS):
        assert torch.equal(together[row], filter_rows(logits[row : row + 1], [settings])[0])


def test_tokens_that_tie_with_the_last_kept_one_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert kept(filter_rows(logits, [{"top_k": 2, "top_p": 1.0, "min_p": 0.0}])[0]) == {0, 1, 2, 3}


def text(prompt: list[int], output: list[int], **params: object) -> Text:
    sampling = SamplingParams(max_tokens=64, **params)  # type: ignore[arg-type]
    return Text(Request(request_id="r", prompt_ids=prompt, params=sampling), output)


def step(ops: Ops, *texts: Text, logits: Tensor | None = None) -> Sampled:
    told = torch.zeros(len(texts), VOCAB) if logits is None else logits
    return sample(ops, texts, told, eos=[2])


def test_without_an_edit_logits_are_drawn_from_as_they_are(reference_ops: Ops) -> None:
    assert step(reference_ops, text([1], [])).edited is None


def test_frequency_and_presence_count_output_tokens_only(reference_ops: Ops) -> None:
    row = text([5, 6], [6, 6, 7], frequency_penalty=0.5, presence_penalty=0.25)
    edited = step(reference_ops, row).after_edits[0]
    assert edited[5] == 0.0
    assert edited[6] == -(2 * 0.5 + 0.25)
    assert edited[7] == -(0.5 + 0.25)
    assert (edited != 0).sum() == 2


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(
    reference_ops: Ops,
) -> None:
    logits = torch.full((1, VOCAB), 2.0)
    logits[0, 7] = -2.0
    row = text([5], [7], repetition_penalty=2.0)
    edited = step(reference_ops, row, logits=logits).after_edits[0]
    assert (edited[5], edited[7], edited[8]) == (1.0, -4.0, 2.0)


def test_a_long_history_counts_whole(reference_ops: Ops) -> None:
    row = text([1], [*range(500), *range(400, 600)], presence_penalty=1.0)
    edited = step(reference_ops, row).after_edits
    assert torch.equal(edited[0] == -1.0, torch.arange(VOCAB) < 600)


def test_bias_is_added_and_forbidden_tokens_are_impossible_until_min_tokens(
    reference_ops: Ops,
) -> None:
    params = {"logit_bias": {4: 3.0, 5: -100.0}, "min_tokens": 2, "stop_token_ids": (8,)}
    early, late = (
        step(reference_ops, text([1], output, **params)).after_edits[0] for output in ([3], [3, 3])
    )
    assert (early[4], early[5]) == (3.0, -100.0)
    assert torch.isneginf(early[[2, 8]]).all()
    assert torch.equal(late[[2, 8]], torch.zeros(2))


def test_edits_of_one_row_leave_the_others_alone(reference_ops: Ops) -> None:
    rows = (
        text([1], [3], presence_penalty=1.0),
        text([1], [3]),
        text([1], [], logit_bias={3: 1.0}),
    )
    assert step(reference_ops, *rows).after_edits[:, 3].tolist() == [-1.0, 0.0, 1.0]
