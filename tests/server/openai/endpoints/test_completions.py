"""POST /v1/completions: prompts, echo, logprobs; /tokenize and /detokenize; /v1/models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai.types import Completion

from engine.messages import TokenLogprob, Tokens
from engine.request import FinishReason, Request
from server.openai.inputs.echo import echo_of
from server.openai.reply.logprobs import SMALLEST
from server.text.tokens.tokenizer import Tokenizer
from tests.support.engines.scripted_engine import Event, finished, say, tokens
from tests.support.models.tiny_llama import BOS
from tests.support.servers.http_server import MESSAGES, MODEL, Server, events_of

MakeServer = Callable[..., Server]


def test_reply_has_the_published_shape(server: Server) -> None:
    reply = server.complete().json()
    num_output = len(server.ids("hello there")) + 1
    assert reply.pop("id").startswith("cmpl-")
    assert reply.pop("system_fingerprint").startswith("fp_")
    assert isinstance(reply.pop("created"), int)
    num_prompt = len(server.ids("hi"))
    assert reply == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "text": "hello there",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "prompt_token_ids": None,
                "prompt_logprobs": None,
            }
        ],
        "kv_transfer_params": None,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_prompt - 1},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [[74, 75]]),
        (["hi", "h"], [[74, 75], [74]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_every_form_of_prompt(server: Server, prompt: Any, expected: list[list[int]]) -> None:
    assert server.ids("hi") == [74, 75]
    reply = server.complete(prompt=prompt, n=2, seed=4).json()
    assert [request.prompt_ids for request in server.engine.submitted] == [
        ids for ids in expected for _ in range(2)
    ]
    seeds = [request.params.seed for request in server.engine.submitted]
    assert seeds == [4, seeds[1]] * len(expected)
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(expected)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_sixteen_tokens_unless_asked_for_or_no_room(server: Server) -> None:
    server.complete()
    server.complete(prompt=[5] * 60)
    server.complete(max_tokens=0)
    assert [request.params.max_tokens for request in server.engine.submitted] == [16, 4, 0]


def test_stream_ends_each_choice_with_its_reason(server: Server) -> None:
    response = server.complete(stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(response)
    for chunk in chunks:
        Completion.model_validate({**chunk, "choices": []}, strict=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello there"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"]["completion_tokens"] == len(server.ids("hello there")) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(server: Server, stream: bool) -> None:
    response = server.complete(echo=True, stream=stream, prompt="hi<|im_end|> ")
    objects = events_of(response)[:-1] if stream else [response.json()]
    text = "".join(found["choices"][0]["text"] for found in objects)
    assert text == "hi<|im_end|> hello there"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_prompt_and_output(server: Server, stream: bool) -> None:
    response = server.complete(echo=True, logprobs=1, stream=stream)
    objects = events_of(response)[:-1] if stream else [response.json()]
    logprobs: dict[str, list[Any]] = {}
    for found in objects:
        for name, values in found["choices"][0]["logprobs"].items():
            logprobs.setdefault(name, []).extend(values)
    ids = server.ids("hi") + server.ids("hello there")
    texts = [server.tokenizer.token_text(token_id) for token_id in ids]
    assert logprobs["tokens"] == texts
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
    assert logprobs["top_logprobs"] == [None] + [{text: -0.5} for text in texts[1:]]
    assert logprobs["text_offset"] == [len("".join(texts[:count])) for count in range(len(ids))]


def test_an_added_bos_token_is_not_echoed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi<|im_end|>")
    echo = echo_of(tokenizer, [BOS, *ids], "hi<|im_end|>", True)
    assert (echo.text, list(echo.offsets)) == ("hi<|im_end|>", [0, 0, 1, 2])
    written = echo_of(tokenizer, [BOS, *ids], "<|im_start|>hi<|im_end|>", True)
    assert list(written.offsets) == [0, 12, 13, 14]
    assert echo_of(tokenizer, [BOS, *ids], None, True).text == "hi"
    assert echo_of(tokenizer, [BOS, *ids], None, False).text == "<|im_start|>hi<|im_end|>"


def test_a_prompt_can_be_scored_without_output(server: Server) -> None:
    reply = server.complete(echo=True, logprobs=0, max_tokens=0, prompt=server.ids("hello")).json()
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert len(choice["logprobs"]["tokens"]) == len(server.ids("hello"))
    assert reply["usage"]["completion_tokens"] == 0
    assert server.engine.submitted[0].params.prompt_logprobs == 0


def test_top_logprobs_always_hold_the_token_itself(make_server: MakeServer) -> None:
    def script(request: Request) -> list[Event]:
        event = tokens(request, [75])
        entry = event.logprobs[0]  # type: ignore[index]
        entry.top[:] = [(76, float("-inf"))]
        return [event, finished(request, FinishReason.LENGTH, 1)]

    reply = make_server(script).complete(logprobs=1).json()
    assert reply["choices"][0]["logprobs"]["top_logprobs"] == [{"i": -0.5, "j": SMALLEST}]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The token of each byte."""
    known = {tokenizer.token_bytes(token_id): token_id for token_id in range(384)}
    return [known[bytes([value])] for value in data]


def scored(*steps: tuple[int, float, list[tuple[int, float]]]) -> Callable[[Request], list[Event]]:
    """A script that emits tokens with these logprobs and alternatives."""

    def script(request: Request) -> list[Event]:
        ids = [token_id for token_id, _, _ in steps]
        entries = [TokenLogprob(*step) for step in steps]
        end = finished(request, FinishReason.LENGTH, len(ids))
        return [Tokens(request.request_id, ids, entries, None), end]

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_characters_differ_in_logprobs(
    make_server: MakeServer, tokenizer: Tokenizer, stream: bool
) -> None:
    first, second, third, other, letter = byte_ids(tokenizer, "你".encode() + b"\xe5a")
    server = make_server(
        scored(
            (first, -0.5, [(first, -0.5), (other, -1.0), (letter, -2.0)]),
            (second, -3.0, [(third, -0.1), (first, -1.5), (letter, -2.0)]),
            (third, -0.2, [(third, -0.2), (second, -1.5), (other, -2.5)]),
        )
    )
    response = server.complete(logprobs=3, stream=stream)
    objects = events_of(response)[:-1] if stream else [response.json()]
    found: dict[str, list[Any]] = {}
    for item in objects:
        for name, values in (item["choices"][0]["logprobs"] or {}).items():
            found.setdefault(name, []).extend(values)
    assert found["tokens"] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]
    assert found["top_logprobs"] == [
        {"bytes:\\xe4": -0.5, "bytes:\\xe5": -1.0, "a": -2.0},
        {"bytes:\\xa0": -0.1, "bytes:\\xe4": -1.5, "a": -2.0, "bytes:\\xbd": -3.0},
        {"bytes:\\xa0": -0.2, "bytes:\\xbd": -1.5, "bytes:\\xe5": -2.5},
    ]
    own = [top[token] for token, top in zip(found["tokens"], found["top_logprobs"], strict=True)]
    assert own == found["token_logprobs"]


def test_of_tokens_with_equal_text_the_likelier_is_shown_but_the_chosen_one_always(
    make_server: MakeServer, tokenizer: Tokenizer
) -> None:
    alike = [token_id for token_id in range(1000) if tokenizer.token_bytes(token_id) == b""][:3]
    (letter,) = byte_ids(tokenizer, b"a")
    best, middle, worst = alike
    server = make_server(
        scored(
            (letter, -0.5, [(best, -1.0), (middle, -2.0)]),
            (worst, -3.0, [(best, -1.0), (middle, -2.0)]),
            (letter, -0.5, []),
        )
    )
    found = server.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"": -1.0, "a": -0.5}, {"": -3.0}, {"a": -0.5}]


def test_named_tokens_are_scored_in_the_place_of_the_likeliest(
    make_server: MakeServer, tokenizer: Tokenizer
) -> None:
    letter, low, high = byte_ids(tokenizer, b"abc")
    server = make_server(scored((letter, -0.5, [(low, -9.0), (high, -1.0)])))
    chat = server.chat(logprobs=True, top_logprobs=1, logprob_token_ids=[low, high, low]).json()
    (entry,) = chat["choices"][0]["logprobs"]["content"]
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [
        ("b", -9.0),
        ("c", -1.0),
    ]
    text = server.complete(logprobs=0, logprob_token_ids=[low]).json()["choices"][0]["logprobs"]
    assert text["top_logprobs"] == [{"a": -0.5, "b": -9.0, "c": -1.0}]
    asked = [request.params for request in server.engine.submitted]
    assert [(p.logprobs, p.logprob_token_ids) for p in asked] == [(0, (low, high)), (0, (low,))]


def test_stop_string_cuts_each_choice_for_itself(make_server: MakeServer, server: Server) -> None:
    ids = server.ids("one two three")
    scripted = make_server(say(ids, ends=False))
    reply = scripted.complete(prompt=["a", "b"], stop=[" tw", "thr"], max_tokens=len(ids)).json()
    assert [choice["text"] for choice in reply["choices"]] == ["one", "one"]
    assert sorted(scripted.engine.aborted) == [r.request_id for r in scripted.engine.submitted]


def test_tokenize_and_detokenize_are_inverse(server: Server) -> None:
    ids = server.ids("hello there")
    reply = server.post("/tokenize", {"prompt": "hello there"}).json()
    assert reply == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "hello there"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_tokenize_renders_messages_as_chat_does(server: Server) -> None:
    server.chat()
    reply = server.post("/tokenize", {"model": MODEL, "messages": MESSAGES}).json()
    assert reply["tokens"] == server.engine.submitted[0].prompt_ids


def test_models_are_listed_and_found(server: Server) -> None:
    reply = server.get("/v1/models").json()
    assert reply["object"] == "list"
    (card,) = reply["data"]
    assert (card["id"], card["object"], card["owned_by"]) == (MODEL, "model", "aerie")
    assert server.get(f"/v1/models/{MODEL}").json() == card


def test_the_likeliest_of_several_texts_are_returned(make_server: MakeServer) -> None:
    def script(request: Request) -> list[Event]:
        index = int(request.request_id.rpartition("-")[2])
        likely = (-2.0, -0.25, -1.0)[index % 3]
        steps = [(75 + index, likely, [(1, -0.1)][: request.params.logprobs])] * (index + 1)
        return scored(*steps)(request)

    server = make_server(script)
    reply = server.complete(prompt=["hi", "ho"], best_of=3, n=2).json()
    texts = [choice["text"] for choice in reply["choices"]]
    name = server.tokenizer.token_text
    assert texts == [name(76) * 2, name(77) * 3, name(79) * 5, name(80) * 6]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in reply["choices"])
    assert reply["usage"]["completion_tokens"] == 21
    (choice,) = server.complete(best_of=2, logprobs=1).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.25, -0.25]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_chosen_or_scored_is_refused(
    server: Server, fields: dict[str, object], param: str
) -> None:
    response = server.complete(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("fields", [{}, {"echo": True, "logprobs": 3}])
def test_a_prompt_is_scored_in_the_form_of_vllm(server: Server, fields: dict[str, object]) -> None:
    (choice,) = server.complete(prompt_logprobs=1, **fields).json()["choices"]
    (chat,) = [server.chat(prompt_logprobs=1).json()]
    assert chat["prompt_logprobs"][0] is None
    assert len(chat["prompt_logprobs"]) == len(server.engine.submitted[-1].prompt_ids)
    name = server.tokenizer.token_text
    ids = server.engine.submitted[0].prompt_ids
    assert choice["prompt_logprobs"] == [
        None,
        *({str(one): {"logprob": -0.5, "rank": 1, "decoded_token": name(one)}} for one in ids[1:]),
    ]
    if fields:
        assert len(choice["logprobs"]["top_logprobs"][1]) == 3
    assert server.complete().json()["choices"][0]["prompt_logprobs"] is None
