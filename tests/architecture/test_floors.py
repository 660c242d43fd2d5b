"""Inside a package, imports point down: a room imports only rooms on lower floors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from tests.architecture.source_tree import PRODUCT, Module, imports, modules

Table = Mapping[str, frozenset[str]]


def tower(*rooms: str) -> Table:
    """Rooms from the ground up; each may import all below it."""
    return {room: frozenset(rooms[:floor]) for floor, room in enumerate(rooms)}


# package -> room (a folder, or a file beside the folders) -> rooms that it may import, all of which
# stand further up in the table. A room of many files is a package with a table of its own.
FLOORS: dict[str, Table] = {
    "engine": tower(
        "progress",
        "request",
        "messages",
        "grammar",
        "copies",
        "kv",
        "step",
        "checkpoints",
        "parallel",
        "sampling",
        "speculation",
        "models",
        "quantising",
        "scheduler",
        "runner",
        "capture",
        "completion",
        "core",
    ),
    "server": {
        "version": frozenset(),
        "text": frozenset(),
        "http": frozenset({"version", "text"}),
        "openai": frozenset({"text", "http"}),
        "anthropic": frozenset({"text", "http", "openai"}),
        "apis": frozenset({"openai", "anthropic"}),
        "page": frozenset({"http"}),
        "terminal": frozenset(),
        "measuring": frozenset(),
        "planning": frozenset(),
        "routing": frozenset(),
        "assembly": frozenset({"text", "planning"}),
        "process": frozenset({"text", "http", "openai", "apis", "page", "assembly"}),
        "ray": frozenset({"http", "routing", "process"}),
        "commands": frozenset(
            {"text", "planning", "assembly", "process", "ray", "terminal", "measuring", "version"}
        ),
        "cli": frozenset({"version", "commands"}),
    },
    "server.http": tower(
        "errors",
        "engine_client",
        "monitoring",
        "admission",
        "middleware",
        "connection",
        "reply",
        "context",
        "request",
        "routes",
        "app",
    ),
    "server.assembly": tower(
        "kept_costs",
        "library",
        "running_requests",
        "operations",
        "drafting",
        "planning",
        "ranks",
        "roles",
        "swaps",
        "compose",
        "offline",
        "quantising",
        "heads",
    ),
    "server.process": tower(
        "setup",
        "channel",
        "engine_process",
        "follower",
        "supervision",
        "roles",
        "learning",
        "web",
        "announcement",
        "http_process",
        "launcher",
    ),
    "server.text": tower(
        "worker_processes",
        "letters",
        "tokens",
        "output",
        "template",
        "answer",
        "generation_config",
        "grammar_process",
        "grammars",
        "chat_codec",
    ),
    "server.openai": tower("request", "inputs", "reply", "endpoints", "responses", "routes"),
}


def room_of(name: str, package: str) -> str | None:
    """The room of a module of this package; None for the package itself and for other modules."""
    inside = name.removeprefix(f"{package}.")
    return None if inside == name else inside.split(".")[0]


def unknown_rooms(module: Module, package: str) -> list[str]:
    room = room_of(module.name, package)
    if room is None or room in FLOORS[package]:
        return []
    return [module.at(module.tree, f"{room} has no floor yet")]


def wrong_arrows(module: Module, package: str) -> list[str]:
    """Imports of rooms that do not lie below this one."""
    room = room_of(module.name, package)
    if room is None:
        return []
    allowed = {None, room, *FLOORS[package].get(room, ())}
    return [
        module.at(node, f"{room} must not import {name}")
        for node, name in imports(module)
        if room_of(name, package) not in allowed
    ]


def files(package: str) -> Iterable[Module]:
    return modules((package.split(".")[0],))


def misplaced(table: Table) -> list[str]:
    """Rooms that may import one which is not further down in the table: a circle, or no floor."""
    seen: set[str] = set()
    found = []
    for room, below in table.items():
        found += [f"{room} may import {other}" for other in sorted(below - seen)]
        seen.add(room)
    return found


def circles(found: Iterable[Module]) -> list[str]:
    """Modules that import each other, also inside functions. One line for each circle met."""
    known = {module.name: module for module in found}
    arrows = {name: sorted(_targets(module, known)) for name, module in known.items()}
    done: set[str] = set()
    lines: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            lines.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for target in arrows[name]:
                visit(target, (*way, name))
            done.add(name)

    for name in arrows:
        visit(name, ())
    return lines


def _targets(module: Module, known: Mapping[str, Module]) -> set[str]:
    named = {name for _, name in imports(module)}
    named |= {name.rpartition(".")[0] for name in named}
    return {name for name in named if name in known and not known[name].is_package}


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package: str) -> None:
    assert [line for module in files(package) for line in unknown_rooms(module, package)] == []


@pytest.mark.parametrize("package", FLOORS)
def test_imports_point_down(package: str) -> None:
    assert [line for module in files(package) for line in wrong_arrows(module, package)] == []


@pytest.mark.parametrize("package", FLOORS)
def test_floors_have_an_order(package: str) -> None:
    assert misplaced(FLOORS[package]) == []


@pytest.mark.parametrize("package", PRODUCT)
def test_no_modules_import_each_other(package: str) -> None:
    assert circles(modules((package,))) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("server/http/a.py", "from server.openai.request.schema import ChatRequest"),
        ("server/http/a.py", "def f():\n    from server.openai import chat"),
        (
            "server/http/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import server.cli",
        ),
        ("server/text/a.py", "from ..http import errors"),
        ("server/assembly/a.py", "import server.process.channel.wire"),
        ("server/commands/a.py", "from server import cli"),
        ("engine/request.py", "from engine.messages import Tokens"),
        ("engine/kv/a/b.py", "from engine.step.plan import StepPlan"),
        ("engine/models/a.py", "import importlib\nimportlib.import_module('engine.core')"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, text: str) -> None:
    module = Module(path, text)
    assert len(wrong_arrows(module, module.package)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("server/cli.py", "from server.commands import serve\nimport engine.core, serverless"),
        ("server/process/a.py", "from server.assembly.compose import x\nfrom . import b"),
        ("server/openai/a.py", "import server\nfrom server.http.errors import ApiError"),
        ("engine/core.py", "from engine.request import Request\nfrom engine.runner.step import x"),
        ("engine/step/a.py", "from .plan import StepPlan\nfrom ..kv.slots import Slots"),
    ],
)
def test_a_right_arrow_is_left_alone(path: str, text: str) -> None:
    module = Module(path, text)
    assert wrong_arrows(module, module.package) == []


def test_a_wrong_arrow_inside_a_room_is_seen() -> None:
    module = Module("server/http/middleware/a.py", "from server.http.request.body import read_body")
    assert wrong_arrows(module, "server") == []
    assert len(wrong_arrows(module, "server.http")) == 1


@pytest.mark.parametrize("path", ["server/tools/a.py", "server/loose.py", "server/a/b/c.py"])
def test_a_room_without_a_floor_is_seen(path: str) -> None:
    assert len(unknown_rooms(Module(path, ""), "server")) == 1
    assert unknown_rooms(Module("server/__init__.py", ""), "server") == []


def test_a_table_that_allows_a_circle_is_seen() -> None:
    table = {"a": frozenset({"b"}), "b": frozenset({"a"}), "c": frozenset({"c", "a"})}
    assert misplaced(table) == ["a may import b", "c may import c"]


def test_a_circle_of_modules_is_seen() -> None:
    texts = {
        "a/b.py": "from a import c",
        "a/c.py": "def f():\n    from a.d import x",
        "a/d.py": "import a.b",
        "a/e.py": "import a.b, a.c",
    }
    assert circles(Module(path, text) for path, text in texts.items()) == [
        "a.b -> a.c -> a.d -> a.b"
    ]
