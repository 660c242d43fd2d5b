"""Trees that the configuration can name."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import ConfigError
from configs.schema import SpeculationConfig
from configs.trees import DynamicTree, StaticTree, load_tree, shipped_trees
from engine.step.shape import ROOT, DynamicShape, StaticShape, chain
from server.assembly.drafting import tree_shape

SIZES = {
    **{f"chain{n}": n + 1 for n in range(1, 8)},
    **{f"tree{n}": n for n in (4, 8, 16, 26, 60)},
    **{f"dynamic{n}": n for n in (8, 16, 60)},
}


def test_the_shipped_trees_are_these() -> None:
    assert set(shipped_trees()) == set(SIZES)


@pytest.mark.parametrize(("name", "num_nodes"), SIZES.items())
def test_every_shipped_tree_has_the_size_in_its_name(name: str, num_nodes: int) -> None:
    shape = tree_shape(name)
    assert shape.num_nodes == num_nodes
    assert shape.name == name
    if isinstance(shape, StaticShape) and name.startswith("chain"):
        assert shape == chain(num_nodes - 1)
    assert isinstance(shape, DynamicShape) == name.startswith("dynamic")


def test_candidates_of_auto_are_shipped_and_the_cheapest_comes_first() -> None:
    candidates = SpeculationConfig().candidates
    sizes = [SIZES[name] for name in candidates]
    assert sizes == sorted(sizes)
    assert tree_shape("root") is ROOT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parents: [-1, 0]\nnum_nodes: 3", "either parents, or"),
        ("num_nodes: 3", "either parents, or"),
        ("{}", "either parents, or"),
        ("[-1, 0]", "either parents, or"),
        ("num_nodes: 3\nmax_depth: 2\ntop_k: wide", "top_k"),
        ("parents: [-1, 0]\nroot: 1", "root"),
        ("parents: oak", "parents"),
        ("parents: [", "tree"),
    ],
)
def test_a_bad_tree_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_tree(str(path))


def test_the_keys_of_a_file_say_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text("parents: [-1, 0]", encoding="utf-8")
    assert load_tree(str(path)) == StaticTree(parents=(-1, 0))
    path.write_text("{num_nodes: 3, max_depth: 2, top_k: 1}", encoding="utf-8")
    assert load_tree(str(path)) == DynamicTree(num_nodes=3, max_depth=2, top_k=1)


@pytest.mark.parametrize("parents", [[-1, 2, 0], [0, 0], [-1, -1]])
def test_parents_that_are_no_tree_are_refused(tmp_path: Path, parents: list[int]) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text(f"parents: {parents}", encoding="utf-8")
    with pytest.raises(ValueError, match="node"):
        tree_shape(str(path))


def test_an_unknown_tree_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no tree 'oak'; shipped ones: chain1, .*tree8"):
        load_tree("oak")
