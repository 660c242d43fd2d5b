"""Every key of the schema can be set to every value it may have, from every source, whatever YAML
would make of the characters. A wrong value is answered with the key, the value, what is allowed."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel

from configs.load import ConfigError, as_yaml, load_schema
from configs.schema import Config, ModelConfig, Section
from configs.training import CLOCK_KEYS, SourceConfig, TrainingConfig
from configs.values import kinds_of, parse, typed

# Texts that YAML takes for truths, nothing, numbers, dates, times or mappings, or refuses.
TREACHEROUS = ("off", "on", "No", "YES", "true", "1e3", "017", "0x10", "12", "1_0", "2026-11-27")
TREACHEROUS += ("1:30", ".inf", "2026-13-45", "=", "<<", "Ünder", "😀", "a: b", "*a", "a #b", "[a")
IN_A_FILE = tuple(text for text in TREACHEROUS if text not in ("a: b", "*a", "a #b", "[a"))
NULLS = ("null", "~", "none", "None", "NULL", "")
TRUTHS = {"true": True, "True": True, "on": True, "yes": True, "Off": False, "no": False}
TRUTHS |= {"off": False, "NO": False, "false": False, "on ": True}
# What a whole configuration needs before the key under test can have its value.
ALONGSIDE = {
    Config: {"capture.consent": "true"},
    TrainingConfig: {"data.prompts": "[p]", "loss.features": "1"},
}
# What some keys need besides.
NEEDED_BY_KEY = {
    "speculation.learn": {"capture.dir": "captured"},
    "head.mask_token_id": {"head.kind": "peagle"},
}
FORMS = {"roles": ("prefill:1,decode:1", "decode:16, prefill:2")}  # texts of certain forms
SOURCES = ("override", "variable", "file")


class Key(NamedTuple):
    """One key of a schema and the types of what it holds."""

    schema: type[Config] | type[TrainingConfig]
    section: str
    name: str
    wanted: Any
    limits: tuple[object, ...]

    def __str__(self) -> str:
        return f"{self.schema.__name__}.{self.section}.{self.name}"


def all_keys() -> Iterator[Key]:
    for schema in (Config, TrainingConfig):
        for section, held in schema.model_fields.items():
            assert isinstance(held.annotation, type)
            assert issubclass(held.annotation, BaseModel)
            for name, field in held.annotation.model_fields.items():
                limits = (*field.metadata, *limits_of(field.annotation))
                yield Key(schema, section, name, field.annotation, limits)


def limits_of(wanted: Any) -> Iterator[object]:
    """Of Annotated[int, Field(ge=1)], alone or in a union."""
    for part in (wanted, *get_args(wanted)):
        for about in getattr(part, "__metadata__", ()):
            yield from getattr(about, "metadata", ())


KEYS = list(all_keys())


def good_values(key: Key) -> Iterator[tuple[str, object]]:
    """Texts for a key of one value, and what they mean."""
    kinds = kinds_of(key.wanted)
    choices = choices_of(key.wanted)
    if type(None) in kinds:
        yield from ((text, None) for text in NULLS)
    if choices:
        yield from ((str(choice), choice) for choice in choices)
    elif bool in kinds:
        yield from TRUTHS.items()
    elif int in kinds:
        low, high = bounds(key, int)
        yield from ((str(low), low), (f"0{low}", low), (f"+{low}", low), (str(high), high))
        if low <= 10 <= high:
            yield from (("1e1", 10), ("1.0E+1", 10), ("010", 10), ("1_0", 10))
    elif float in kinds:
        low, high = bounds(key, float)
        middle = low + (high - low) / 2
        yield from ((str(middle), middle), (f"{middle:e}", float(f"{middle:e}")))
        yield from ((text, 1000.0) for text in ("1e3", "1_000", "1000.") if high >= 1000)
    elif key.name in FORMS:
        yield from ((text, text) for text in FORMS[key.name])
    elif str in kinds or Path in kinds:
        make = Path if Path in kinds else str
        yield from ((text, make(text)) for text in TREACHEROUS)
        yield from ((f'"{text}"', make(text)) for text in (*TREACHEROUS, *NULLS) if text)


def choices_of(wanted: Any) -> tuple[object, ...]:
    origin = get_origin(wanted)
    if origin is Annotated:
        return choices_of(get_args(wanted)[0])
    if origin in (Union, types.UnionType):
        return tuple(choice for part in get_args(wanted) for choice in choices_of(part))
    return get_args(wanted) if origin is Literal else ()


def bounds(key: Key, number: type) -> tuple[Any, Any]:
    """Allowed numbers, well inside what is excluded."""
    step = 1 if number is int else 0.01
    low, high = 1, 2_000
    for limit in key.limits:
        low = limit.ge if isinstance(limit, Ge) else low  # type: ignore[assignment]
        low = limit.gt + step if isinstance(limit, Gt) else low  # type: ignore[assignment, operator]
        high = limit.le if isinstance(limit, Le) else high  # type: ignore[assignment]
        high = limit.lt - step if isinstance(limit, Lt) else high  # type: ignore[assignment, operator]
    return low, high


def load(key: Key, text: str, source: str, folder: Path) -> object:
    """The key's value, set to `text` by one source; the other keys come from overrides."""
    name = f"{key.section}.{key.name}"
    alongside = ALONGSIDE[key.schema] | NEEDED_BY_KEY.get(name, {})
    around = [f"{k}={v}" for k, v in alongside.items() if k != name]
    if key.schema is TrainingConfig and key.name in CLOCK_KEYS:
        around.append("run.minutes=1")
    environment, path = {}, None
    if source == "override":
        around.append(f"{name}={text}")
    elif source == "variable":
        environment = {f"AERIE_{key.section}__{key.name}".upper(): text}
    else:
        path = folder / "settings.yaml"
        path.write_text(f"{key.section}:\n  {key.name}: {text}\n", encoding="utf-8")
    config = load_schema(key.schema, "none", path, around, environment)
    return getattr(getattr(config, key.section), key.name)


def is_single(key: Key) -> bool:
    return not any(get_origin(kind) is tuple for kind in kinds_of(key.wanted))


def takes_every_text(key: Key) -> bool:
    return set(kinds_of(key.wanted)) <= {str, Path, type(None)} and not choices_of(key.wanted)


def from_all_sources(keys: Sequence[Key]) -> list[Any]:
    """Every key from one source, and every kind of key from every source: how a value is read
    depends on these two alone."""
    kinds: dict[object, list[Key]] = {}
    for key in keys:
        kinds.setdefault((kinds_of(key.wanted), bool(choices_of(key.wanted))), []).append(key)
    pairs = [
        (group[number % len(group)], SOURCES[number % len(SOURCES)])
        for group in kinds.values()
        for number in range(max(len(group), len(SOURCES)))
    ]
    return [pytest.param(key, source, id=f"{key}-{source}") for key, source in pairs]


SINGLE = [key for key in KEYS if is_single(key)]
LISTS = [key for key in KEYS if not is_single(key)]
NEEDED = [key for key in SINGLE if type(None) not in kinds_of(key.wanted)]
CHOOSY = [key for key in KEYS if not takes_every_text(key)]


@pytest.mark.parametrize(("key", "source"), from_all_sources(SINGLE))
def test_every_key_takes_every_way_of_writing_its_values(
    key: Key, source: str, tmp_path: Path
) -> None:
    tried = 0
    for text, value in good_values(key):
        if source == "file" and text not in IN_A_FILE and text in TREACHEROUS:
            continue  # these need quotes in YAML
        found = load(key, text, source, tmp_path)
        assert (text, found, type(found)) == (text, value, type(value))
        tried += 1
    assert tried


@pytest.mark.parametrize(("key", "source"), from_all_sources(LISTS))
def test_every_list_takes_its_items_as_they_are_written(
    key: Key, source: str, tmp_path: Path
) -> None:
    (item,) = {get_args(kind)[0] for kind in kinds_of(key.wanted) if get_origin(kind) is tuple}
    items: tuple[object, ...] = IN_A_FILE
    written = list(IN_A_FILE)
    if item is SourceConfig:
        names = {"name": "off", "url": "017", "licence": "no", "use": "1e3"}
        written = [str(names).replace("'", "")]
        items = (SourceConfig(**names),)
    elif int in kinds_of(item):
        written, items = ["1", "010", "1e3"], (1, 10, 1000)
    elif Path in kinds_of(item):
        items = tuple(map(Path, IN_A_FILE))
    elif choices_of(item):
        written, items = [str(choice) for choice in choices_of(item)], choices_of(item)
    found = load(key, f"[{', '.join(written)}]", source, tmp_path)
    assert found == items
    may_be_empty = not any(isinstance(limit, MinLen) for limit in key.limits)
    if may_be_empty and key.section != "data":  # which must not be empty as a whole
        assert load(key, "[]", source, tmp_path) == ()


@pytest.mark.parametrize(("key", "source"), from_all_sources(CHOOSY))
def test_a_wrong_value_is_answered_with_key_value_and_what_is_allowed(
    key: Key, source: str, tmp_path: Path
) -> None:
    wrong = "wrong 017" if is_single(key) or source == "file" else "{wrong: 017}"
    with pytest.raises(ConfigError) as caught:
        load(key, wrong, source, tmp_path)
    message = str(caught.value)
    shown = (
        "***"
        if key.name.endswith("_keys")
        else "{'wrong': '017'}"
        if wrong[0] == "{"
        else repr(wrong)
    )
    assert f"{key.section}.{key.name} = {shown}: " in message
    assert what_is_allowed(key) in message


def what_is_allowed(key: Key) -> str:
    kinds, choices = kinds_of(key.wanted), choices_of(key.wanted)
    or_null = ", or null" if type(None) in kinds else ""
    if choices:
        return repr(choices[-1])
    if bool in kinds:
        return f"give true or false, on or off, yes or no{or_null}"
    if not is_single(key):
        return f"give a list, as [a, b]{or_null}"
    return "valid integer" if int in kinds else "valid number"


@pytest.mark.parametrize(("key", "source"), from_all_sources(NEEDED))
def test_nothing_is_refused_where_something_is_needed(
    key: Key, source: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{key.section}.{key.name} = None: "):
        load(key, "", source, tmp_path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("1.5", "'1.5'"), ("1e-3", "'1e-3'"), ("0x10", "'0x10'"), ("'80'", "'80'"), ("9" * 40, "'99")],
)
def test_what_is_no_whole_number_is_none(text: str, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"server.port = {shown}"):
        load_schema(Config, "none", None, [f"server.port={text}"])


def test_the_walk_sees_every_kind_of_key() -> None:
    kinds = {kind for key in KEYS for kind in kinds_of(key.wanted)}
    assert {bool, int, float, str, Path, type(None)} < kinds
    assert {str(key).partition(".")[2] for key in KEYS} > {"kernels.graphs", "speculation.lookup"}


@pytest.mark.parametrize("text", [*TREACHEROUS, *NULLS])
def test_a_configuration_that_is_written_is_read_again(text: str, tmp_path: Path) -> None:
    config = Config(model=ModelConfig(source=text, served_name=text, revision=None))
    path = tmp_path / "again.yaml"
    path.write_text(as_yaml(config, set()), encoding="utf-8")
    assert load_schema(Config, "none", path, ()) == config


def test_yaml_of_files_keeps_anchors_and_merges() -> None:
    class Two(Section):
        model: ModelConfig = ModelConfig()
        other: ModelConfig = ModelConfig()

    text = "model: &m {source: off, served_name: 'null'}\nother: {<<: *m, source: 'on'}\n"
    found = Two.model_validate(typed(parse(text), Two))
    assert (found.model.source, found.model.served_name) == ("off", "null")
    assert (found.other.source, found.other.served_name) == ("on", "null")
