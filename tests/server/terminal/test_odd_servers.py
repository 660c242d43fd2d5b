"""The chat with servers that answer what they should not: it says so, and goes on."""

from __future__ import annotations

import pytest

from server.commands.options import failed
from server.terminal.remote import Remote, RemoteError
from tests.support.servers.talk import GivenServer, Talk, stream

ESCAPES = r"\u001b]0;pwn\u0007\u001b[31mhi\r\u007f\u009b2J"
SHOWN = "�]0;pwn��[31mhi���2J"
HELLO = stream('{"choices": [{"delta": {"content": "hello"}}]}')


def test_escapes_of_a_server_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = stream(f'{{"choices": [{{"delta": {{"content": "{ESCAPES}\\ttab\\r\\nline"}}}}]}}')
    thought = stream(f'{{"choices": [{{"delta": {{"reasoning_content": "{ESCAPES}"}}}}]}}')
    error = stream(f'{{"error": {{"message": "{ESCAPES}"}}}}')
    with GivenServer(text, thought, error) as server:
        talk = Talk(server.url, terminal=False)
        shown = talk.say("hi")
        assert shown.startswith(SHOWN)
        assert " tab\nline\n" in shown
        assert talk.say("hi").startswith(SHOWN)
        assert SHOWN in talk.say("hi")
    assert "/�[2J is unknown" in talk.say("/\x1b[2J")
    failed(ValueError("\x1b[2Jmodel\nline"))
    assert capsys.readouterr().err == "aerie: �[2Jmodel\nline\n"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("<html>", "is no list of models: JSON is malformed: invalid character (byte 0)"),
        ('{"a": 1}', "is no list of models: Object missing required field `data`"),
        ('{"data": [1]}', "is no list of models: Expected `object`, got `int` - at `$.data[0]`"),
        ('{"data": []}', "lists no models"),
    ],
)
def test_what_is_no_list_of_models_is_told_with_its_address(body: str, told: str) -> None:
    with GivenServer(body.encode()) as server:
        remote = Remote(server.url)
        with pytest.raises(RemoteError) as caught:
            remote.models()
        assert str(caught.value) == f"{server.url}/v1/models {told}"
        assert remote.answers()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("{nope", "JSON is malformed"),
        ('{"error": ' + "[" * 100_000, "maximum recursion depth exceeded"),
        ('{"choices": 5}', "Expected `array | null`, got `int` - at `$.choices`"),
        ('{"choices": [{"delta": {"content": 5}}]}', "Expected `str | null`, got `int`"),
        ('{"choices": [{"trace": {"tokens": [{"bytes": [256]}]}}]}', "<= 255"),
        ('{"usage": {"completion_tokens": "many"}}', "Expected `int | null`, got `str`"),
    ],
)
def test_what_is_no_chunk_is_told_with_its_address(data: str, told: str) -> None:
    with GivenServer(stream(data)) as server:
        talk = Talk(server.url, terminal=False)
        shown = talk.say("hi")
    assert f"{server.url} sent what is no chunk of an answer: " in shown
    assert told in shown
    assert talk.session.messages == []


def test_nulls_of_a_stream_are_nothing() -> None:
    parts = ('{"choices": null, "usage": null, "error": null}', '{"choices": [{"delta": null}]}')
    usage = '{"usage": {"completion_tokens": null}}'
    with GivenServer(stream(*parts, usage) + b"never read") as server:
        assert Talk(server.url, terminal=False).say("hi").strip() == ""
    told = '{"choices": [{"delta": {"content": "no space", "reasoning_content": null}}]}'
    with GivenServer(f"data:{told}\n\ndata:[DONE]\n\n".encode()) as server:
        assert Talk(server.url, terminal=False).say("hi").startswith("no space\n")


@pytest.mark.parametrize(
    ("error", "told"),
    [('"busy"', "busy"), ('{"code": 5}', '{"code":5}'), ('{"message": null}', '{"message":null}')],
)
def test_errors_of_any_form_are_told(error: str, told: str) -> None:
    body = f'{{"error": {error}}}'
    with GivenServer(stream(body)) as inside, GivenServer(body.encode(), status=500) as instead:
        assert told in Talk(inside.url, terminal=False).say("hi")
        assert told in Talk(instead.url, terminal=False).say("hi").replace(" ", "")


@pytest.mark.parametrize("status", [200, 500])
def test_a_connection_that_breaks_is_told_with_its_address(status: int) -> None:
    with GivenServer(b"data: ", status=status, missing=9) as server:
        shown = Talk(server.url, terminal=False).say("hi")
        assert f"{server.url}: the connection broke: " in shown
        with pytest.raises(RemoteError, match="the connection broke"):
            Remote(server.url).models()
    with GivenServer(b"data: {}\n\n") as server:
        shown = Talk(server.url, terminal=False).say("hi")
        assert f"{server.url}: the connection ended before the answer did" in shown


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://host:http", "http://[::1"])
def test_an_address_that_is_malformed_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="the URL is ") as caught:
        Remote(url)
    assert url in str(caught.value)


@pytest.mark.parametrize("url", ["http://a..b", "http://127.0.0.1:1/ä", "http://a b"])
def test_an_address_that_cannot_be_asked_is_named(url: str) -> None:
    with pytest.raises(RemoteError) as caught:
        Remote(url).models()
    assert str(caught.value).startswith(f"{url} does not answer: ")


def test_a_key_that_cannot_be_sent_is_not_printed() -> None:
    with pytest.raises(ValueError, match="the API key may have only printable ASCII") as caught:
        Remote("http://host", "secret\n")
    assert "secret" not in str(caught.value)


def test_after_an_error_the_conversation_is_as_before() -> None:
    failing = stream('{"error": {"message": "max_tokens is 0"}}')
    with GivenServer(HELLO, failing, failing, HELLO) as server:
        talk = Talk(server.url, terminal=False)
        talk.say("hi")
        said = list(talk.session.messages)
        assert [message["content"] for message in said] == ["hi", "hello"]
        for lines in (["/again"], ["more"]):
            assert "max_tokens is 0" in talk.say(*lines)
            assert talk.session.messages == said
        assert "hello" in talk.say("/again")
        assert talk.session.messages == said


@pytest.mark.parametrize("delta", ['{"reasoning_content": "hm"}', "{}"])
def test_an_answer_without_text_is_part_of_the_conversation(delta: str) -> None:
    silent = stream(f'{{"choices": [{{"delta": {delta}, "finish_reason": "length"}}]}}')
    with GivenServer(silent, HELLO) as server:
        talk = Talk(server.url, terminal=False)
        assert "cut by the limit" in talk.say("hi")
        assert [message["content"] for message in talk.session.messages] == ["hi", ""]
        assert "hello" in talk.say("/again")
        assert [message["content"] for message in talk.session.messages] == ["hi", "hello"]
