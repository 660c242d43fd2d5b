"""The version of Aerie."""

from __future__ import annotations

import importlib.metadata

UNKNOWN = "0+unknown"


def version() -> str:
    """Version of the installed distribution; `UNKNOWN` if the code runs without installation."""
    try:
        return importlib.metadata.version("aerie")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
