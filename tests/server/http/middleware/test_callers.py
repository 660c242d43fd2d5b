"""What the engine is told about callers, and which priorities they may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.schema import ServerConfig
from server.http.middleware.callers import Callers
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server

MakeServer = Callable[..., Server]


def label(callers: Callers, key: str) -> str:
    return callers.of([(b"authorization", f"Bearer {key}".encode())]).label


def test_labels_tell_keys_apart_and_do_not_show_them() -> None:
    config = ServerConfig(api_keys=("one", "two"))
    callers = Callers(config)
    assert label(callers, "one") == label(callers, "one") != label(callers, "two")
    assert label(callers, "one") != label(Callers(config), "one"), "it needs a secret"
    assert "one" not in label(callers, "one")


def test_without_keys_all_callers_are_one() -> None:
    callers = Callers(ServerConfig())
    assert label(callers, "invented") == callers.of([]).label == ""


def test_a_priority_key_must_be_an_api_key() -> None:
    with pytest.raises(
        ValueError, match=r"server\.priority_keys holds a key that is not an API key"
    ):
        Callers(ServerConfig(api_keys=("a",), priority_keys=("a", "b")))


@pytest.mark.parametrize(
    ("key", "limits", "priority", "allowed"),
    [
        (None, {}, 0, True),
        (None, {}, -1, False),
        (None, {"least_priority": -3}, -3, True),
        ("plain", {"api_keys": ("plain", "urgent"), "priority_keys": ("urgent",)}, -1, False),
        ("urgent", {"api_keys": ("plain", "urgent"), "priority_keys": ("urgent",)}, -1000, True),
        (None, {"least_priority": 5}, 4, False),
    ],
)
def test_priorities_are_limited_by_key(
    make_server: MakeServer, key: str | None, limits: dict[str, Any], priority: int, allowed: bool
) -> None:
    server = make_server(**limits)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = server.post(CHAT_PATH, CHAT | {"priority": priority}, headers=headers)
    if allowed:
        assert response.status_code == 200
        return
    error = error_of(response, 403)
    assert (error["param"], error["code"]) == ("priority", "priority_not_allowed")
    least = limits.get("least_priority", 0)
    assert error["message"].startswith(f"priority is {priority}: ")
    assert f"at least {least}" in error["message"]
    assert server.engine.submitted == []


@pytest.mark.parametrize("shared", [False, True])
def test_keys_have_their_own_prompt_caches_unless_they_are_shared(
    make_server: MakeServer, shared: bool
) -> None:
    server = make_server(api_keys=("a", "b"), share_between_clients=shared)
    for key in ("a", "b", "a"):
        server.post(CHAT_PATH, CHAT, headers={"authorization": f"Bearer {key}"})
    salts = [request.cache_salt for request in server.engine.submitted]
    clients = [request.client for request in server.engine.submitted]
    assert (salts[0] == salts[1]) == shared
    assert salts[0] == salts[2]
    assert len(set(clients)) == 2
