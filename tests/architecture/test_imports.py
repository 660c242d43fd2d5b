"""Imports point one way, and the HTTP process stays free of torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping

import pytest

from tests.architecture.source_tree import (
    ALL,
    PRODUCT,
    ROOT,
    SEPARATE,
    Module,
    imports,
    modules,
    run_at_import,
)

# package -> our packages that it may import, besides itself
MAY_IMPORT: dict[str, frozenset[str]] = {
    "configs": frozenset(),
    "kernels": frozenset(),
    "engine": frozenset({"configs", "kernels"}),
    "drafter": frozenset({"configs", "kernels", "engine"}),
    "server": frozenset({"configs", "engine"}),
    "syncspec": frozenset(),
}
JOINS_EVERYTHING = "server/assembly/"
# The leaves use these and the standard library only.
LEAVES = {
    "configs": frozenset({"pydantic", "yaml"}),
    "kernels": frozenset({"torch", "triton", "numpy"}),
}
# Pure Python: planning is tested step by step, and its types cross to the HTTP process.
WITHOUT_TORCH = (
    "engine.core",
    "engine.messages",
    "engine.request",
    "engine.kv.block_pool",
    "engine.kv.manager",
    "engine.step.plan",
    "engine.scheduler.waiting",
    "engine.scheduler.scheduler",
    "engine.speculation.policy",
    "engine.step.executor",
)
# The modules of the HTTP process, which must start quickly and stay small.
HTTP_SIDE = (
    "server.cli",
    "server.http.app",
    "server.apis",
    "server.process.launcher",
    "server.process.http_process",
    "server.process.web",
    "server.process.channel.client",
)
HEAVY = frozenset({"torch", "transformers", "triton", "kernels"})
WEB = {"fastapi", "starlette", "uvicorn", "httptools", "jinja2"}


def wrong_directions(module: Module) -> list[str]:
    """Imports of our packages that this one may not import."""
    allowed = MAY_IMPORT[module.package] | {module.package}
    if module.path.startswith(JOINS_EVERYTHING):
        allowed |= {"kernels", "drafter"}
    return [
        module.at(node, f"{module.package} must not import {name}")
        for node, name in imports(module)
        if top(name) in ALL and top(name) not in allowed
    ]


def foreign_libraries(module: Module) -> list[str]:
    """Imports of a leaf from outside its few libraries."""
    allowed = LEAVES[module.package] | sys.stdlib_module_names | {module.package}
    return [
        module.at(node, f"{module.package} must not import {name}")
        for node, name in imports(module)
        if top(name) not in allowed
    ]


def reached(start: str, known: Mapping[str, Module]) -> dict[str, list[str]]:
    """Every name that importing `start` imports, with the chain of imports to it. Follows modules
    in `known` and the `__init__` of their packages."""
    chains = {start: [start]}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in known:
            continue
        module = known[name]
        for _, found in imports(module, run_at_import(module.tree)):
            for target in parents(found):
                if target not in chains:
                    chains[target] = [*chains[name], target]
                    waiting.append(target)
    return chains


def heavy_chains(start: str, known: Mapping[str, Module]) -> list[str]:
    """The chains by which importing `start` imports a heavy library."""
    chains = reached(start, known)
    return [" -> ".join(chain) for name, chain in chains.items() if name in HEAVY]


def parents(name: str) -> list[str]:
    """`a.b.c` imports a, a.b and a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def top(name: str) -> str:
    return name.split(".")[0]


def by_name(found: Iterable[Module]) -> dict[str, Module]:
    return {module.name: module for module in found}


def test_imports_point_one_way() -> None:
    assert [
        line for module in modules((*PRODUCT, *SEPARATE)) for line in wrong_directions(module)
    ] == []


def test_leaves_use_few_libraries() -> None:
    leaves = [module for module in modules() if module.package in LEAVES]
    assert [line for module in leaves for line in foreign_libraries(module)] == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_planning_reaches_no_torch(name: str) -> None:
    known = by_name(modules())
    assert name in known
    assert heavy_chains(name, known) == []


def test_the_engine_process_loads_nothing_of_the_web() -> None:
    code = f"import sys, server.process.engine_process\nprint(sorted({WEB} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stderr, done.stdout.strip()) == ("", "[]")


@pytest.mark.parametrize("name", HTTP_SIDE)
def test_the_http_side_reaches_nothing_heavy(name: str) -> None:
    known = by_name(modules())
    assert name in known
    assert heavy_chains(name, known) == []


def test_the_walk_reaches_the_routes_and_their_messages() -> None:
    chains = reached("server.process.web", by_name(modules()))
    assert {
        "engine.messages",
        "server.openai.endpoints.chat",
        "server.text.output.detokenizer",
    } <= chains.keys()


def test_importing_the_http_side_really_loads_nothing_heavy() -> None:
    code = f"import sys, {', '.join(HTTP_SIDE)}\nprint(sorted({set(HEAVY)} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stderr, done.stdout.strip()) == ("", "[]")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("configs/a.py", "import engine.request"),
        ("kernels/a.py", "from configs.schema import Config"),
        ("engine/a.py", "def f():\n    from server.http import app"),
        ("engine/a.py", "from drafter.proposer import X"),
        ("engine/a/b.py", "from ...server.http import app"),
        ("engine/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import drafter"),
        ("drafter/a.py", "import importlib\nimportlib.import_module('server.http.app')"),
        ("server/a.py", "import kernels.ops as ops"),
        ("server/a.py", "from drafter import proposer"),
        ("server/assembly/compose.py", "import tests.support"),
        ("server/a.py", "import benchmarks"),
        ("server/a.py", "from syncspec.graph import eigenbasis"),
        ("syncspec/a.py", "from kernels.ops import Ops"),
    ],
)
def test_a_wrong_direction_is_seen(path: str, text: str) -> None:
    assert len(wrong_directions(Module(path, text))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("engine/a.py", "import os, configs.schema\nfrom kernels.ops import Ops"),
        ("engine/a/b.py", "from ..request import Request\nfrom . import c"),
        ("engine/a/__init__.py", "from .b import c"),
        ("server/assembly/compose.py", "import kernels.registry\nfrom drafter import x"),
        ("server/assembly/heads/training.py", "from drafter.train import x"),
        ("drafter/a.py", "import torch, engine.step.batch"),
    ],
)
def test_a_right_direction_is_left_alone(path: str, text: str) -> None:
    assert wrong_directions(Module(path, text)) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("configs/a.py", "import torch"),
        ("configs/a.py", "def f():\n    import numpy.typing"),
        ("kernels/a.py", "from transformers import LlamaConfig"),
    ],
)
def test_a_foreign_library_of_a_leaf_is_seen(path: str, text: str) -> None:
    assert len(foreign_libraries(Module(path, text))) == 1


def test_heavy_imports_are_seen_through_a_chain_of_modules() -> None:
    tree = by_name(
        [
            Module("server/http/app.py", "from server import a"),
            Module("server/a.py", "class C:\n    if True:\n        from engine.b import c"),
            Module("engine/b.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
        ]
    )
    chain = "server.http.app -> server.a -> engine.b -> torch"
    assert heavy_chains("server.http.app", tree) == [chain]


def test_heavy_imports_are_seen_in_the_file_of_a_package() -> None:
    tree = by_name(
        [
            Module("server/http/app.py", "import engine.x.y"),
            Module("engine/x/__init__.py", "import kernels"),
        ]
    )
    assert heavy_chains("server.http.app", tree) == ["server.http.app -> engine.x -> kernels"]


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    import torch",
        "async def f():\n    import torch",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "import torchless",
    ],
)
def test_imports_that_do_not_run_are_not_heavy(text: str) -> None:
    assert heavy_chains("server.http.app", by_name([Module("server/http/app.py", text)])) == []
