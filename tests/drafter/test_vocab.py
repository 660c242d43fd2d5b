"""d2t offsets and t2d marks encode distinct ids of the target."""

from __future__ import annotations

import pytest
import torch

from drafter.vocab import check_mask, is_identity, mask_of, offsets_of, target_ids_of


def test_offsets_and_ids_are_inverse() -> None:
    ids = torch.tensor([0, 3, 4, 90, 130])
    assert offsets_of(ids).tolist() == [0, 2, 2, 87, 126]
    assert target_ids_of(offsets_of(ids), 131).tolist() == ids.tolist()
    assert target_ids_of(offsets_of(ids).int(), 131).dtype == torch.int64


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 0, 3], "d2t maps draft id 2 to 5; the target's ids are 0 to 4"),
        ([-1, 0, 0], "d2t maps draft id 0 to -1"),
        ([1, 0, 2], "d2t maps several draft ids to 1"),
    ],
    ids=["above", "below", "twice"],
)
def test_offsets_that_are_no_ids_are_refused(offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_ids_of(torch.tensor(offsets), 5)


def test_mask_marks_the_ids() -> None:
    ids = torch.tensor([1, 3])
    assert mask_of(ids, 5).tolist() == [False, True, False, True, False]
    check_mask(mask_of(ids, 5), ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0, 1, 1, 1, 0], "t2d marks target id 2, d2t does not map to it"),
        ([0, 1, 0, 0, 0], "t2d does not mark target id 3, d2t does"),
    ],
)
def test_mask_of_other_ids_is_refused(mask: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mask(torch.tensor(mask, dtype=torch.bool), torch.tensor([1, 3]))


@pytest.mark.parametrize(
    ("ids", "expected"), [([0, 1, 2], True), ([0, 1], False), ([0, 2, 1], False)]
)
def test_identity_is_every_id_in_order(ids: list[int], expected: bool) -> None:
    assert is_identity(torch.tensor(ids), 3) is expected
