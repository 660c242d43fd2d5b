"""One number, the tokens of a chain of three, gives those of other trees."""

from __future__ import annotations

import pytest

from engine.step.shape import ROOT, DynamicShape, TreeShape, chain
from server.assembly.drafting import tree_shape
from server.planning.acceptance import Acceptance


@pytest.mark.parametrize(
    ("of_chain3", "shape", "measured"),
    [
        # EAGLE-3 of Llama-3.1-8B: SpecBundle, and SGLang #4247 with trees of 64 nodes
        (2.93, chain(5), 3.55),
        (2.93, chain(7), 3.91),
        (2.79, DynamicShape("8-8-64", 64, 8, 8), 5.39),
        (2.79, DynamicShape("5-8-64", 64, 5, 8), 4.68),
        # the head that ships with aerie: docs/measured.md
        (1.95, chain(1), 1.56),
        (1.95, tree_shape("tree16"), 2.51),
        (1.95, tree_shape("dynamic16"), 2.62),
    ],
)
def test_other_trees_accept_what_was_measured(
    of_chain3: float, shape: TreeShape, measured: float
) -> None:
    assert Acceptance.of_chain(of_chain3).tokens(shape) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("tokens", [1.0, 2.75, 4.0])
def test_a_chain_of_three_gives_the_number_back(tokens: float) -> None:
    found = Acceptance.of_chain(tokens)
    assert found.tokens(chain(3)) == pytest.approx(tokens, abs=1e-6)
    assert found.tokens(ROOT) == 1


@pytest.mark.parametrize("tokens", [0.9, 4.1])
def test_impossible_acceptance_is_refused(tokens: float) -> None:
    with pytest.raises(ValueError, match=rf"acceptance {tokens}: give the mean .* from 1 to 4"):
        Acceptance.of_chain(tokens)
