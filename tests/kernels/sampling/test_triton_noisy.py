"""Triton's scores to rank drafts by, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels import triton_env
from tests.kernels.sampling.noisy_cases import noisy_case

noisy = triton_env.load("kernels.sampling.rank.triton_noisy")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]
TILE = 128  # several tiles without a large vocabulary


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize("mapped", [False, True], ids=["whole", "mapped"])
def test_scores_are_those_of_the_reference(filtered: bool, mapped: bool) -> None:
    case = noisy_case(triton_env.DEVICE, filtered=filtered, mapped=mapped)
    spaced = triton_env.spaced(case.logits)
    case.check(noisy.add_noise(spaced, case.settings, case.token_ids, tile=TILE))


@pytest.mark.parametrize("alone", ["top_k", "top_p", "min_p"])
def test_one_filter_may_be_given_alone(alone: str) -> None:
    case = noisy_case(triton_env.DEVICE, filtered=True, mapped=False)
    others = {name: None for name in ("top_k", "top_p", "min_p") if name != alone}
    case = replace(case, settings=replace(case.settings, **others))
    case.check(noisy.add_noise(case.logits, case.settings, None, tile=TILE))
