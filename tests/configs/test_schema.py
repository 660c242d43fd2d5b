"""The schema explains itself and cannot be changed after loading."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.schema import Config

# Keys whose names say what they mean.
OBVIOUS = {
    "cache.prefix_caching",
    "server.host",
    "log.format",
    "log.level",
}


def sections(config: Config) -> Iterator[tuple[str, BaseModel]]:
    for name in Config.model_fields:
        section = getattr(config, name)
        assert isinstance(section, BaseModel)
        yield name, section


def fields() -> Iterator[tuple[str, FieldInfo]]:
    for section, model in sections(Config()):
        for name, field in type(model).model_fields.items():
            yield f"{section}.{name}", field


def test_every_section_has_a_docstring() -> None:
    assert [name for name, section in sections(Config()) if not section.__doc__] == []


def test_every_field_is_described_or_obvious() -> None:
    assert {key for key, field in fields() if not field.description} == OBVIOUS


def test_every_field_has_a_default() -> None:
    assert [key for key, field in fields() if field.is_required()] == []


@pytest.mark.parametrize("name", Config.model_fields)
def test_nothing_can_be_changed(name: str) -> None:
    section = dict(sections(Config()))[name]
    with pytest.raises(ValidationError, match="frozen"):
        setattr(Config(), name, section)
    for key in type(section).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, None)


def test_values_are_hashable_hence_unchangeable() -> None:
    for _, section in sections(Config()):
        hash(section)


def test_unknown_keys_are_refused_everywhere() -> None:
    for name, section in sections(Config()):
        for model, known in ((Config, Config()), (type(section), section)):
            assert model.model_config["extra"] == "forbid", name
            with pytest.raises(ValidationError, match="extra_forbidden"):
                model.model_validate(known.model_dump() | {"surprise": 1})


def test_a_dumped_configuration_loads_again() -> None:
    config = Config()
    assert Config.model_validate(config.model_dump()) == config
    assert Config.model_validate_json(config.model_dump_json()) == config
