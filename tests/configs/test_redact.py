"""Secrets of a configuration that is shown."""

from __future__ import annotations

import json

from configs.redact import redacted
from configs.schema import Config, ServerConfig


def test_every_key_is_hidden_and_counted() -> None:
    server = ServerConfig(api_keys=("sk-one", "sk-two"), admin_keys=("sk-root",), port=1234)
    shown = redacted(Config(server=server))
    assert shown["server"]["api_keys"] == ["***", "***"]
    assert shown["server"]["admin_keys"] == ["***"]
    assert shown["server"]["port"] == 1234
    assert "sk-" not in json.dumps(shown)


def test_nothing_else_is_changed() -> None:
    assert redacted(Config()) == Config().model_dump(mode="json")
