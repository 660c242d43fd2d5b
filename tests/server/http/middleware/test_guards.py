"""Hosts, paths and queries of requests; origins of web pages; the documentation page."""

from __future__ import annotations

import html.parser
import logging
import re
from collections.abc import Callable

import pytest

from configs.schema import ServerConfig
from server.http.middleware.guards import known_hosts
from server.http.routes.docs_page import PAGE, policy
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server

MakeServer = Callable[..., Server]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:80", "a.localhost:1"]
)
def test_names_of_this_machine_are_accepted(server: Server, host: str) -> None:
    assert server.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "::1", "", "[::2]"])
def test_another_host_is_421(server: Server, host: str) -> None:
    error = error_of(server.post(CHAT_PATH, CHAT, headers={"host": host}), 421)
    assert error["code"] == "host_not_allowed"
    assert "server.allowed_hosts" in error["message"]


@pytest.mark.parametrize(
    ("settings", "has_keys", "checked"),
    [
        ({}, False, True),
        ({"host": "::1"}, False, True),
        ({"host": "localhost"}, False, True),
        ({"host": "0.0.0.0"}, False, False),
        ({"host": "llm.example"}, False, False),
        ({}, True, False),
        ({"socket": "/run/aerie"}, False, False),
        ({"allowed_hosts": ("*",)}, False, False),
        ({"allowed_hosts": ("llm.example",), "host": "0.0.0.0"}, True, True),
    ],
)
def test_hosts_are_checked_where_nothing_else_protects(
    settings: dict[str, object], has_keys: bool, checked: bool
) -> None:
    found = known_hosts(ServerConfig.model_validate(settings), has_keys)
    assert (found is not None) == checked
    if "allowed_hosts" in settings and checked:
        assert found == ("llm.example",)


def test_unknown_query_parameters_are_400(server: Server) -> None:
    error = error_of(server.post(CHAT_PATH + "?stream=true", CHAT), 400)
    assert error["code"] == "unknown_query_parameter"
    assert '"stream"' in error["message"]
    error_of(server.get("/v1/models?x"), 400)


def test_probes_ignore_them_with_a_warning(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    assert "x-aerie-warning" not in server.get("/health").headers
    caplog.set_level(logging.INFO)
    response = server.get("/docs?é=1&é=2&x")
    assert response.status_code == 200
    warning = response.headers["x-aerie-warning"]
    assert warning.startswith("not used: query parameter ")
    assert warning.endswith(", query parameter x")
    assert warning.count("query parameter") == 2
    assert "query parameter x" in caplog.text
    assert "query parameter x" in server.get("/health?x").headers["x-aerie-warning"]


def test_they_are_ignored_where_unknown_fields_are(make_server: MakeServer) -> None:
    tolerant = make_server(unknown_fields="warn")
    response = tolerant.post(CHAT_PATH + "?timeout=5", CHAT | {"temprature": 1})
    assert response.status_code == 200
    assert response.headers["x-aerie-warning"] == "not used: query parameter timeout, temprature"


def test_web_pages_of_configured_origins_may_send_requests(make_server: MakeServer) -> None:
    server = make_server(cors_origins=("https://chat.example",), api_keys=("key",))
    asking = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-os",
    }
    allowed = server.request("OPTIONS", CHAT_PATH, headers=asking)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    answer = server.post(
        CHAT_PATH, CHAT, headers={"authorization": "Bearer key", "origin": "https://chat.example"}
    )
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    other = server.request("OPTIONS", CHAT_PATH, headers=asking | {"origin": "https://x.example"})
    assert "access-control-allow-origin" not in other.headers
    refused = server.post(CHAT_PATH, CHAT, headers={"origin": "https://chat.example"})
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (401, True)


def test_without_origins_no_web_page_may(server: Server) -> None:
    response = server.post(CHAT_PATH, CHAT, headers={"origin": "https://chat.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_root_path_is_taken_off(make_server: MakeServer) -> None:
    server = make_server(root_path="/llm", api_keys=("key",))
    for prefix in ("/llm", ""):  # with proxies that leave it, and those that do not
        assert server.get(prefix + "/health").status_code == 200
        assert server.get(prefix + "/v1/models").status_code == 401
        headers = {"authorization": "Bearer key"}
        assert server.post(prefix + CHAT_PATH, CHAT, headers=headers).status_code == 200
    document = server.get("/llm/openapi.json").json()
    assert document["servers"] == [{"url": "/llm"}]
    error_of(server.get("/llmx/health", headers={"authorization": "Bearer key"}), 404)


def test_the_documentation_needs_nothing_from_elsewhere(server: Server) -> None:
    response = server.get("/docs")
    addresses: list[str] = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            addresses.extend(str(value) for name, value in attrs if name in ("src", "href"))

    Links().feed(response.text)
    assert addresses == ["openapi.json"]
    assert "http://" not in response.text.replace("http://www.w3.org", "")
    allowed = response.headers["content-security-policy"]
    assert allowed.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in allowed
    assert not re.search(r"\son[a-z]+=|\sstyle=", response.text)  # the policy forbids these


def test_the_policy_changes_with_the_page() -> None:
    page = PAGE.read_text()
    assert policy(page) != policy(page.replace("Loading", "x").replace('"use strict";', "1;"))


@pytest.mark.parametrize("keys", [(), ("key",)])
def test_the_document_says_which_routes_need_a_key(
    make_server: MakeServer, keys: tuple[str, ...]
) -> None:
    document = make_server(api_keys=keys).get("/openapi.json").json()
    schemes = document["components"].get("securitySchemes")
    chat, health = (document["paths"][path] for path in (CHAT_PATH, "/health"))
    if keys:
        assert schemes == {"key": {"type": "http", "scheme": "bearer"}}
        assert chat["post"]["security"] == [{"key": []}]
        assert health["get"]["security"] == []
    else:
        assert (schemes, "security" in chat["post"]) == (None, False)
