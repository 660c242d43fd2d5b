"""Generated shapes: complete, repeatable, within their ranges."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

import numpy as np
from scipy.spatial import cKDTree

from syncspec.generator import CATEGORIES, Draw, generate, generated_set
from syncspec.graph import connected_graph
from syncspec.surfaces import Arc, Ellipsoid, Surface, Tube, box

RNG = np.random.default_rng


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("category", CATEGORIES)
def test_every_shape_has_all_parts_and_keypoints_in_one_piece(category: str, unseen: bool) -> None:
    kind = CATEGORIES[category]
    for seed in range(3):
        shape = generate(category, 2000, seed, unseen=unseen)
        counts = np.bincount(shape.labels, minlength=len(kind.parts))
        assert shape.points.shape == (2000, 3)
        assert counts.min() >= 40
        assert np.abs(shape.points).max() == pytest.approx(1)
        connected_graph(shape.points)
        assert shape.keypoints.shape == (len(kind.keypoints), 3)
        assert cKDTree(shape.points).query(shape.keypoints)[0].max() < 0.2


def test_there_are_five_categories_with_parts_of_different_names() -> None:
    assert set(CATEGORIES) == {"airplane", "chair", "lamp", "mug", "table"}
    assert all(len(kind.parts) >= 2 for kind in CATEGORIES.values())


def test_the_same_seed_gives_the_same_shape_and_another_another() -> None:
    first, same, other = (generate("mug", 200, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.points, same.points)
    assert not np.array_equal(first.points, other.points)


def test_unseen_parameters_lie_outside_the_seen_range() -> None:
    seen = [Draw(RNG(seed)).between(0, 10) for seed in range(200)]
    unseen = [Draw(RNG(seed), unseen=True).between(0, 10) for seed in range(200)]
    assert min(seen) >= 2
    assert max(seen) <= 8
    assert all(value <= 2 or value >= 8 for value in unseen)
    assert min(unseen) < 1 < 9 < max(unseen)


def test_splits_share_no_shape() -> None:
    data = generated_set(2, 1, 100, 0, ("mug", "lamp"))
    assert {split: len(shapes) for split, shapes in data.splits.items()} == {
        "train": 4,
        "seen": 2,
        "unseen": 2,
    }
    every = [shape.points.tobytes() for shapes in data.splits.values() for shape in shapes]
    assert len(set(every)) == len(every)
    assert len(data.of("train", "mug")) == 2


@pytest.mark.parametrize(
    ("category", "num_points", "named"),
    [("spoon", 200, "'spoon' is unknown.*airplane"), ("mug", 5, "num_points is 5")],
)
def test_what_cannot_be_made_is_refused(category: str, num_points: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        generate(category, num_points, 0)


@pytest.mark.parametrize(
    ("surface", "area", "mean"),
    [
        (box((1, 2, 3), (2, 4, 6)), 88.0, (1, 2, 3)),
        (Tube((0, 0, 0), (0, 2, 0), (1, 1)), 6 * np.pi, (0, 1, 0)),
        (Tube((0, 0, 0), (0, 3, 0), (0, 4), (False, False)), 20 * np.pi, (0, 2, 0)),
        (Ellipsoid((1, 0, 0), (2, 2, 2)), 16 * np.pi, (1, 0, 0)),
        (Arc((0, 0, 5), (2, 2), 0.1, (0, 2 * np.pi)), 0.8 * np.pi**2, (0, 0, 5)),
    ],
)
def test_surfaces_have_their_area_and_even_points(
    surface: Surface, area: float, mean: tuple[float, float, float]
) -> None:
    assert surface.area == pytest.approx(area, rel=1e-3)
    points = surface.sample(20_000, RNG(0))
    np.testing.assert_allclose(points.mean(axis=0), mean, atol=0.08)
