"""All routes of the OpenAI API, for an application."""

from __future__ import annotations

from server.openai.endpoints import (
    chat,
    completions,
    embeddings,
    invocations,
    models,
    tokenize,
)
from server.openai.responses import routes as responses

ROUTES = (
    chat.ROUTES,
    completions.ROUTES,
    responses.ROUTES,
    embeddings.ROUTES,
    invocations.ROUTES,
    models.ROUTES,
    tokenize.ROUTES,
)
