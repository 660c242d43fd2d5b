"""Collectives of several ranks over gloo."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.parallel import distributed
from engine.parallel.distributed import DistributedGroup
from tests.support.waiting import DEADLINE

CPU = torch.device("cpu")


def reduced(folder: Path, parts: Tensor) -> list[Tensor]:
    """Every rank's sum of `parts` [ranks, T, H]."""
    size = len(parts)

    def on_rank(rank: int) -> Tensor:
        group = DistributedGroup.join(folder / "store", rank, size, CPU, DEADLINE)
        return group.all_reduce(parts[rank].clone())

    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(on_rank, range(size), timeout=DEADLINE))


class Known:
    """The part of a process group that a group's constructor uses."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size
        self.rank = lambda: 0


@pytest.mark.parametrize(("size", "shared"), [(1, 0), (2, 1)])
def test_only_several_ranks_on_gpus_share_memory(
    size: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(distributed, "SmallAllReduce", made.append)
    known: Any = Known(size)
    DistributedGroup(known, known)
    assert len(made) == shared


def test_the_sum_of_one_rank_is_its_tensor(tmp_path: Path) -> None:
    group = DistributedGroup.join(tmp_path / "store", 0, 1, CPU, DEADLINE)
    x = torch.randn(3, 5)
    assert group.all_reduce(x) is x


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
