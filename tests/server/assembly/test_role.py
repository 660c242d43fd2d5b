"""How engines with roles reach each other."""

from __future__ import annotations

import importlib.util

import pytest

from configs.schema import ParallelConfig
from server.assembly.roles.role import Role, check_transfer


def test_nixl_is_asked_for_only_where_pages_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = ParallelConfig(roles="prefill:1,decode:1", transfer="nixl")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r'parallel.transfer is nixl.*pip install "aerie\[nixl\]"'):
        check_transfer(roles)
    check_transfer(ParallelConfig(roles="prefill:1,decode:1"))
    check_transfer(ParallelConfig(transfer="nixl"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_transfer(roles)


@pytest.mark.parametrize("areas", [None, {0: 7, 1: 9}])
def test_a_role_travels_as_text(areas: dict[int, int] | None) -> None:
    role = Role("decode", 1, 2, areas)
    assert Role.from_text(role.to_text()) == role
