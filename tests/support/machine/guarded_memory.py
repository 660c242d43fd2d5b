"""Tables and pages between guard rows that no step may read: NaN, and blocks that hold NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kv.storage import KVStorage
from engine.models import loading
from engine.runner.line_state import LineState

GUARD = 8  # rows before and after


def guarded(tensor: Tensor, poison: float) -> Tensor:
    """The same values, with rows of `poison` right before and after them in memory."""
    whole = tensor.new_full((len(tensor) + 2 * GUARD, *tensor.shape[1:]), poison)
    inner = whole[GUARD:-GUARD]
    inner.copy_(tensor)
    return inner


def guard(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Guards the rotary tables, KV pages and block tables of engines that are built from now on;
    returns the list that gets what is guarded."""
    found: list[Tensor] = []
    table, pages, lines = loading.cos_sin_table, KVStorage.allocate, LineState.allocate

    def noted(tensor: Tensor, poison: float) -> Tensor:
        found.append(guarded(tensor, poison))
        return found[-1]

    def guarded_table(*given: Any) -> Tensor:
        return noted(table(*given), torch.nan)

    def guarded_pages(*given: Any, **options: Any) -> KVStorage:
        made = pages(*given, **options)
        return KVStorage(
            tuple(noted(page.fill_(torch.nan), torch.nan) for page in made.keys),
            tuple(noted(page.fill_(torch.nan), torch.nan) for page in made.values),
        )

    def guarded_lines(*given: Any) -> LineState:
        made = lines(*given)
        past_the_last = int(made.tables.max()) + 1  # a block of the pages' guard
        return replace(made, tables=noted(made.tables, past_the_last))

    monkeypatch.setattr(loading, "cos_sin_table", guarded_table)
    monkeypatch.setattr(KVStorage, "allocate", guarded_pages)
    monkeypatch.setattr(LineState, "allocate", guarded_lines)
    return found


def check_guards(tensors: list[Tensor]) -> None:
    """No guard row was written either."""
    for inner in tensors:
        whole = inner.as_strided(
            (len(inner) + 2 * GUARD, *inner.shape[1:]),
            inner.stride(),
            inner.storage_offset() - GUARD * inner.stride(0),
        )
        for rows in (whole[:GUARD], whole[-GUARD:]):
            poisoned = rows.isnan() if rows.is_floating_point() else rows == rows.flatten()[0]
            assert poisoned.all()
