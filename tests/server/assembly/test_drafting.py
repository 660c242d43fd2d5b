"""Which trees a configuration names, and which it may not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.schema import Config, SpeculationConfig
from engine.messages import DraftFacts
from engine.models.place import Place
from engine.step.shape import DynamicShape
from kernels.linear.scaled import FP8
from kernels.ops import Ops
from server.assembly.drafting import TreeChooser
from server.assembly.ranks.rank import place_of_head

FACTS = DraftFacts("head", "eagle3", 1, 8192, 10)


def chooser(**speculation: object) -> TreeChooser:
    return TreeChooser(Config(speculation=SpeculationConfig(**speculation)))  # type: ignore[arg-type]


def test_a_dynamic_tree_can_be_used_always_but_is_no_candidate() -> None:
    (shape,) = chooser(tree="dynamic8").shapes(FACTS)
    assert isinstance(shape, DynamicShape)
    with pytest.raises(ValueError, match=r"speculation\.candidates names 'dynamic8': auto chooses"):
        chooser(candidates=("chain1", "dynamic8")).shapes(FACTS)


@pytest.mark.parametrize(
    ("asked", "forms"),
    [
        ("auto", ("q8", None)),
        ("plain", ("plain", None)),
        ("q4", ("q4", None)),
        ("q4_mlp", ("q8", "q4")),
    ],
)
def test_a_head_is_kept_in_the_configured_forms(
    native_ops: Ops, reference_ops: Ops, asked: str, forms: tuple[str, str | None]
) -> None:
    speculation = SpeculationConfig(draft_weights=asked)  # type: ignore[arg-type]
    place = Place(native_ops, torch.bfloat16, torch.device("cpu"), cache=FP8)
    found = place_of_head(speculation, place)
    assert (found.weights, found.mlp_weights) == forms
    assert found.cache_dtype is torch.bfloat16
    if "q4" in asked:
        with pytest.raises(ValueError, match=r"speculation\.draft_weights = 'q4' needs native"):
            place_of_head(speculation, replace(place, ops=reference_ops))
