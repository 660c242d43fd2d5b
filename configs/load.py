"""Read the configuration: YAML file, then AERIE_* environment variables, then key=value overrides.

Later sources win. Every key is checked; the error for an unknown key names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from configs.env import PREFIX
from configs.files import read_text
from configs.redact import SECRETS
from configs.schema import REDACTED, Config, Section
from configs.values import Dumper, field_type, is_nothing, kinds_of, parse, parse_for, typed

Schema = TypeVar("Schema", bound=Section)

SERVE = "serve"  # folder of configs/ with the files for `aerie serve`
ENV_SEPARATOR = "__"  # AERIE_MODEL__DTYPE=float32 is model.dtype
RESERVED_ENV = frozenset({"AERIE_CONFIG"})  # read by the command line: the file's path
# Kubernetes sets these in containers of a namespace with a Service whose name begins with "aerie".
SERVICE_ENV = re.compile(r"AERIE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_[A-Z]+(_\w+)?)")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
ALLOWED = {  # by pydantic's kind of error
    "bool_type": "give true or false, on or off, yes or no",
    "tuple_type": "give a list, as [a, b]",
    "string_type": "give a text",
}


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key, the value and what is allowed."""


def load_config(
    path: Path | None = None,
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Merge all sources and check the result.

    Args:
        path: YAML file, or the name of one that is shipped (such as `smollm2`); None: defaults.
        overrides: `section.key=value`; values mean what configs/values.py says.
        environment: where `AERIE_*` variables are looked up.

    Raises:
        ConfigError: unreadable file, unknown key, bad value.
    """
    return load_schema(Config, SERVE, path, overrides, environment)


def load_schema(
    schema: type[Schema],
    kind: str,
    path: Path | None,
    overrides: Iterable[str],
    environment: Mapping[str, str] | None = None,
) -> Schema:
    """As `load_config`, for any schema; `kind` is the folder of its shipped files."""
    tree: dict[str, Any] = {} if path is None else _read_yaml(path, kind)
    for name, value in (environment or {}).items():
        if _is_ours(name, value):
            keys = name.removeprefix(PREFIX).lower().split(ENV_SEPARATOR)
            _put(tree, keys, _parse(value, keys, schema, name), name)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        keys = key.strip().split(".")
        _put(tree, keys, _parse(value, keys, schema, key), key)
    try:
        return schema.model_validate(typed(tree, schema))
    except ValidationError as error:
        raise ConfigError(_explain(error, path, schema)) from error


def as_yaml(config: Section, exclude: set[str]) -> str:
    """YAML that `load_schema` reads back as `config`, without the sections in `exclude`."""
    tree = config.model_dump(mode="json", exclude=exclude)
    text: str = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text


def _is_ours(name: str, value: str) -> bool:
    if not name.startswith(PREFIX) or name in RESERVED_ENV:
        return False
    return not SERVICE_ENV.fullmatch(name) and not SERVICE_ADDRESS.match(value)


def shipped_configs(kind: str = SERVE) -> dict[str, Path]:
    """Names and paths of the files under configs/serve, or under another folder of configs."""
    folder = Path(__file__).parent / kind
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _read_yaml(path: Path, kind: str) -> dict[str, Any]:
    path = shipped_configs(kind).get(str(path), path)
    try:
        tree = parse(read_text(path, pipes=True))
    except FileNotFoundError as error:
        known = ", ".join(shipped_configs(kind))
        raise ConfigError(f"no configuration file {str(path)!r}; shipped ones: {known}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if is_nothing(tree):
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (model:, cache:, ...), not {tree!r}")
    # a section whose keys are all commented out is None
    return {section: {} if is_nothing(keys) else keys for section, keys in tree.items()}


def _parse(value: str, keys: list[str], schema: type[Section], name: str) -> Any:
    try:
        return parse_for(value, _type_at(schema, keys))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the value of {name} is not YAML") from error


def _type_at(schema: type[Section], keys: list[str]) -> object:
    """Of the field that `keys` name; Any when there is no such field."""
    wanted: object = schema
    for key in keys:
        wanted = field_type(wanted, key)
    return wanted


def _put(tree: dict[str, Any], keys: list[str], value: Any, name: str) -> None:
    if len(keys) != 2:
        raise ConfigError(f"{name!r} does not name a key of a section (section.key)")
    section, key = keys
    if not isinstance(tree.setdefault(section, {}), dict):
        raise ConfigError(f"section {section!r} must hold keys, not {tree[section]!r}")
    tree[section][key] = value


def _explain(error: ValidationError, path: Path | None, schema: type[Section]) -> str:
    problems = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            allowed = ", ".join(_siblings(detail["loc"], schema))
            problems.append(f"unknown key {key!r}; known here: {allowed}")
        else:
            message = _allowed(detail["type"], detail["loc"], schema) or detail["msg"]
            problems.append(_problem(key, detail["type"], message, detail["input"]))
    return f"configuration{f' {path}' if path else ''}: " + "; ".join(problems)


def _allowed(kind: str, location: tuple[int | str, ...], schema: type[Section]) -> str:
    """What may be written instead, where pydantic says it in words of Python; else ""."""
    if kind not in ALLOWED:
        return ""
    may_be_none = type(None) in kinds_of(_type_at(schema, [str(part) for part in location]))
    return ALLOWED[kind] + (", or null" if may_be_none else "")


def _problem(key: str, kind: str, message: str, value: object) -> str:
    message = message.removeprefix("Value error, ")
    if kind == "value_error" and "." not in key:
        return message  # of a whole section; it names its keys
    shown = REDACTED if key.startswith(SECRETS) else repr(value)
    return f"{key} = {shown}: {message}"


def _siblings(location: tuple[int | str, ...], schema: type[Section]) -> list[str]:
    """The known keys at `location`."""
    if len(location) == 1:
        return list(schema.model_fields)
    section = schema.model_fields[str(location[0])].annotation
    return list(getattr(section, "model_fields", {}))
