"""The scores of parts and keypoints, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from syncspec.scores import mean_ious, shape_iou, share_within


@pytest.mark.parametrize(
    ("predicted", "labels", "num_parts", "iou"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 2, 1.0),
        ([0, 0, 0, 1], [0, 0, 1, 1], 2, (2 / 3 + 1 / 2) / 2),
        ([0, 0, 0, 1], [0, 0, 1, 1], 3, (2 / 3 + 1 / 2 + 1) / 3),  # neither has part 2
        ([2, 2], [0, 0], 3, 1 / 3),
    ],
)
def test_iou_of_a_shape(
    predicted: list[int], labels: list[int], num_parts: int, iou: float
) -> None:
    assert shape_iou(np.array(predicted), np.array(labels), num_parts) == pytest.approx(iou)


def test_means_over_shapes_and_over_categories() -> None:
    assert mean_ious({"a": [1.0, 0.5, 0.0], "b": [1.0]}) == pytest.approx((0.625, 0.75))


def test_share_of_keypoints_within_distances() -> None:
    found = share_within(np.array([0.01, 0.05, 0.3, 0.11]), (0.05, 0.2))
    assert found == {"0.05": 0.5, "0.2": 0.75}
