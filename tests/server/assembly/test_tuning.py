"""The configured tuning of attention reaches the operations and what `/info` shows."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from configs.schema import KernelsConfig
from engine.models.place import Place
from kernels.attention.triton_plan import DEFAULT, TUNINGS
from kernels.ops import Ops
from kernels.registry import triton_ops
from server.assembly.tuning import with_tuning
from tests.drafter.published_heads import TARGET
from tests.kernels import triton_env

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not triton_env.INSTALLED, reason=triton_env.MISSING)


def test_the_setting_lists_all_tunings() -> None:
    choices = get_args(KernelsConfig.model_fields["attention"].annotation)
    assert set(choices) == {"auto", *TUNINGS}


@needs_triton
@pytest.mark.parametrize("wanted", ["auto", "medium"])
def test_triton_kernels_get_it(wanted: str) -> None:
    place = Place(triton_ops(torch.float32), torch.float32, CPU)
    ops = with_tuning(place, TARGET, wanted).ops
    name = DEFAULT.name if wanted == "auto" else wanted
    assert str(ops.backends["attention"]) == f"triton ({name})"
    assert ops.attention.keywords == {"tuning": TUNINGS[name]}  # type: ignore[attr-defined]
    assert replace(ops, attention=place.ops.attention, backends=place.ops.backends) == place.ops


def test_other_kernels_have_none(reference_ops: Ops) -> None:
    place = Place(reference_ops, torch.float32, CPU)
    assert with_tuning(place, TARGET, "auto") is place
    with pytest.raises(ValueError, match=r"kernels\.attention = long is for Triton kernels"):
        with_tuning(place, TARGET, "long")
