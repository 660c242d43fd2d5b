"""The chat in the terminal: what it prints, sends, keeps; and the server that it starts."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.messages import DraftNodes, DraftSource, Round
from engine.request import Request
from server.terminal.background import BackgroundServer
from server.terminal.chunks import Chunk
from server.terminal.remote import Remote, RemoteError
from server.terminal.session import HELP
from server.text.tokens.tokenizer import Tokenizer
from tests.support.engines.scripted_engine import Event, fail, say, steps, tokens
from tests.support.servers.http_server import Server
from tests.support.servers.live_server import run_aerie
from tests.support.servers.talk import Talk
from tests.support.servers.web_thread import WebThread

EOS = 2


Serve = Callable[..., WebThread]


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Serve]:
    opened: list[WebThread] = []

    def start(*args: Any, **options: Any) -> WebThread:
        web = WebThread(Server(tokenizer, *args, max_model_len=4096, **options))
        opened.append(web)
        return web.__enter__()

    yield start
    for web in opened:
        web.__exit__(None, None, None)


@pytest.fixture
def speech(tokenizer: Tokenizer) -> Any:
    """Letters are tokens: "abc", of which "b" was drafted."""
    a, b, c, d = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abcd")
    tree = Round(DraftSource.HEAD, DraftNodes((b, d), (0, 1)), (1,))
    return steps(([a], Round()), ([b, c], tree), ([EOS], Round()))


def test_tokens_are_tinted_by_their_origin(serve: Serve, speech: Any) -> None:
    web = serve(speech)
    shown = Talk(web.url).say("hi")
    assert "a\x1b[30;48;2;207;226;255mb\x1b[0mc\n" in shown
    assert "4 tokens" in shown
    assert "2.00 tokens per drafted step" in shown
    colours = "drafted, by depth:  1  2  3  4  5    looked up    forced by the grammar \n"
    plain = Talk(web.url, terminal=False).say("hi", "hi")
    assert plain.count(colours) == 1  # after the first answer with a draft
    assert max(map(len, HELP.splitlines())) < 80
    assert Talk(web.url, terminal=False).say("hi").startswith("abc\n")


def test_what_is_set_is_sent(serve: Serve, tmp_path: Path) -> None:
    web = serve()
    talk = Talk(web.url)
    lines = ("/system be brief", "/temperature 0.5", "/seed 7", "/max 9", "/speculation off")
    talk.say(*lines, "hi", "/temperature", "/speculation on", "and?")
    first, second = web.server.engine.submitted
    assert (first.min_draft_nodes, second.min_draft_nodes) == (0, 3)
    assert (first.params.temperature, first.params.seed) == (0.5, 7)
    assert (first.params.max_tokens, first.max_draft_nodes) == (9, 0)
    assert (second.params.temperature, second.max_draft_nodes) == (1.0, None)
    assert "be brief" in web.server.tokenizer.decode(first.prompt_ids)
    assert "hello there" in web.server.tokenizer.decode(second.prompt_ids)
    talk.say(f"/save {tmp_path}/said.json")
    said = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in said["messages"]] == ["user", "assistant"] * 2
    talk.say("/again", "/new", "fresh")
    again, fresh = web.server.engine.submitted[2:]
    assert again.prompt_ids == second.prompt_ids
    assert "hello" not in web.server.tokenizer.decode(fresh.prompt_ids)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/help", HELP),
        ("/sing", "/sing is unknown"),
        ("/temperature warm", "/temperature: could not convert string to float: 'warm'"),
        ("/speculation maybe", "/speculation: 'maybe' must be one of on, off, auto"),
        ("/again", "/again: nothing was said yet"),
        ("/save", "/save: name a file"),
    ],
)
def test_commands_that_cannot_be_carried_out_say_why(line: str, told: str) -> None:
    assert told in Talk("http://127.0.0.1:1", terminal=False).say(line)


def test_a_message_that_failed_is_not_part_of_the_conversation(serve: Serve) -> None:
    web = serve(api_keys=("secret",))
    talk = Talk(web.url)
    assert "Missing API key" in talk.say("hi")
    assert talk.session.messages == []
    assert "hello there" in Talk(web.url + "v1/", "secret").say("hi")


def test_an_error_in_the_middle_is_told_after_the_text(serve: Serve, tokenizer: Tokenizer) -> None:
    web = serve(fail(tokenizer.encode("so", add_special_tokens=False), "gone"))
    shown = Talk(web.url).say("hi")
    assert "so" in shown
    assert "The engine failed to finish this request" in shown


def test_ctrl_c_stops_an_answer_and_keeps_it(serve: Serve, tokenizer: Tokenizer) -> None:
    """The signal comes while the stream waits for more."""

    def script(request: Request) -> list[Event]:
        return [tokens(request, tokenizer.encode("on", add_special_tokens=False))]

    talk = Talk(serve(script).url)
    show = talk.session.console.print

    def interrupting(*parts: Any, **options: Any) -> None:
        show(*parts, **options)
        if str(parts[0] if parts else "").endswith("n"):
            signal.raise_signal(signal.SIGINT)

    talk.session.console.print = interrupting  # type: ignore[method-assign]
    # A process that runs tests for another one ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert "stopped" in talk.say("hi")
    finally:
        signal.signal(signal.SIGINT, before)
    assert talk.session.messages[-1]["content"].startswith("o")


def test_servers_without_traces_are_asked_without(
    serve: Serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = serve(say([*tokenizer.encode("ok", add_special_tokens=False), EOS]))
    talk = Talk(web.url)
    asked: list[dict[str, Any]] = []
    chunks = Remote.chunks

    def strict(self: Remote, body: dict[str, Any]) -> Iterator[Chunk]:
        asked.append(body)
        if "speculation" in body:
            raise RemoteError(400, "Unknown parameter: 'speculation'")
        yield from chunks(self, body)

    monkeypatch.setattr(Remote, "chunks", strict)
    assert "ok" in talk.say("hi", "more")
    assert ["speculation" in body for body in asked] == [True, False, False]
    assert "continuous_usage_stats" not in asked[-1]["stream_options"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_an_address_that_is_none_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="it must begin with http:// or https://"):
        Remote(url)


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(OSError, match=r"the server did not start:\n.*no_such"):
        BackgroundServer(["model.no_such=1"]).__enter__()


def test_the_command_names_an_address_that_does_not_answer() -> None:
    done = run_aerie("chat", "--url", "http://127.0.0.1:1")
    assert done.returncode == 2
    assert "aerie: http://127.0.0.1:1 does not answer: " in done.stderr
