"""The routes of all APIs that clients speak."""

from __future__ import annotations

from server.anthropic.routes import ROUTES as MESSAGES
from server.openai.routes import ROUTES as OPENAI

ROUTES = (*OPENAI, MESSAGES)
