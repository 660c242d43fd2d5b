"""Collectives of several ranks over gloo."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.parallel.distributed import DistributedGroup

CPU = torch.device("cpu")
WAIT = 60.0


def reduced(folder: Path, parts: Tensor) -> list[Tensor]:
    """What every rank has for the sum of `parts` [ranks, T, H]."""
    size = len(parts)

    def on_rank(rank: int) -> Tensor:
        group = DistributedGroup.join(folder / "store", rank, size, CPU, WAIT)
        return group.all_reduce(parts[rank].clone())

    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(on_rank, range(size), timeout=WAIT))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_sum_of_a_token_does_not_depend_on_its_company(size: int, tmp_path: Path) -> None:
    parts = torch.randn(size, 7, 576, generator=torch.Generator().manual_seed(size))
    together = reduced(tmp_path, parts)
    assert all(torch.equal(found, together[0]) for found in together)
    assert torch.allclose(together[0], parts.sum(0), atol=1e-5)
    for count in (1, 2, 5):
        (tmp_path / str(count)).mkdir()
        alone = reduced(tmp_path / str(count), parts[:, :count])
        assert torch.equal(alone[0], together[0][:count])
