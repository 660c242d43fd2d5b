"""Who sends a request: an opaque label of its API key, and the priorities that the key may use."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from configs.schema import ServerConfig
from server.http.errors import ApiError
from server.http.middleware.keys import KeyRing, api_key, load_api_keys


@dataclass(frozen=True, slots=True)
class Caller:
    """What the engine may know about the sender."""

    label: str  # the same for all requests with one API key; "" where no keys are configured
    least_priority: int | None  # the most urgent one allowed; None: any

    def check_priority(self, priority: int) -> None:
        """ApiError 403 for a priority that is more urgent than allowed."""
        if self.least_priority is not None and priority < self.least_priority:
            raise ApiError(
                403,
                f"priority is {priority}: with this API key it must be at least "
                f"{self.least_priority} (server.least_priority, server.priority_keys)",
                "permission_error",
                param="priority",
                code="priority_not_allowed",
            )


class Callers:
    """Tells callers apart by their API keys. A label reveals nothing about its key: it is a hash
    with a secret of this process."""

    def __init__(self, config: ServerConfig) -> None:
        """ValueError if a priority key is not an API key."""
        api_keys = load_api_keys(config)
        if not set(config.priority_keys) <= set(api_keys):
            raise ValueError("server.priority_keys holds a key that is not an API key")
        self._has_keys = bool(api_keys)
        self._urgent = KeyRing(config.priority_keys)
        self._least_priority = config.least_priority
        self._secret = secrets.token_bytes(32)

    def of(self, headers: list[tuple[bytes, bytes]]) -> Caller:
        """The caller of a request that was let in."""
        token = api_key(headers) if self._has_keys else None
        if token is None:
            return Caller("", self._least_priority)
        label = hashlib.blake2b(token, key=self._secret, digest_size=8).hexdigest()
        return Caller(label, None if self._urgent.accept(token) else self._least_priority)
