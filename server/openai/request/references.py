"""References of a JSON schema that lead back to themselves before any value is written: what they
ask for is not defined, and no text can be checked against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

IN_PLACE = ("allOf", "anyOf", "oneOf")  # schemas of the same value


def endless_reference(schema: Any) -> str | None:
    """A reference inside the schema that leads back to itself, or to one that does."""
    targets = {ref: set(_in_place(_target(schema, ref))) for ref in _references(schema)}
    sources: dict[str, list[str]] = {}
    for ref, following in targets.items():
        for each in following:
            sources.setdefault(each, []).append(ref)
    # Those that lead nowhere are taken away, until only those are left that lead to each other.
    ending = [ref for ref, following in targets.items() if not following]
    while ending:
        ref = ending.pop()
        del targets[ref]
        for source in sources.get(ref, ()):
            targets[source].discard(ref)
            if not targets[source]:
                ending.append(source)
    return next(iter(targets), None)


def _references(schema: Any) -> Iterator[str]:
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            rest += value.values()
        elif isinstance(value, list):
            rest += value


def _in_place(schema: Any) -> Iterator[str]:
    """References that describe the same value as the schema."""
    rest = [schema]
    while rest:
        value = rest.pop()
        if not isinstance(value, dict):
            continue
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for name in IN_PLACE:
            members = value.get(name)
            rest += members if isinstance(members, list) else []


def _target(schema: Any, ref: str) -> Any:
    """What a reference inside the schema means; None if it means nothing there."""
    if not ref.startswith("#"):
        return None
    found = schema
    for part in unquote(ref[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found
