"""The JSON-Schema-Test-Suite, read by grammars: which of its schemas become one, and whether that
takes the instances that the suite calls valid, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llguidance import LLMatcher

Schema = dict[str, Any]
REASON = re.compile(r"Unimplemented keys: \[(.*)\]|Unknown format: (.*)")
SHORT = 60  # characters of another reason
MOST_WRONG = 20  # that are listed
Check = Callable[[str], LLMatcher]  # of the text of a schema; ValueError: it cannot be used


@dataclass(slots=True)
class Counts:
    """Of one draft of JSON Schema."""

    schemas: int = 0
    refused: int = 0  # with a reason
    valid: int = 0  # instances of the other schemas
    valid_taken: int = 0
    invalid: int = 0
    invalid_taken: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # invalid instances that are taken


def read_suite(folder: Path, drafts: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """The draft, the file and one entry of it. FileNotFoundError if there is no such folder."""
    for draft in drafts:
        if not (folder / draft).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {draft}: it must be the suite's tests")
        for path in sorted((folder / draft).glob("*.json")):
            for entry in json.loads(path.read_text(encoding="utf-8")):
                yield draft, path.stem, entry


def run_suite(
    folder: Path,
    drafts: Sequence[str],
    check: Check,
    encode: Callable[[str], list[int]],
    eos: int,
) -> dict[str, Counts]:
    """Counts by draft. Schemas that are true or false are left out: requests have objects."""
    found = {draft: Counts() for draft in drafts}
    for draft, name, entry in read_suite(folder, drafts):
        schema, counts = entry["schema"], found[draft]
        if not isinstance(schema, dict):
            continue
        counts.schemas += 1
        try:
            start = check(json.dumps(schema))
        except ValueError as error:
            counts.refused += 1
            note(counts.reasons, error)
            continue
        for test in entry["tests"]:
            text = json.dumps(in_order(test["data"], schema), ensure_ascii=False)
            taken = takes(start, [*encode(text), eos])
            _count(counts, test["valid"], taken, f"{name}: {entry['description']}: {text}")
    return found


def _count(counts: Counts, valid: bool, taken: bool, words: str) -> None:
    if valid:
        counts.valid += 1
        counts.valid_taken += taken
        return
    counts.invalid += 1
    counts.invalid_taken += taken
    if taken and len(counts.wrong) < MOST_WRONG:
        counts.wrong.append(words[:200])


def takes(start: LLMatcher, token_ids: Sequence[int]) -> bool:
    """Whether the grammar takes a whole text, with the token that ends it."""
    return start.deep_copy().validate_tokens(list(token_ids)) == len(token_ids)


def note(reasons: dict[str, int], error: ValueError) -> None:
    """Count why a schema was refused, without its details."""
    text = str(error)
    known = REASON.search(text)
    if known is not None:
        text = f"keyword {known[1]}" if known[1] is not None else f"format {known[2]}"
    reasons[text[:SHORT]] = reasons.get(text[:SHORT], 0) + 1


def in_order(value: Any, schema: Any) -> Any:
    """`value` with its members in the order in which a grammar writes them: that of `properties`,
    then the others."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [in_order(each, schema.get("items")) for each in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties")
    known = known if isinstance(known, dict) else {}
    names = [name for name in known if name in value]
    names += [name for name in value if name not in known]
    return {name: in_order(value[name], known.get(name)) for name in names}
