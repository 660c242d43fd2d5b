"""Calls as Hermes and Qwen models write them, between marks:
<tool_call>{"name": "f", "arguments": {}}</tool_call>."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.text.answer.calls import Attempt, CallSink
from server.text.answer.json_calls import closing, expect, json_call, json_text

CLOSE = "</tool_call>"


class HermesSyntax:
    """A JSON object between marks, for each call."""

    markers = ("<tool_call>",)
    marks = (*markers, CLOSE)
    line_marker = ""
    between = "\n"
    separators = ""

    def attempt(self, sink: CallSink, marker: str) -> Attempt:  # noqa: ARG002  (there is one)
        yield from expect("{")
        return (yield from closing((yield from json_call(sink)), CLOSE))

    def written(self, calls: Sequence[tuple[str, Any]]) -> str:
        texts = (json_text(name, "arguments", arguments) for name, arguments in calls)
        return self.between.join(f"{self.markers[0]}\n{text}\n{CLOSE}" for text in texts)
