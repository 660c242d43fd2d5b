"""Hides the secrets of a configuration that is shown."""

from __future__ import annotations

from typing import Any

from configs.schema import REDACTED, Config

SECRETS = ("server.api_keys", "server.admin_keys", "server.priority_keys")  # tuples of keys


def redacted(config: Config) -> dict[str, Any]:
    """The configuration as for JSON, with every key replaced."""
    content = config.model_dump(mode="json")
    for name in SECRETS:
        section, key = name.split(".")
        content[section][key] = [REDACTED] * len(content[section][key])
    return content
