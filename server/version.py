"""Which Aerie this is."""

from __future__ import annotations

import importlib.metadata

UNKNOWN = "0+unknown"


def version() -> str:
    """Of the installed distribution; `UNKNOWN` where the code runs without being installed."""
    try:
        return importlib.metadata.version("aerie")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
