"""The schema explains itself and cannot be changed after loading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.roles import role_counts
from configs.schema import CaptureConfig, Config, ParallelConfig, SpeculationConfig

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


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("prefill:1", "decode is missing: write prefill:N,decode:M"),
        ("prefill:1,decode:0", "decode:0: the number of engines is 1 to 16"),
        ("prefill:17,decode:1", "prefill:17: the number of engines is 1 to 16"),
        ("prefill:-1,decode:1", "prefill:-1: the number of engines is 1 to 16"),
        ("prefill:1,encode:1", "'encode:1' is no role: write prefill:N,decode:M"),
        ("prefill:1,prefill:1", "prefill is there twice"),
        ("", "'' is no role"),
    ],
)
def test_impossible_roles_are_refused_with_what_is_possible(roles: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(reason)):
        ParallelConfig(roles=roles)


def test_roles_have_one_rank_and_one_writer_of_captures() -> None:
    roles = ParallelConfig(roles="prefill:1, decode:2")
    assert role_counts(str(roles.roles)) == (1, 2)
    with pytest.raises(ValidationError, match="tensor is 2; only 1 is possible"):
        ParallelConfig(roles="prefill:1,decode:1", tensor=2)
    with pytest.raises(ValidationError, match="so decode:1 is needed"):
        Config(parallel=roles, capture=CaptureConfig(dir=Path("shards"), consent=True))
    with pytest.raises(ValidationError, match="learn is true: with roles"):
        Config(
            parallel=ParallelConfig(roles="prefill:1,decode:1"),
            speculation=SpeculationConfig(learn=True, draft="auto"),
            capture=CaptureConfig(dir=Path("shards"), consent=True),
        )
