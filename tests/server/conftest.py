"""Fixtures of the HTTP tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.text.tokens.tokenizer import Tokenizer
from tests.support.servers.http_server import Server, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_server(tokenizer: Tokenizer) -> Callable[..., Server]:
    """Builds servers; arguments are those of `Server` after the tokenizer."""

    def make(*args: object, **options: object) -> Server:
        return Server(tokenizer, *args, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def server(tokenizer: Tokenizer) -> Server:
    """A server that answers "hello there" and the end token."""
    return Server(tokenizer)
