"""A server of the OpenAI API, as the chat needs it: its models, and streamed answers."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from server.terminal.chunks import Chunk, ModelList

CONNECT_TIMEOUT = 10.0  # seconds
DATA = b"data:"
LONGEST = 2000  # characters of an error that are shown
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # of decoding JSON
Json = dict[str, Any]


class RemoteError(Exception):
    """What a server answered instead of what was asked for. `status` 0: no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Remote:
    """One server. Every request has its own connection."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url`: with or without /v1 at its end.

        Raises:
            ValueError: not an http or https URL, or a key that no header can have.
        """
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key may have only printable ASCII characters")
        parts = _split(url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._parts = parts
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}

    def answers(self) -> bool:
        """Whether anything answers there."""
        try:
            self.models()
        except RemoteError as error:
            return error.status != 0
        return True

    def models(self) -> list[str]:
        """Names of the models.

        Raises:
            RemoteError: there is no answer, an error, or no list with a model.
        """
        connection = self._connection()
        with closing(connection):
            response = self._send(connection, "GET", "/v1/models")
            with self._unbroken():
                body = response.read()
        try:
            found = msgspec.json.decode(body, type=ModelList)
        except MALFORMED as error:
            problem = f"{self.url}/v1/models is no list of models: {error}"
            raise RemoteError(response.status, problem) from error
        if not found.data:
            raise RemoteError(response.status, f"{self.url}/v1/models lists no models")
        return [model.id for model in found.data]

    def chunks(self, body: Json) -> Generator[Chunk, None, None]:
        """The chunks of a streamed chat completion. Closing the iterator ends the request.

        Raises:
            RemoteError: there is no answer, an error, or one inside the stream; or the stream is
                malformed or breaks.
        """
        connection = self._connection()
        with closing(connection), self._unbroken():
            response = self._send(connection, "POST", "/v1/chat/completions", body)
            for line in response:
                if not line.startswith(DATA):
                    continue
                data = line[len(DATA) :].strip()
                if data == b"[DONE]":
                    return
                yield self._chunk(data)
        raise RemoteError(0, f"{self.url}: the connection ended before the answer did")

    def _chunk(self, data: bytes) -> Chunk:
        try:
            chunk = msgspec.json.decode(data, type=Chunk)
        except MALFORMED as error:
            problem = f"{self.url} sent what is no chunk of an answer: {error}"
            raise RemoteError(0, problem) from error
        if chunk.error is not None:
            raise RemoteError(0, _words(chunk.error))
        return chunk

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """While an answer is read: a connection that breaks is a `RemoteError`."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(0, f"{self.url}: the connection broke: {error}") from error

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname, self._parts.port
        assert host is not None
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        try:
            return kind(host, port, timeout=CONNECT_TIMEOUT)
        except http.client.InvalidURL as error:
            raise RemoteError(0, f"{self.url} does not answer: {error}") from error

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Json | None = None,
    ) -> http.client.HTTPResponse:
        headers = self._headers | {"content-type": "application/json"}
        try:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(None)  # an answer may wait for others
            sent = None if body is None else json.dumps(body)
            connection.request(method, self._root + path, sent, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            # UnicodeError: a host or path with characters that no URL has.
            raise RemoteError(0, f"{self.url} does not answer: {error}") from error
        if response.status != 200:
            with self._unbroken():
                raise RemoteError(response.status, _message(response))
        return response


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # checked when it is read
    except ValueError as error:
        raise ValueError(f"the URL is {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ValueError(f"the URL is {url!r}: it must begin with http:// or https://")
    return parts


def _message(response: http.client.HTTPResponse) -> str:
    """The message of an error, whatever its form."""
    body = response.read()
    try:
        error = msgspec.json.decode(body, type=Chunk).error
    except MALFORMED:
        error = None
    if error is not None:
        return _words(error)
    text = body.decode(errors="replace").strip()
    return text[:LONGEST] or f"{response.status} {response.reason}"


def _words(error: Any) -> str:
    """What the field `error` of an answer says: its message, if it has one."""
    found = error.get("message") if isinstance(error, dict) else error
    text = found if isinstance(found, str) else msgspec.json.encode(error).decode()
    return text[:LONGEST]
