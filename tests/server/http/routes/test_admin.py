"""Admin keys, and the answers of POST /admin/draft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import ServerConfig
from server.http.middleware.keys import load_admin_keys
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server

MakeServer = Callable[..., Server]
PATH = "/admin/draft"
ADMIN = {"authorization": "Bearer root"}
BODY = {"path": "/heads/new"}


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    return make_server(admin_keys=("root", "other-root"), api_keys=("user",))


@pytest.mark.parametrize("key", [None, "user", "roo", "root2", "Root"])
def test_no_other_key_is_an_admin_key(server: Server, key: str | None) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    error = error_of(server.post(PATH, BODY, headers=headers), 401)
    assert error["type"] == "authentication_error"
    assert ("Missing" if key is None else "Incorrect") + " admin key" in error["message"]
    assert server.engine.swapped == []


def test_an_admin_key_is_no_api_key(server: Server) -> None:
    error_of(server.post(CHAT_PATH, CHAT, headers=ADMIN), 401)
    assert server.post(CHAT_PATH, CHAT, headers={"authorization": "Bearer user"}).is_success


@pytest.mark.parametrize("api_keys", [(), ("user",)])
@pytest.mark.parametrize("key", ["user", "root", ""])
def test_without_an_admin_key_the_routes_are_off(
    make_server: MakeServer, api_keys: tuple[str, ...], key: str
) -> None:
    server = make_server(api_keys=api_keys)
    headers = {"authorization": f"Bearer {key}"}
    error = error_of(server.post(PATH, BODY, headers=headers), 403)
    assert error["code"] == "admin_disabled"
    assert "server.admin_keys" in error["message"]
    assert server.engine.swapped == []


def test_every_admin_key_is_compared_even_after_a_match(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return left == right

    monkeypatch.setattr("server.http.middleware.keys.hmac.compare_digest", counting)
    assert server.post(PATH, BODY, headers=ADMIN).status_code == 200
    assert len(compared) == 2


@pytest.mark.parametrize("key", ["root", "other-root"])
def test_facts_of_the_head_in_use_are_answered(server: Server, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    assert server.post(PATH, BODY, headers=headers).json() == {
        "draft": {
            "path": "/heads/new",
            "kind": "eagle3",
            "num_layers": 1,
            "draft_vocab_size": 32,
            "num_parameters": 1000,
            "tap_layers": [1, 4],
            "max_depth": None,
        }
    }
    assert server.post(PATH, {"path": None}, headers=headers).json() == {"draft": None}
    assert server.engine.swapped == ["/heads/new", None]


def test_a_head_that_cannot_be_used_is_400_with_its_reason(server: Server) -> None:
    server.engine.swap_error = "missing tensor fc.weight"
    error = error_of(server.post(PATH, BODY, headers=ADMIN), 400)
    assert error["param"] == "path"
    assert error["message"] == 'path is "/heads/new": missing tensor fc.weight'


@pytest.mark.parametrize("body", [{}, {"path": 3}, {"path": ""}, {"path": "a\0b"}, {"x": 1}, []])
def test_other_bodies_are_400(server: Server, body: Any) -> None:
    error_of(server.post(PATH, body, headers=ADMIN), 400)
    assert server.engine.swapped == []


def test_a_missing_or_dying_engine_is_503(server: Server) -> None:
    server.engine.dies_at_swap = True
    error_of(server.post(PATH, BODY, headers=ADMIN), 503)
    error = error_of(server.post(PATH, BODY, headers=ADMIN), 503)
    assert error["code"] == "engine_not_ready"
    assert server.engine.swapped == ["/heads/new"]


def test_admin_keys_are_not_shown(server: Server) -> None:
    text = server.get("/info", headers={"authorization": "Bearer user"}).text
    assert "root" not in text.replace("root_path", "")
    assert '"admin_keys":["***","***"]' in text


def test_admin_keys_come_from_configuration_and_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nsecond\n")
    config = ServerConfig(admin_keys=("first",), admin_key_file=path)
    assert load_admin_keys(config) == ("first", "second")
    path.write_text("# none\n")
    with pytest.raises(ValueError, match=r"server\.admin_key_file .* holds no key"):
        load_admin_keys(config)


def test_an_admin_key_that_is_an_api_key_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"server\.admin_keys holds an API key"):
        load_admin_keys(ServerConfig(api_keys=("a", "b"), admin_keys=("b",)))
