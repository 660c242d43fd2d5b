"""Filters and edits of logits against brute force on one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.request import Request, SamplingParams
from engine.sampling.batch import draw_settings
from engine.sampling.rows import RowState
from kernels.sampling.pipeline_reference import DrawSettings
from kernels.sampling.torch_draw import edit_logits, filter_logits
from tests.support.trees import roots

VOCAB = 1000
OFF = {"top_k": VOCAB, "top_p": 1.0, "min_p": 0.0}


def kept_by_brute_force(row: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Sort the row, walk down, stop at the first filter that says so."""
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


def row_state(prompt: list[int], output: list[int], **params: object) -> RowState:
    sampling = SamplingParams(max_tokens=64, **params)  # type: ignore[arg-type]
    return RowState.admit(Request(request_id="r", prompt_ids=prompt, params=sampling), output)


def batch_of(*rows: RowState) -> DrawSettings:
    return draw_settings(rows, roots(len(rows)), [2], VOCAB)


def test_no_edit_returns_the_very_same_tensor() -> None:
    logits = torch.randn(1, VOCAB)
    assert edit_logits(logits, batch_of(row_state([1], []))) is logits


def test_frequency_and_presence_count_output_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB)
    row = row_state([5, 6], [6, 6, 7], frequency_penalty=0.5, presence_penalty=0.25)
    edited = edit_logits(logits, batch_of(row))[0]
    assert edited[5] == 0.0
    assert edited[6] == -(2 * 0.5 + 0.25)
    assert edited[7] == -(0.5 + 0.25)
    assert (edited != 0).sum() == 2


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.full((1, VOCAB), 2.0)
    logits[0, 7] = -2.0
    edited = edit_logits(logits, batch_of(row_state([5], [7], repetition_penalty=2.0)))[0]
    assert (edited[5], edited[7], edited[8]) == (1.0, -4.0, 2.0)


def test_penalty_grows_with_every_committed_token_of_a_block() -> None:
    row = row_state([1], [], frequency_penalty=1.0)
    row.extend([9, 9, 9])
    row.extend([9])
    assert edit_logits(torch.zeros(1, VOCAB), batch_of(row))[0, 9] == -4.0


def test_history_survives_growth_past_its_first_room() -> None:
    row = row_state([], list(range(500)), presence_penalty=1.0)
    row.extend(range(400, 600))
    edited = edit_logits(torch.zeros(1, VOCAB), batch_of(row))[0]
    assert torch.equal(edited == -1.0, torch.arange(VOCAB) < 600)


def test_bias_is_added_and_forbidden_tokens_are_impossible_until_min_tokens() -> None:
    params = {"logit_bias": {4: 3.0, 5: -100.0}, "min_tokens": 2, "stop_token_ids": (8,)}
    early = edit_logits(torch.zeros(1, VOCAB), batch_of(row_state([1], [3], **params)))[0]
    late = edit_logits(torch.zeros(1, VOCAB), batch_of(row_state([1], [3, 3], **params)))[0]
    assert (early[4], early[5]) == (3.0, -100.0)
    assert torch.isneginf(early[[2, 8]]).all()
    assert torch.equal(late[[2, 8]], torch.zeros(2))


def test_edits_of_one_row_leave_the_others_alone() -> None:
    rows = (
        row_state([1], [3], presence_penalty=1.0),
        row_state([1], [3]),
        row_state([1], [], logit_bias={3: 1.0}),
    )
    edited = edit_logits(torch.zeros(3, VOCAB), batch_of(*rows))
    assert edited[:, 3].tolist() == [-1.0, 0.0, 1.0]
