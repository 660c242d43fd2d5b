"""Which trees a configuration names, and which it may not."""

from __future__ import annotations

import pytest

from configs.schema import Config, SpeculationConfig
from engine.messages import DraftFacts
from engine.step.shape import DynamicShape
from server.assembly.drafting import TreeChooser

FACTS = DraftFacts("head", "eagle3", 1, 8192, 10)


def chooser(**speculation: object) -> TreeChooser:
    return TreeChooser(Config(speculation=SpeculationConfig(**speculation)))  # type: ignore[arg-type]


def test_a_dynamic_tree_can_be_used_always_but_is_no_candidate() -> None:
    (shape,) = chooser(tree="dynamic8").shapes(FACTS)
    assert isinstance(shape, DynamicShape)
    with pytest.raises(ValueError, match=r"speculation\.candidates names 'dynamic8': auto chooses"):
        chooser(candidates=("chain1", "dynamic8")).shapes(FACTS)
