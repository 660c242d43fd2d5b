"""Typed values of a configuration in JSON; ValueError names the key and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]


def value(config: Json, key: str, default: object) -> Any:
    """The value; `default` where it is absent or null. ValueError where both are missing."""
    found = config.get(key)
    found = default if found is None else found
    if found is None:
        raise ValueError(f"the model configuration lacks {key!r}")
    return found


def integer(config: Json, key: str, default: int | None = None) -> int:
    """A positive integer."""
    found = value(config, key, default)
    if type(found) is not int:
        raise ValueError(f"{key} must be an integer, not {found!r}")
    require_positive(key, found)
    return found


def number(config: Json, key: str, default: float | None = None) -> float:
    found = value(config, key, default)
    if type(found) not in (int, float):
        raise ValueError(f"{key} must be a number, not {found!r}")
    return float(found)


def flag(config: Json, key: str, default: bool = False) -> bool:
    found = value(config, key, default)
    if type(found) is not bool:
        raise ValueError(f"{key} must be true or false, not {found!r}")
    return found


def table(config: Json, key: str) -> Json:
    """The table of a key; an empty one where it is absent or null."""
    found = config.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{key} must be a table, not {found!r}")
    return found or {}


def names(config: Json, key: str) -> tuple[str, ...]:
    """A list of names; none where it is absent or null."""
    found = config.get(key)
    if found is None:
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{key} must be a list of names, not {found!r}")
    return tuple(found)


def require_positive(name: str, found: int) -> None:
    if found < 1:
        raise ValueError(f"{name} must be at least 1, not {found}")
