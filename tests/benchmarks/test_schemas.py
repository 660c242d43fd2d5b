"""Schemas of a suite and of a collection are counted; the model is a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llguidance import LLMatcher
from typer.testing import CliRunner

from benchmarks import schemas
from benchmarks.cases.schema_suite import in_order, run_suite
from benchmarks.tables import markdown
from engine.request import Grammar
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.text import tiny_grammars

AGE = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}},
       "required": ["age"], "additionalProperties": False}  # fmt: skip
ENTRIES = [
    {
        "description": "an age",
        "schema": AGE,
        "tests": [
            {"data": {"age": 3}, "valid": True},
            {"data": {"age": -3}, "valid": False},
            {"data": [], "valid": False},
        ],
    },
    {"description": "not", "schema": {"not": {}}, "tests": [{"data": 1, "valid": False}]},
    {"description": "all", "schema": True, "tests": [{"data": 1, "valid": True}]},
]


SUITE = Path(__file__).parent / "json_schema_suite"  # a sample of JSON-Schema-Test-Suite


def test_a_sample_of_the_suite_is_read_without_an_error() -> None:
    """Each instance that the suite calls valid is taken, and no other; other schemas are refused,
    not read wrongly. The whole suite: `python -m benchmarks.schemas --suite`."""
    compiler = tiny_grammars.compiler()

    def check(text: str) -> LLMatcher:
        return compiler.compile(Grammar("json_schema", text))

    encode = tiny_grammars.TinyTokenizer()
    (found,) = run_suite(SUITE, ["draft2020-12"], check, encode, tiny_grammars.EOS).values()
    assert (found.schemas, found.refused, found.wrong) == (67, 19, [])
    assert found.valid_taken == found.valid > 60
    assert found.invalid > 60


def test_the_command_counts_what_fits(tmp_path: Path, native_cache: Path) -> None:
    write_tiny_llama(tmp_path / "tiny", TinyLlama(vocab_size=384))
    for draft in schemas.DRAFTS:
        (tmp_path / "tests" / draft).mkdir(parents=True)
        path = tmp_path / "tests" / draft / "a.json"
        path.write_text(json.dumps(ENTRIES), encoding="utf-8")
    found = {"enum": {"enum": ["red", "blue"]}, "null": {"type": "null"}, "not": {"not": {}}}
    (tmp_path / "some" / "in").mkdir(parents=True)
    for name, schema in found.items():
        path = tmp_path / "some" / "in" / f"{name}.json"
        path.write_text(json.dumps(schema), encoding="utf-8")
    output = tmp_path / "schemas.json"
    app = schemas.typer.Typer()
    app.command()(schemas.main)
    folders = ["--suite", str(tmp_path / "tests"), "--collection", str(tmp_path / "some")]
    settings = [f"model.source={tmp_path / 'tiny'}", f"files.dir={native_cache}"]
    options = [*folders, "--max-tokens", "24", "--output", str(output)]
    done = CliRunner().invoke(
        app, [*options, *settings, "cache.num_blocks=64"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    content = json.loads(output.read_text(encoding="utf-8"))
    for counts in content["suite"].values():
        assert (counts["schemas"], counts["refused"]) == (2, 1)
        assert (counts["valid"], counts["valid_taken"]) == (1, 1)
        assert (counts["invalid"], counts["invalid_taken"]) == (2, 0)
        assert counts["reasons"] == {'keyword "not"': 1}
    written = content["collection"]
    assert (written["chosen"], written["refused"], written["equal"]) == (3, 1, 2)
    assert written["complete"] == written["valid"] == 2
    assert "2 texts were complete, and 2 of these fit" in markdown("schemas", content)


def test_members_come_in_the_order_of_their_schema() -> None:
    schema = {"properties": {"b": {"items": {"properties": {"d": {}, "c": {}}}}, "a": {}}}
    value = {"x": 1, "a": 2, "b": [{"c": 1, "d": 2}]}
    assert json.dumps(in_order(value, schema)) == '{"b": [{"d": 2, "c": 1}], "a": 2, "x": 1}'


def test_folders_that_hold_no_schemas_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file \*.json"):
        schemas.choose(tmp_path, 3)
