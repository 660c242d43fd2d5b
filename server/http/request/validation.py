"""Turns the errors of pydantic into our own: one 400 that names the field, its value and what is
allowed, in the words of the API instead of the library's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from server.http.errors import MAX_SHOWN, ApiError, bad_value, invalid, shorten, unknown_field

RULE = "broken_rule"
Context = Mapping[str, Any]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _plain(number: float) -> str:
    """A bound as a client would write it: 2, not 2.0."""
    return str(int(number)) if number == int(number) else str(number)


def _as_json(literals: str) -> str:
    """Allowed values, which pydantic writes as Python does."""
    for python, json in (("'", '"'), ("True", "true"), ("False", "false")):
        literals = literals.replace(python, json)
    return literals


# Kind of error -> what the value must do: "it must ..."
WRONG_TYPE = {
    "bool_type": "be true or false",
    "dict_type": "be an object",
    "float_type": "be a number",
    "int_type": "be an integer",
    "list_type": "be an array",
    "model_type": "be an object",
    "none_required": "be null",
    "string_type": "be a string",
}
WRONG_VALUE: dict[str, Callable[[Context], str]] = {
    "finite_number": lambda _: "be a finite number",
    "greater_than": lambda bound: f"be above {_plain(bound['gt'])}",
    "greater_than_equal": lambda bound: f"be at least {_plain(bound['ge'])}",
    "less_than": lambda bound: f"be below {_plain(bound['lt'])}",
    "less_than_equal": lambda bound: f"be at most {_plain(bound['le'])}",
    "literal_error": lambda allowed: f"be {_as_json(allowed['expected'])}",
    "string_pattern_mismatch": lambda form: f"match {form['pattern']}",
    "string_too_long": lambda bound: (
        "have at most " + _count(bound["max_length"], "character", "characters")
    ),
    "string_too_short": lambda bound: (
        "have at least " + _count(bound["min_length"], "character", "characters")
    ),
    "too_long": lambda bound: "have at most " + _count(bound["max_length"], "entry", "entries"),
    "too_short": lambda bound: "have at least " + _count(bound["min_length"], "entry", "entries"),
    "union_tag_invalid": lambda union: f"have a type of {union['expected_tags']}".replace("'", '"'),
    "union_tag_not_found": lambda _: "have a type",
}


def broken_rule(param: str, message: str) -> PydanticCustomError:
    """The error of a validator for fields that contradict each other; `param` is reported."""
    return PydanticCustomError(RULE, "{message}", {"message": message, "param": param})


Kinds = Mapping[str, tuple[Sequence[str], Sequence[str]]]


def check_kind(item: Any, kinds: Kinds) -> None:
    """Refuse an object that lacks a field of its `type`, or has one of another type. `kinds`: by
    type, the fields that it must have, and further ones that it may have."""
    needed, further = kinds[item.type]
    known = dict.fromkeys(name for pair in kinds.values() for names in pair for name in names)
    for name in known:
        given = getattr(item, name) is not None
        if name in needed and not given:
            raise broken_rule(name, f'{name} is missing: the type "{item.type}" needs it')
        if given and name not in (*needed, *further):
            raise broken_rule(name, f'{name} is not allowed with the type "{item.type}"')


def validation_error(error: ValidationError, body: Any) -> ApiError:
    """The pydantic errors of `body` as one 400, about the most deeply nested invalid field; one
    that is there, if possible: a wrong type of an object explains what else it lacks."""
    found = [(path_in(body, entry), entry) for entry in error.errors(include_url=False)]
    path, entry = max(found, key=lambda pair: (len(pair[0]), pair[1]["type"] != "missing"))
    param = written(path)
    if entry["type"] == "extra_forbidden":
        return unknown_field(param)
    if entry["type"] == "missing":
        return invalid(f"{param} is missing: it is required", param)
    allowed = _allowed([other for where, other in found if where == path])
    if entry["type"] == RULE:
        return invalid(allowed, param)
    if not path:
        return invalid(f"The request is {shorten(entry['input'])}: {allowed}")
    return bad_value(param, entry["input"], allowed)


def path_in(body: Any, entry: ErrorDetails) -> list[int | str]:
    """Where the error is, without the names of union branches, which are not in the request."""
    blamed = (entry["ctx"]["param"],) if entry["type"] == RULE else ()
    loc = entry["loc"] + blamed
    path: list[int | str] = []
    for index, step in enumerate(loc):
        known = isinstance(body, dict) and step in body and not _names_branch(body, loc, index)
        if isinstance(body, list) and isinstance(step, int) and step < len(body):
            known = True
        if known:
            body = body[step]
            path.append(step)
        elif entry["type"] in ("missing", RULE) and index == len(loc) - 1:
            path.append(step)
    return path


def _names_branch(body: Mapping[str, Any], loc: Sequence[int | str], index: int) -> bool:
    """Whether a step that is the name of a member is the type of `body`, a branch of a union."""
    step, following = loc[index], loc[index + 1 : index + 2]
    member = body[str(step)]
    inside = isinstance(member, dict) and following and following[0] in member
    return step == body.get("type") and bool(following) and following[0] in body and not inside


def written(path: Sequence[int | str]) -> str:
    """A path as a client writes it: `messages[0].content`, at most about MAX_SHOWN characters."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _allowed(entries: Sequence[ErrorDetails]) -> str:
    """What is allowed instead of one value. Each branch of a union has its own error: if the value
    has the type of one branch, only the errors of that branch help."""
    helpful = [entry for entry in entries if entry["type"] not in WRONG_TYPE] or entries
    ours = [_own_words(entry) for entry in helpful]
    texts = list(dict.fromkeys(text for text in ours if text is not None))
    needs = list(dict.fromkeys(_need(entry) for entry in helpful if _own_words(entry) is None))
    if needs:
        first, *others = needs
        texts.append(f"it must {' or '.join([first, *(it.removeprefix('be ') for it in others)])}")
    return "; ".join(texts)


def _own_words(entry: ErrorDetails) -> str | None:
    """The message of one of our validators, which is complete."""
    if entry["type"] == RULE:
        return str(entry["ctx"]["message"])
    return str(entry["ctx"]["error"]) if entry["type"] == "value_error" else None


def _need(entry: ErrorDetails) -> str:
    kind = entry["type"]
    if kind in WRONG_TYPE:
        return WRONG_TYPE[kind]
    return WRONG_VALUE[kind](entry.get("ctx", {})) if kind in WRONG_VALUE else "have another value"
