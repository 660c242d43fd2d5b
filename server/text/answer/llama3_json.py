"""Calls as Llama 3.1, 3.2 and 3.3 write them, and Llama 4 after some templates:
<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.text.answer.calls import Attempt, CallSink
from server.text.answer.json_calls import closing, expect, json_call, json_text

CLOSE = "<|python_end|>"


class Llama3JsonSyntax:
    """JSON objects at the start of a line, or after a mark, or one after the other."""

    markers = ("<|python_tag|>", "<|python_start|>")
    marks = (*markers, CLOSE)
    line_marker = "{"
    between = "; "
    separators = ";,"

    def attempt(self, sink: CallSink, marker: str) -> Attempt:
        if marker != self.line_marker:
            yield from expect("{")
        return (yield from closing((yield from json_call(sink)), CLOSE))

    def written(self, calls: Sequence[tuple[str, Any]]) -> str:
        return self.between.join(
            json_text(name, "parameters", arguments) for name, arguments in calls
        )
