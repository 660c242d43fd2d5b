"""Pages of the documentation that are made from the code.

`python scripts/reference.py` writes docs/reference/configuration.md (a test says when it is out of
date: `make reference`). The page of the HTTP API is made while the site is built.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.schema import Config, Section  # noqa: E402

CONFIGURATION = ROOT / "docs" / "reference" / "configuration.md"
MADE = "<!-- Made by `make reference`: change configs/schema.py instead. -->"
NUMBERS = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
Json = Mapping[str, Any]


def main() -> None:
    CONFIGURATION.write_text(configuration(), encoding="utf-8")
    print(f"wrote {CONFIGURATION.relative_to(ROOT)}")


def configuration() -> str:
    """All keys with their types, defaults and meanings."""
    lines = [
        MADE,
        "",
        "# Configuration",
        "",
        "Keys are set by a YAML file, by variables such as `AERIE_MODEL__DTYPE=float32`, or on the "
        "command line as `model.dtype=float32`; later ones win "
        "([more](../operating.md#configuration)). `aerie config` prints them all with the values "
        "of your machine.",
    ]
    for name, section in Config():
        lines += ["", f"## {name}", "", str(type(section).__doc__), ""]
        lines += ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
        for key, about in type(section).model_fields.items():
            lines.append(f"| {' | '.join(_key(key, about, section))} |")
    return "\n".join(lines) + "\n"


def _key(key: str, about: FieldInfo, section: Section) -> Iterator[str]:
    default = section.model_dump(mode="json")[key]
    yield f"`{key}`"
    yield f"`{json.dumps(default, ensure_ascii=False)}`"
    schema = type(section).model_json_schema()
    yield _cell(type_of(schema["properties"][key], schema.get("$defs", {})) + _bounds(about))
    yield _cell(about.description or "")


def _bounds(about: FieldInfo) -> str:
    found = [*about.metadata, *(each for part in get_args(about.annotation) for each in _of(part))]
    words = [
        f"{word} {getattr(each, kind.lower()):g}"
        for kind, word in NUMBERS.items()
        for each in found
        if type(each).__name__ == kind
    ]
    return f", {' and '.join(dict.fromkeys(words))}" if words else ""


def _of(part: Any) -> tuple[Any, ...]:
    return getattr(part, "__metadata__", ())


def _cell(text: str) -> str:
    """Text for a table; letters of HTML stay letters."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|").replace("\n", " "))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def type_of(schema: Json, known: Mapping[str, Json]) -> str:
    """A JSON schema in a few words; structures by their names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        named = known.get(name, {})
        return type_of(named, known) if "enum" in named else short(name)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(dict.fromkeys(type_of(each, known) for each in schema[choice]))
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("items")
        return f"list of {type_of(items, known)}" if items else "list"
    if schema.get("format") == "path":
        return "path"
    return {"string": "text", "boolean": "true or false"}.get(kind, str(kind))


def short(name: str) -> str:
    """`server__openai__tools__NamedFunction` is NamedFunction."""
    return name.rpartition("__")[2]


def api() -> str:
    """The HTTP API, from the OpenAPI document of a server."""
    from tests.support.servers.http_server import Server, tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        document = Server(tiny_tokenizer(Path(folder))).get("/openapi.json").json()
    return api_page(document)


def api_page(document: Json) -> str:
    """The page of a document: its routes, then the structures that they name."""
    known = document["components"]["schemas"]
    lines = [
        "# HTTP API",
        "",
        "Made from the OpenAPI document of a server, which it gives at `/openapi.json`; at `/docs` "
        "requests can be sent from the browser. Unknown fields are refused with a 400 that names "
        "them. Every route may also answer with an error: its body is an `ErrorBody`.",
    ]
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            lines += ["", f"## {method.upper()} {path}", "", _cell(about.get("description", ""))]
            lines += list(_request(about, known))
    lines += ["", "## Structures"]
    for name in sorted(known, key=short):
        lines += ["", f"### {short(name)}", "", *_structure(known[name], known)]
    return "\n".join(lines) + "\n"


def _request(about: Json, known: Mapping[str, Json]) -> Iterator[str]:
    for parameter in about.get("parameters", ()):
        kind = type_of(parameter.get("schema", {}), known)
        yield f"\n- `{parameter['name']}` ({parameter['in']}): {kind}"
    body = _content(about.get("requestBody", {}))
    if body is not None:
        yield f"\nBody: {type_of(body, known)}. Its fields:\n"
        yield from _structure(known[body["$ref"].rpartition("/")[2]], known)
    answer = _content(about["responses"].get("200", {}))
    if answer is not None and "$ref" in answer:
        yield f"\nAnswer: {type_of(answer, known)}."


def _content(part: Json) -> Json | None:
    found: Json | None = part.get("content", {}).get("application/json", {}).get("schema")
    return found


def _structure(schema: Json, known: Mapping[str, Json]) -> Iterator[str]:
    if text := schema.get("description"):
        yield from (_cell(re.sub(r"\s*\n\s*", " ", text)), "")
    fields = schema.get("properties", {})
    if not fields:
        yield type_of(schema, known)
        return
    yield from ("| field | type | default | meaning |", "| --- | --- | --- | --- |")
    for name, about in fields.items():
        needed = name in schema.get("required", ())
        default = "required" if needed else f"`{json.dumps(about.get('default'))}`"
        cells = (f"`{name}`", type_of(about, known), default, about.get("description", ""))
        yield f"| {' | '.join(map(_cell, cells))} |"


if __name__ == "__main__":
    main()
