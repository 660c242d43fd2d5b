"""Hides the secrets of a configuration that is shown, or told to a process that needs none."""

from __future__ import annotations

from typing import Any, TypeVar

from configs.schema import REDACTED, Config

SECRETS = ("server.api_keys", "server.admin_keys", "server.priority_keys")  # tuples of keys


FILES_OF_SECRETS = ("api_key_file", "admin_key_file", "tls_key")  # of `server`
AnyConfig = TypeVar("AnyConfig", bound=Config)


def without_secrets(config: AnyConfig) -> AnyConfig:
    """The configuration without keys: an engine needs none."""
    lists = dict.fromkeys((name.partition(".")[2] for name in SECRETS), ())
    server = config.server.model_copy(update=lists | dict.fromkeys(FILES_OF_SECRETS))
    return config.model_copy(update={"server": server})


def redacted(config: Config) -> dict[str, Any]:
    """The configuration as for JSON, with every key replaced."""
    content = config.model_dump(mode="json")
    for name in SECRETS:
        section, key = name.split(".")
        content[section][key] = [REDACTED] * len(content[section][key])
    return content
