"""Pages of the documentation that are made from the code."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
import yaml

from configs.schema import Config
from tests.architecture.source_tree import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script("reference")


def test_the_configuration_reference_is_current(reference: ModuleType) -> None:
    written = reference.CONFIGURATION.read_text(encoding="utf-8")
    assert written == reference.configuration(), "make reference"


def test_every_key_has_a_row_with_its_default(reference: ModuleType) -> None:
    sections = reference.configuration().split("\n## ")[1:]
    found = {part.split("\n")[0]: re.findall(r"^\| `(\w+)` ", part, re.M) for part in sections}
    assert found == {name: list(type(section).model_fields) for name, section in Config()}


def test_the_reference_of_the_api_has_every_route_and_field(reference: ModuleType) -> None:
    page = reference.api()
    for wanted in ("## POST /v1/chat/completions", "## GET /health", "### SpeculationOptions"):
        assert f"\n{wanted}\n" in page
    row = next(line for line in page.splitlines() if line.startswith("| `temperature` "))
    assert row.startswith("| `temperature` | number or null |")
    assert "<" not in re.sub(r"`[^`]*`", "", page)  # letters of HTML stay letters


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string"}, "text"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer or null"),
        ({"type": "array", "items": {"$ref": "#/a/b__Tool"}}, "list of Tool"),
        ({"enum": ["a", 1]}, "`a`, `1`"),
        ({"const": "x"}, "`x`"),
        ({}, "anything"),
    ],
)
def test_types_are_told_in_words(reference: ModuleType, schema: object, words: str) -> None:
    assert reference.type_of(schema, {}) == words


def test_every_page_of_the_site_is_in_its_contents() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert listed == pages | {"reference/api.md"}
    yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
