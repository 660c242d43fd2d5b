"""Requests and answers of the routes for administrators."""

from __future__ import annotations

import msgspec
from pydantic import Field

from engine.messages import DraftFacts
from server.openai.fields import Fields


class SwapDraftRequest(Fields):
    """POST /admin/draft."""

    path: str | None = Field(
        min_length=1,
        max_length=4096,
        pattern=r"^[^\x00]*$",
        description="Directory of a draft head, as the server sees it; null: go on without one.",
    )


class DraftInUse(msgspec.Struct, frozen=True, kw_only=True):
    """The head that drafts from now on; null when there is none."""

    draft: DraftFacts | None
