"""POST /v1/chat/completions: the shapes of replies and streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.messages import TokenLogprob, Tokens
from engine.request import FinishReason, Request
from server.openai.reply.logprobs import SMALLEST
from tests.support.engines.scripted_engine import finished, say
from tests.support.servers.http_server import Server, events_of

MakeServer = Callable[..., Server]


def test_reply_has_the_published_shape(server: Server) -> None:
    reply = server.chat().json()
    num_prompt = len(server.ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    num_output = len(server.ids("hello there")) + 1
    assert reply.pop("id").startswith("chatcmpl-")
    assert reply.pop("system_fingerprint").startswith("fp_")
    assert isinstance(reply.pop("created"), int)
    assert reply == {
        "object": "chat.completion",
        "model": "tiny",
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "hello there",
                    "refusal": None,
                    "reasoning_content": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "prompt_token_ids": None,
        "prompt_logprobs": None,
        "kv_transfer_params": None,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": min(16, num_prompt - 1)},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
    }


def test_reply_and_chunks_are_what_the_sdk_knows(server: Server) -> None:
    ChatCompletion.model_validate(server.chat(logprobs=True, top_logprobs=2).json(), strict=True)
    stream = server.chat(stream=True, logprobs=True, stream_options={"include_usage": True})
    for chunk in events_of(stream)[:-1]:
        ChatCompletionChunk.model_validate(chunk, strict=True)


def test_stream_is_role_then_content_then_finish_then_done(server: Server) -> None:
    response = server.chat(stream=True)
    *chunks, done = events_of(response)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "hello there"
    assert all(set(choice["delta"]) == {"content"} for choice in choices[1:-1])
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


def test_include_usage_puts_null_into_chunks_and_counts_into_the_last(server: Server) -> None:
    *chunks, last, done = events_of(
        server.chat(stream=True, stream_options={"include_usage": True})
    )
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"] == server.chat().json()["usage"]


def test_the_first_choice_has_the_seed_and_the_others_hashes_of_it(server: Server) -> None:
    reply = server.chat(n=3, seed=-2).json()
    seeds = [request.params.seed for request in server.engine.submitted]
    assert seeds[0] == 2**64 - 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["completion_tokens"] == 3 * (len(server.ids("hello there")) + 1)
    assert reply["usage"]["prompt_tokens"] == len(server.engine.submitted[0].prompt_ids)


def test_choices_of_requests_with_neighbouring_seeds_have_no_seed_in_common(server: Server) -> None:
    for seed in range(4, 8):
        server.chat(n=3, seed=seed)
    seeds = [request.params.seed for request in server.engine.submitted]
    assert seeds[::3] == [4, 5, 6, 7]
    assert len(set(seeds)) == 12
    server.chat(n=3, seed=4)
    again = [request.params.seed for request in server.engine.submitted[12:]]
    assert again == seeds[:3]
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("fields", [{}, {"seed": -1}, {"seed": None}], ids=str)
def test_seeds_are_drawn_for_requests_that_give_none(
    server: Server, fields: dict[str, int | None]
) -> None:
    server.chat(**fields)
    server.chat(**fields)
    first, second = (request.params.seed for request in server.engine.submitted)
    assert first != second


def test_a_salt_reaches_the_engine_and_choices_are_numbered(server: Server) -> None:
    server.chat(n=2, cache_salt="mine")
    server.chat()
    sent = [
        (request.choice, request.client, request.cache_salt) for request in server.engine.submitted
    ]
    assert sent == [(0, "", "/mine"), (1, "", "/mine"), (0, "", "")]


def test_streamed_choices_interleave_with_their_index(server: Server) -> None:
    *chunks, _ = events_of(server.chat(stream=True, n=3))
    texts = {0: "", 1: "", 2: ""}
    ends = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"] is not None:
                ends.append((choice["index"], choice["finish_reason"]))
    assert texts == dict.fromkeys(range(3), "hello there")
    assert sorted(ends) == [(index, "stop") for index in range(3)]
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:3]] == ["assistant"] * 3


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 2}, {"max_tokens": 9, "max_completion_tokens": 2}]
)
def test_token_limit_ends_with_length(server: Server, fields: dict[str, int]) -> None:
    reply = server.chat(**fields).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2


def test_without_a_limit_the_rest_of_the_context_is_allowed(server: Server) -> None:
    server.chat()
    request = server.engine.submitted[0]
    assert request.params.max_tokens == 64 - len(request.prompt_ids)


def test_sampling_fields_reach_the_engine(server: Server) -> None:
    server.chat(
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.25,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 0.5},
        min_tokens=3,
        max_tokens=7,
        stop_token_ids=[9, 9],
        ignore_eos=True,
        priority=4,
        seed=11,
        logprobs=True,
        top_logprobs=4,
    )
    request = server.engine.submitted[0]
    params = request.params
    assert request.priority == 4
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 0.5, 0, 0.25)
    assert (params.presence_penalty, params.frequency_penalty) == (-2.0, 2.0)
    assert params.repetition_penalty == 1.5
    assert params.logit_bias == {5: -100.0, 6: 0.5}
    assert (params.min_tokens, params.max_tokens, params.seed) == (3, 7, 11)
    assert (params.stop_token_ids, params.ignore_eos) == ((9,), True)
    assert (params.logprobs, params.prompt_logprobs) == (4, None)


def test_roles_and_text_parts_reach_the_template(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    server.chat(
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts, "name": "n"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        ],
        add_generation_prompt=False,
    )
    prompt = server.tokenizer.decode(server.engine.submitted[0].prompt_ids, False)
    turns = [("system", "d"), ("user", "a\nb"), ("assistant", "c")]
    assert prompt == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def test_template_variables_come_from_chat_template_kwargs(make_server: MakeServer) -> None:
    server = make_server(template="{{ greeting }}")
    server.chat(chat_template_kwargs={"greeting": "hey"})
    assert server.engine.submitted[0].prompt_ids == server.ids("hey")


def test_logprobs_carry_tokens_bytes_and_alternatives(server: Server) -> None:
    logprobs = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    ids = server.ids("hello there")
    assert logprobs["refusal"] is None
    assert [entry["token"] for entry in logprobs["content"]] == [
        server.tokenizer.token_text(token_id) for token_id in ids
    ]
    entry = logprobs["content"][0]
    assert entry["logprob"] == -0.5
    assert bytes(entry["bytes"]) == server.tokenizer.token_bytes(ids[0])
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
    assert entry["top_logprobs"][0]["token"] == entry["token"]


def test_streamed_logprobs_are_those_of_the_whole_reply(server: Server) -> None:
    whole = server.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    *chunks, _ = events_of(server.chat(logprobs=True, top_logprobs=1, stream=True))
    streamed = []
    for chunk in chunks:
        logprobs = chunk["choices"][0]["logprobs"]
        streamed += logprobs["content"] if logprobs else []
    assert streamed == whole


def test_minus_infinity_is_clamped(make_server: MakeServer) -> None:
    def script(request: Request) -> list[object]:
        entry = TokenLogprob(65, float("-inf"), [(65, float("-inf")), (66, float("nan"))])
        return [
            Tokens(request.request_id, [65], [entry]),
            finished(request, FinishReason.LENGTH, 1),
        ]

    reply = make_server(script).chat(logprobs=True, top_logprobs=2).json()
    entry = reply["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == SMALLEST
    assert [top["logprob"] for top in entry["top_logprobs"]] == [SMALLEST, SMALLEST]


def test_special_tokens_are_shown_on_request(make_server: MakeServer, server: Server) -> None:
    script = say([*server.ids("a"), 1, *server.ids("b"), 2])
    assert content(make_server(script)) == "ab"
    assert content(make_server(script), skip_special_tokens=False) == "a<|im_start|>b"


def content(server: Server, **fields: object) -> str:
    return str(server.chat(**fields).json()["choices"][0]["message"]["content"])


TEXT = "the quick brown fox jumps"


@pytest.mark.parametrize("step", [1, 2, 7, 100])
@pytest.mark.parametrize("begin", range(len(TEXT) - 3))
def test_stop_string_is_found_at_any_offset_and_never_leaks(
    make_server: MakeServer, server: Server, begin: int, step: int
) -> None:
    stop = TEXT[begin : begin + 3]
    ids = server.ids(TEXT)
    scripted = make_server(say(ids, step, ends=False))
    expected = TEXT[: TEXT.index(stop)]
    reply = scripted.chat(stop=[stop, "never"], max_tokens=len(ids)).json()
    (choice,) = reply["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    used = next(
        count for count in range(1, len(ids) + 1) if stop in server.tokenizer.decode(ids[:count])
    )
    assert reply["usage"]["completion_tokens"] == used
    assert scripted.engine.aborted == [scripted.engine.submitted[0].request_id]


def test_stop_string_is_kept_on_request(make_server: MakeServer, server: Server) -> None:
    scripted = make_server(say(server.ids(TEXT), ends=False))
    assert (
        content(scripted, stop="row", include_stop_str_in_output=True)
        == "the quick brow"[:-1] + "row"[2:]
    )


def test_streamed_stop_string_is_never_sent(make_server: MakeServer, server: Server) -> None:
    scripted = make_server(say(server.ids(TEXT), ends=False))
    options = {"include_usage": True}
    *chunks, usage, _ = events_of(scripted.chat(stream=True, stop="brown", stream_options=options))
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "the quick "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    used = usage["usage"]["completion_tokens"]
    assert "brown" in server.tokenizer.decode(server.ids(TEXT)[:used])
    assert "brown" not in server.tokenizer.decode(server.ids(TEXT)[: used - 1])


def test_logprobs_follow_the_text_that_a_stop_string_leaves(
    make_server: MakeServer, server: Server
) -> None:
    ids = server.ids("a b c d")
    reply = make_server(say(ids, ends=False)).chat(stop="c", logprobs=True).json()
    (choice,) = reply["choices"]
    texts = [server.tokenizer.token_text(token_id) for token_id in ids]
    begins = [len("".join(texts[:count])) for count in range(len(ids))]
    expected = [text for text, begin in zip(texts, begins, strict=True) if begin < len("a b ")]
    assert choice["message"]["content"] == "a b "
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stop": ["never", "brown"]}, "brown"),
        ({"stop_token_ids": [9]}, 9),
        ({"stop_token_ids": [2]}, 2),
        ({"stop": "never"}, None),  # the model's own end
        ({"max_tokens": 3}, None),
    ],
)
def test_what_the_client_named_and_ended_the_text_is_told(
    make_server: MakeServer, server: Server, fields: dict[str, Any], reason: str | int | None
) -> None:
    own = 9 if fields.get("stop_token_ids") == [9] else 2
    scripted = make_server(say([*server.ids(TEXT), own], ends=reason != "brown"))
    for ask in (scripted.chat, scripted.complete):
        (whole,) = ask(**fields).json()["choices"]
        *others, last = [
            event["choices"][0] for event in events_of(ask(stream=True, **fields))[:-1]
        ]
        assert whole.get("stop_reason") == last.get("stop_reason") == reason
        assert not any("stop_reason" in choice for choice in others)


def test_a_stop_string_counts_as_stop_though_the_engine_says_abort(
    make_server: MakeServer, server: Server
) -> None:
    scripted = make_server(say(server.ids(TEXT), ends=False))
    scripted.chat(stop="brown")
    name = 'aerie:request_success_total{finished_reason="%s",model_name="tiny"} '
    text = scripted.get("/metrics").text
    assert name % "stop" + "1.0" in text
    assert name % "abort" + "0.0" in text


def test_stop_and_engine_end_in_one_step_give_one_finish(
    make_server: MakeServer, server: Server
) -> None:
    scripted = make_server(say([*server.ids("a stop"), 2], step=100))
    *chunks, done = events_of(scripted.chat(stream=True, stop="stop"))
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons.count("stop") == 1
    assert done == "[DONE]"
    assert len(scripted.engine.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_broken_characters_are_joined_across_tokens(
    make_server: MakeServer, server: Server, stream: bool
) -> None:
    text = "é€😀!"
    scripted = make_server(say([*server.ids(text), 2]))
    response = scripted.chat(stream=stream)
    if stream:
        chunks = events_of(response)[:-1]
        parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == text
    else:
        assert response.json()["choices"][0]["message"]["content"] == text
