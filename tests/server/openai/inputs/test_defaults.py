"""The model's sampling parameters, in requests that leave them open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from server.text.generation_config import SamplingDefaults
from tests.support.servers.http_server import Server

MakeServer = Callable[..., Server]
DEFAULTS = SamplingDefaults(
    temperature=0.6, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, max_new_tokens=20
)
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OWN = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}


def asked(server: Server, chat: bool, **fields: Any) -> dict[str, Any]:
    """The sampling parameters that reach the engine."""
    answer = server.chat(**fields) if chat else server.complete(**fields)
    assert answer.status_code == 200
    (request,) = server.engine.submitted
    return {name: getattr(request.params, name) for name in (*NAMES, "max_tokens")}


@pytest.mark.parametrize("chat", [True, False])
def test_what_a_request_leaves_open_is_the_models(make_server: MakeServer, chat: bool) -> None:
    found = asked(make_server(defaults=DEFAULTS), chat, top_p=None, top_k=3)
    expected = DEFAULTS.named() | {"top_k": 3}
    assert {name: found[name] for name in NAMES} == {name: expected[name] for name in NAMES}
    assert found["max_tokens"] == (20 if chat else 16)


@pytest.mark.parametrize("chat", [True, False])
def test_what_a_request_says_wins(make_server: MakeServer, chat: bool) -> None:
    found = asked(make_server(defaults=DEFAULTS), chat, **OWN, max_tokens=30)
    assert found == OWN | {"max_tokens": 30}


def test_the_models_limit_is_no_more_than_fits_and_no_less_than_must_be(
    make_server: MakeServer,
) -> None:
    most = asked(make_server(), chat=True)["max_tokens"]
    wide = SamplingDefaults(max_new_tokens=10_000)
    assert asked(make_server(defaults=wide), chat=True)["max_tokens"] == most > 20
    assert asked(make_server(defaults=DEFAULTS), True, min_tokens=25)["max_tokens"] == 25


def test_info_shows_them_and_they_change_the_fingerprint(make_server: MakeServer) -> None:
    plain, other = make_server().get("/info").json(), make_server(defaults=DEFAULTS)
    found = other.get("/info").json()
    assert (plain["sampling_defaults"], found["sampling_defaults"]) == ({}, DEFAULTS.named())
    assert plain["system_fingerprint"] != found["system_fingerprint"]
