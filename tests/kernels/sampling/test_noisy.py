"""What drafts are ranked by: the target's own scores, were the head right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.ops import Ops
from kernels.sampling.draw import reference as draw_reference
from kernels.sampling.draw.reference import keep
from kernels.sampling.rank import noisy_reference
from kernels.sampling.settings import DrawSettings
from tests.kernels.sampling.noisy_cases import NoisyCase, noisy_case

CASES = [(False, False), (False, True), (True, False), (True, True)]


def case_of(filtered: bool, mapped: bool) -> NoisyCase:
    return noisy_case(torch.device("cpu"), filtered=filtered, mapped=mapped)


@pytest.mark.parametrize("filtered", [False, True])
def test_the_best_token_is_the_one_that_is_drawn_from_these_logits(filtered: bool) -> None:
    """Of all tokens, not only of the likeliest: rows 3 and 4 are flat."""
    case = case_of(filtered, mapped=False)
    drawn = draw_reference.draw(case.logits, case.settings)
    assert case.expected().argmax(dim=1).tolist() == drawn.tolist()


def test_a_token_has_the_noise_of_its_id_in_the_target() -> None:
    case = case_of(filtered=False, mapped=True)
    assert case.token_ids is not None
    whole = torch.full((8, 2000), -torch.inf)
    whole[:, case.token_ids] = case.logits
    drawn = draw_reference.draw(whole, case.settings)
    assert case.token_ids[case.expected().argmax(dim=1)].tolist() == drawn.tolist()


def test_rough_filters_keep_nearly_what_exact_ones_keep() -> None:
    case = case_of(filtered=True, mapped=False)
    settings = replace(case.settings, temperature=case.settings.temperature.clamp(min=0.1))
    scaled = case.logits / settings.temperature[:, None]
    exact = keep(scaled, settings) > -torch.inf
    rough = noisy_reference.kept(scaled, settings)
    mass = scaled.softmax(dim=1)
    lost, more = (mass * (exact & ~rough)).sum(dim=1), (mass * (rough & ~exact)).sum(dim=1)
    assert lost.max() < 0.02
    assert more.max() < 0.02
    assert exact.sum(dim=1).tolist() == [1, 26, 7, 8, 1, 9, 1, 333]
    assert rough.sum(dim=1).tolist() == [1, 29, 7, 8, 1, 9, 1, 333]


def test_rows_without_noise_keep_their_logits() -> None:
    case = case_of(filtered=False, mapped=False)
    greedy = DrawSettings(
        torch.zeros(8), case.settings.seeds, case.settings.positions, any_sampled=False
    )
    assert noisy_reference.add_noise(case.logits, greedy, None) is case.logits


def test_rejected_tokens_come_last_but_are_not_lost() -> None:
    """A tree with more children than tokens that the filters keep has them, too."""
    case = case_of(filtered=True, mapped=False)
    only_one = case.expected()[4].sort(descending=True).values
    assert only_one[0] - only_one[1] > noisy_reference.OUTSIDE / 2
    assert only_one.isfinite().all()


@pytest.mark.parametrize(("filtered", "mapped"), CASES)
def test_native_scores_are_those_of_the_reference(
    native: Ops, filtered: bool, mapped: bool
) -> None:
    case = case_of(filtered, mapped)
    case.check(native.add_noise(case.logits, case.settings, case.token_ids))
