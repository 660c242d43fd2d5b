"""What a written value means, by the type of the field it is for.

YAML takes `off` for false, `1e3` for a text, `017` for fifteen and `2026-11-27` for a date. Here an
unquoted value is a text until its field is known: a field of strings takes it as it is written, one
of numbers reads a decimal number, one of truths reads true/false, on/off or yes/no.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Hashable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

YAML_STARTS = ("[", "{", "- ")  # of a list or a mapping
NOTHING = ("", "~", "null", "none")
TRUTHS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
DECIMAL = re.compile(r"[+-]?[0-9][0-9_]{0,30}")
EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?[eE]\+?[0-9]{1,2}")


class Unquoted(str):
    """A value as it is written, without quotes around it."""

    __slots__ = ()


class Loader(yaml.SafeLoader):
    """YAML whose unquoted values stay `Unquoted` texts, and whose keys are written once."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuses a key that is written twice, of which YAML would silently keep the last."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is written twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _text(_loader: Loader, node: yaml.ScalarNode) -> str:
    text = str(node.value)
    return Unquoted(text) if node.style is None else text


for _tag in ("str", "merge"):  # `<<` as a value, where it merges nothing
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _text)


class Dumper(yaml.SafeDumper):
    """Quotes what would be read as something other than the text it is."""


def _quoted(dumper: Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if text.lower() in NOTHING else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _quoted)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, or ValueError for an impossible date."""
    return yaml.load(text, Loader)


def parse_for(text: str, wanted: object) -> Any:
    """The value of a text for one field. Only lists, mappings and quoted texts are YAML: what else
    is written for a field of one value is that value, whatever YAML would make of its characters,
    and for a field of a list it is the items, with commas between them.
    """
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    kinds = kinds_of(wanted)
    is_list = any(get_origin(kind) is tuple for kind in kinds)
    if is_quoted or any(_is_section(kind) for kind in kinds):
        return [parse(text)] if is_quoted and is_list else parse(text)
    if not is_list:
        return Unquoted(text)
    if text.startswith(YAML_STARTS) or text.lower() in NOTHING:
        return parse(text)
    # Where a word may stand for a list, only brackets make one.
    return Unquoted(text) if str in kinds else [Unquoted(each.strip()) for each in text.split(",")]


def typed(value: object, wanted: object) -> object:
    """`value` with every `Unquoted` text in it read as the field's type asks. A text that cannot be
    read so stays a text, which the schema then refuses."""
    kinds = kinds_of(wanted)
    if isinstance(value, Unquoted):
        return _read(str(value), kinds)
    if isinstance(value, list):
        items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        return [typed(item, items) for item in value]
    if isinstance(value, Mapping):
        section = next((kind for kind in kinds if _is_section(kind)), None)
        return {str(key): typed(item, field_type(section, str(key))) for key, item in value.items()}
    return value


def is_nothing(value: object) -> bool:
    """Whether no value is written, or `null`."""
    return value is None or (isinstance(value, Unquoted) and value.lower() in NOTHING)


def field_type(section: Any, key: str) -> object:
    """Of a section's key; Any when there is no such key."""
    field = section.model_fields.get(key) if _is_section(section) else None
    return Any if field is None else field.annotation


def kinds_of(wanted: object) -> tuple[object, ...]:
    """The plain types that a field may hold. Choices count as the types of their values."""
    origin = get_origin(wanted)
    if origin is Annotated:
        return kinds_of(get_args(wanted)[0])
    if origin is Literal:
        return tuple({type(choice): None for choice in get_args(wanted)})
    if origin in (Union, types.UnionType):
        return tuple(kind for part in get_args(wanted) for kind in kinds_of(part))
    return (wanted,)


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _read(text: str, kinds: tuple[object, ...]) -> object:
    if text == "" or (type(None) in kinds and text.lower() in NOTHING):
        return None
    for kind in kinds:
        value = READERS.get(kind, _nothing)(text)
        if value is not None:
            return value
    return text


def _nothing(_text: str) -> object:
    return None


def _truth(text: str) -> bool | None:
    return TRUTHS.get(text.lower())


def _integer(text: str) -> int | None:
    """Digits, or a whole number with an exponent. A leading 0 means nothing."""
    if DECIMAL.fullmatch(text):
        return int(text.replace("_", ""))
    if EXPONENT.fullmatch(text):
        number = Decimal(text)
        return int(number) if number == number.to_integral_value() else None
    return None


def _number(text: str) -> float | int | None:
    try:
        return int(text) if DECIMAL.fullmatch(text) else float(_without_dot(text))
    except ValueError:
        return None


def _without_dot(text: str) -> str:
    """YAML writes `.inf` and `.nan`; both are then refused as what they are."""
    return re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", text, flags=re.IGNORECASE)


READERS: Mapping[object, Callable[[str], object]] = {
    bool: _truth,
    int: _integer,
    float: _number,
    str: str,
    Path: str,
}
