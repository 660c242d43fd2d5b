"""All routes of the OpenAI API, for an application."""

from __future__ import annotations

from server.openai import chat, completions, models, tokenize

ROUTES = (chat.ROUTES, completions.ROUTES, models.ROUTES, tokenize.ROUTES)
