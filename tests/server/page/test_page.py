"""The page at /, over plain HTTP: what is served, to whom, and under which policy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from server.page.routes import ASSETS, POLICY, assets
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import Server

MakeServer = Callable[..., Server]
VENDOR = ASSETS.with_name("vendor")
LOCK = json.loads((VENDOR / "package-lock.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(assets()))
def test_every_file_of_the_page_is_open_to_all_under_one_policy(
    make_server: MakeServer, path: str
) -> None:
    server = make_server(api_keys=("key",))
    for response in (server.get(path), server.request("HEAD", path), server.get(path + "?x=1")):
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
    name = "index.html" if path == "/" else path.removeprefix("/page/")
    assert server.get(path).content == (ASSETS / name).read_bytes()


def test_a_file_that_the_browser_has_is_not_sent_again(server: Server) -> None:
    first = server.get("/page/main.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    again = server.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_nothing_comes_from_elsewhere_or_needs_an_inline_script(server: Server) -> None:
    page = server.get("/").text
    own = r'(?:href|src)="(?P<path>[^"]*)"'
    paths = [found["path"] for found in re.finditer(own, page)]
    assert all(
        server.get("/" + path.lstrip("/")).status_code == 200 for path in paths if path[0] != "#"
    )
    assert not any(path.startswith(("/", "http", "//")) for path in paths)  # for any root path
    assert "<script>" not in page
    assert not re.search(r"\son\w+=|\sstyle=", page)
    for part in ("script-src 'self'", "default-src 'none'", "frame-ancestors 'none'"):
        assert part in POLICY
    assert "unsafe" not in POLICY


def test_only_files_of_the_page_are_served(server: Server) -> None:
    for path in ("/page/", "/page/gone.js", "/page/../routes.py", "/page/package.json"):
        error_of(server.get(path), 404)
    error_of(server.post("/", {}), 405)


def test_without_the_page_the_path_is_unknown(make_server: MakeServer) -> None:
    server = make_server(page=False)
    for path in ("/", "/page/main.js"):
        error_of(server.get(path), 404)


def test_under_a_root_path_the_page_is_found_with_and_without_a_slash(
    make_server: MakeServer,
) -> None:
    server = make_server(root_path="/llm", api_keys=("key",))
    assert server.get("/llm/").text == server.get("/").text
    moved = server.get("/llm")
    assert (moved.status_code, moved.headers["location"]) == (307, "/llm/")


def test_the_page_is_no_part_of_the_api_document(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert not any(path == "/" or path.startswith("/page") for path in paths)


def test_the_joined_libraries_are_those_of_the_lock_file() -> None:
    """And their licences come with them."""
    wanted = json.loads((VENDOR / "package.json").read_text(encoding="utf-8"))["dependencies"]
    joined = (ASSETS / "vendor.js").read_text(encoding="utf-8")
    licences = (ASSETS / "vendor.txt").read_text(encoding="utf-8")
    for name, version in wanted.items():
        assert LOCK["packages"][f"node_modules/{name}"]["version"] == version
        assert f"{name} {version}\n" in licences
    assert f'"{wanted["dompurify"]}"' in joined
    assert f'"{wanted["highlight.js"]}"' in joined


def imported(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r'^import [^"]*"\./([\w.]+)";$', text, re.MULTILINE))


def test_scripts_import_only_each_other() -> None:
    for path in ASSETS.glob("*.js"):
        if path.name != "vendor.js":
            assert {f"/page/{name}" for name in imported(path)} <= set(assets())
