"""Text of others, made fit for a terminal."""

from __future__ import annotations

import re

# C0 but tab and newline, DEL, C1: a terminal may obey them. Surrogates cannot be encoded.
CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def harmless(text: str) -> str:
    """`text` with U+FFFD for each character that a terminal would not show but obey."""
    return CONTROL.sub("\ufffd", text)
