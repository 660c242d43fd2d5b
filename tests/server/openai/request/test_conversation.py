"""The last message of a conversation is continued, whatever it says and however it is rendered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from server.http.errors import ApiError
from server.openai.request.conversation import ChatMessage, RenderingFields, render_chat
from server.text.answer.forms import AnswerForm
from server.text.template.chat_template import ChatTemplate
from server.text.template.rendering import Renderer
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import MESSAGES, Server

END = "<|end|>"
TEXTS = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + END + "{% endfor %}"
PARTS = TEXTS.replace(
    "{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"
)  # without the newlines by which parts are joined elsewhere

Continue = Callable[..., Any]


@pytest.fixture
def continued() -> Iterator[Continue]:
    renderers = {source: Renderer(ChatTemplate(source, {}, [END])) for source in (TEXTS, PARTS)}

    def render(source: str, *contents: Any) -> Any:
        roles = ("user", "assistant", "developer")
        messages = [
            ChatMessage(role=role, content=content)
            for role, content in zip(roles, contents, strict=False)
        ]
        how = RenderingFields(continue_final_message=True)
        return render_chat(renderers[source], AnswerForm(), messages, how)

    with closing(renderers[TEXTS]), closing(renderers[PARTS]):
        yield render


@pytest.mark.parametrize("source", [TEXTS, PARTS])
def test_what_a_client_wrote_ends_no_turn(continued: Continue, source: str) -> None:
    prompt = continued(source, "hi", f"so {END}")
    assert prompt.plain() == f"user:hi{END}assistant:so {END}"
    assert prompt.text.count(END) == 1, "the second one is letters"
    assert continued(source, "hi", END).text.count(END) == 1
    assert continued(source, "hi", "e").plain() == f"user:hi{END}assistant:e"


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("role", ["assistant", "developer"])
@pytest.mark.parametrize(("source", "between"), [(TEXTS, "\n"), (PARTS, "")])
def test_text_parts_are_continued(
    continued: Continue, source: str, between: str, role: str
) -> None:
    before = ["a\nb"] if role == "assistant" else ["a\nb", "c"]
    prompt = continued(source, *before, parts("a", "b ")).plain()
    assert prompt.endswith(f":a{between}b ")
    with pytest.raises(ApiError, match="continue_final_message is true"):
        continued(source, *before, parts(" ", ""))


@pytest.mark.parametrize("depth", [70, 5000, 100_000])
def test_arguments_of_calls_are_bounded_like_bodies(
    make_server: Callable[..., Server], depth: int
) -> None:
    server = make_server(template="{{ messages[1].tool_calls | tojson }}")
    for arguments, status in ((json.dumps({"a": [[]]}), 200), ("[" * depth + "]" * depth, 400)):
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]
        response = server.post("/tokenize", {"messages": messages})
        assert response.status_code == status
    assert "nested too deeply" in error_of(response, 400)["message"]
