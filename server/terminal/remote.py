"""A server of the OpenAI API, as the chat needs it: its models, and streamed answers."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

CONNECT_TIMEOUT = 10.0  # seconds
DATA = b"data: "
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
            ValueError: not an http or https URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"the URL is {url!r}: it must begin with http:// or https://")
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
            RemoteError: there is no answer, or an error.
        """
        connection = self._connection()
        with closing(connection):
            response = self._send(connection, "GET", "/v1/models")
            found = json.loads(response.read())
        return [model["id"] for model in found["data"]]

    def chunks(self, body: Json) -> Generator[Json, None, None]:
        """The chunks of a streamed chat completion. Closing the iterator ends the request.

        Raises:
            RemoteError: there is no answer, an error, or one inside the stream.
        """
        connection = self._connection()
        with closing(connection):
            response = self._send(connection, "POST", "/v1/chat/completions", body)
            for line in response:
                if not line.startswith(DATA):
                    continue
                data = line[len(DATA) :].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RemoteError(0, chunk["error"]["message"])
                yield chunk
        raise RemoteError(0, "the connection ended before the answer did")

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname, self._parts.port
        assert host is not None
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT)
        return http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT)

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
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(0, f"{self.url} does not answer: {error}") from error
        if response.status != 200:
            raise RemoteError(response.status, _message(response))
        return response


def _message(response: http.client.HTTPResponse) -> str:
    """The message of an error, whatever its form."""
    text = response.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:500] or f"{response.status} {response.reason}"
