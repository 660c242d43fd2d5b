"""What clients send by habit works where nothing is lost by it, and they are told what had no
effect."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.http.request.body import parse_body
from server.openai.request.schema import ChatRequest, CompletionRequest
from tests.server.openai.test_refusals import error_of
from tests.support.models.tiny_llama import BOS, CHAT_TEMPLATE, write_tokenizer
from tests.support.servers.http_server import (
    CHAT,
    CHAT_PATH,
    COMPLETION_PATH,
    MESSAGES,
    MODEL,
    Server,
    events_of,
)

MakeServer = Callable[..., Server]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("oracle")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}


def warning(server: Server, **fields: Any) -> str | None:
    """The warning header of a chat completion, which must succeed."""
    response = server.chat(**fields)
    assert response.status_code == 200, response.text
    found = response.headers.get("x-aerie-warning")
    return None if found is None else str(found).removeprefix("not used: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""},
        {"bad_words": []},
        {"stop": []},
        {"stop": ["", "zzz"]},
        {"stop": [f"stop {index}" for index in range(32)]},
        {"temperature": 0, "top_p": 0.5, "top_k": 5, "min_p": 0, "seed": 1},
        {"top_k": 0},
        {"min_p": 0, "repetition_penalty": 1},
        {"repetition_penalty": 3},
        {"logprobs": False, "top_logprobs": 0},
        {"top_logprobs": 0},
        {"logit_bias": {}},
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"store": False, "metadata": {}, "use_beam_search": False, "length_penalty": 1.0},
        {"echo": False},
        dict.fromkeys(set(ChatRequest.model_fields) - {"model", "messages"}),
    ],
)
def test_what_asks_for_nothing_special_is_accepted(server: Server, fields: dict[str, Any]) -> None:
    assert warning(server, **fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False},
        {"suffix": ""},
        {"best_of": 2, "n": 2},
        {"max_tokens": 3, "max_completion_tokens": 3},
        dict.fromkeys(set(CompletionRequest.model_fields) - {"model", "prompt"}),
    ],
)
def test_what_asks_for_nothing_special_is_accepted_for_completions(
    server: Server, fields: dict[str, Any]
) -> None:
    response = server.complete(**fields)
    assert response.status_code == 200, response.text
    assert "x-aerie-warning" not in response.headers


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"user": "u", "store": True}, "user, store"),
        ({"metadata": {"a": 1}, "request_id": "r"}, "request_id, metadata"),
        ({"safety_identifier": "s", "prompt_cache_key": "k"}, "safety_identifier"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"reasoning_effort": "low", "verbosity": "high"}, "reasoning_effort, verbosity"),
        (
            {"prediction": {"type": "content", "content": "a"}, "speculation": {"enabled": False}},
            "prediction",
        ),
        ({"tools": [TOOL], "tool_choice": "none"}, "tools"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"temprature": None}, "temprature"),
        (
            {"messages": [{"role": "user", "content": "a", "id": "1", "cache_control": {"a": 1}}]},
            "messages[0].id, messages[0].cache_control",
        ),
        (
            {"messages": [{"role": "assistant", "content": "é", "refusal": "no", "x": None}]},
            "messages[0].x, messages[0].refusal",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a", "cache_control": {"type": "e"}}],
                    }
                ]
            },
            "messages[0].content[0].cache_control",
        ),
    ],
)
def test_what_had_no_effect_is_named_in_a_header_and_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], names: str
) -> None:
    caplog.set_level(logging.INFO)
    assert warning(server, **fields) == names
    (record,) = [r for r in caplog.records if r.name == "server.http.middleware.request_log"]
    assert record.__dict__["fields"]["not_used"] == names.replace(", ", ",")


def test_unknown_fields_are_refused_or_warned_of(make_server: MakeServer, server: Server) -> None:
    messages = [{"role": "user", "content": "hi", "mood": 1}]
    fields = {"temprature": 1, "messages": messages, "stream": True}
    odd = {"tempé\n": 1, "stream_options": {"every": 2}}
    assert error_of(server.chat(**fields), 400)["param"] == "temprature"
    tolerant = make_server(unknown_fields="warn")
    assert warning(tolerant, **fields, **odd) == (
        r"temprature, temp\u00e9\n, stream_options.every, messages[0].mood"
    )
    assert error_of(tolerant.chat(temprature=1, temperature=9), 400)["param"] == "temperature"
    wide = make_server(unknown_fields="warn").chat(**{f"k{index}": 1 for index in range(900)})
    assert wide.status_code == 200
    assert len(wide.headers["x-aerie-warning"]) < 1100


def test_whole_numbers_may_have_a_point(server: Server) -> None:
    fields: dict[str, Any] = {
        "n": 1.0,
        "seed": 3.0,
        "top_k": 4.0,
        "speculation": {"max_nodes": 2.0},
    }
    server.complete(prompt=[[5.0, 6.0], [7, 8]], stop_token_ids=[9.0], max_tokens=5.0, **fields)
    first, second = server.engine.submitted
    assert (first.prompt_ids, second.prompt_ids) == ([5, 6], [7, 8])
    params = first.params
    assert (params.seed, params.top_k, params.max_tokens) == (3, 4, 5)
    assert (params.stop_token_ids, first.max_draft_nodes) == ((9,), 2)
    assert error_of(server.complete(max_tokens=5.5), 400)["param"] == "max_tokens"


def test_many_nulls_of_one_name_are_dropped_and_many_names_are_refused(server: Server) -> None:
    message = {"role": "user", "content": "a"}
    same = [message | {"parsed": None} for _ in range(100)]
    parsed = parse_body(json.dumps(CHAT | {"messages": same}).encode(), ChatRequest)
    assert parsed.not_used == [f"messages[{index}].parsed" for index in range(100)]
    different = [message | {f"k{index}": None} for index in range(100)]
    assert error_of(server.chat(messages=different), 400)["code"] == "unknown_field"


def test_top_p_of_zero_is_greedy(server: Server) -> None:
    server.chat(top_p=0, temperature=1)
    params = server.engine.submitted[0].params
    assert (params.temperature, params.top_p) == (0.0, 1.0)


def test_a_seed_of_minus_one_is_no_seed(server: Server) -> None:
    for _ in range(2):
        server.chat(seed=-1)
    first, second = (request.params.seed for request in server.engine.submitted)
    assert first != second


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_usage_in_every_chunk_on_request(server: Server, path: str, stream: bool) -> None:
    content = {"messages": MESSAGES} if path == CHAT_PATH else {"prompt": "hi"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "tiny", "stream": True, "stream_options": options} | content
    if not stream:
        whole = server.post(path, body | {"stream_options": options | {"include_usage": False}})
        *chunks, done = events_of(whole)
        assert all(chunk["choices"] for chunk in chunks)  # no chunk of totals was asked for
        return
    *chunks, last, done = events_of(server.post(path, body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == len(server.ids("hello there")) + 1
    for chunk in [*chunks, last]:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == len(server.engine.submitted[0].prompt_ids)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "prompt_tokens_details" in last["usage"]
    assert done == "[DONE]"


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_the_message_that_is_continued_is_echoed_on_request(server: Server, role: str) -> None:
    messages = [*MESSAGES, {"role": role, "content": "Sure, "}]
    fields = {"messages": messages, "continue_final_message": True, "echo": True}
    whole = server.chat(**fields)
    expected = ("Sure, " if role == "assistant" else "") + "hello there"
    assert whole.json()["choices"][0]["message"]["content"] == expected
    *chunks, _ = events_of(server.chat(**fields, stream=True))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == expected
    assert ("echo" in whole.headers.get("x-aerie-warning", "")) == (role == "user")


def test_what_sagemaker_sends_is_told_apart(server: Server) -> None:
    bodies = {"messages": MESSAGES}, {"prompt": "hi"}, {"input": "hi"}
    for body, path in zip(bodies, (CHAT_PATH, COMPLETION_PATH, "/v1/embeddings"), strict=True):
        content = {"model": MODEL, **body}
        there, here = server.post(path, content), server.post("/invocations", content)
        assert (here.status_code, here.json().keys()) == (200, there.json().keys())
    for content in ({"model": MODEL}, {"model": MODEL, "prompt": 5}, {"prompt": "hi"}):
        assert server.post("/invocations", content).status_code == 400
    deep = b'{"messages":' * 50_000 + b"1" + b"}" * 50_000
    assert "nested too deeply" in error_of(server.post_raw("/invocations", deep), 400)["message"]
    for method in ("GET", "POST"):
        assert server.run(lambda client, m=method: client.request(m, "/ping")).status_code == 200


def test_allowed_tokens_and_bad_words_reach_the_engine(server: Server) -> None:
    fields = {"allowed_token_ids": [9, 5, 9], "bad_words": ["he", " he", " "]}
    server.chat(**fields)
    server.complete(**fields, prompt=["a", "b"])
    bad = tuple(tuple(server.ids(text)) for text in ("he", " he", " ", "  "))
    asked = [(r.params.allowed_token_ids, r.params.bad_words) for r in server.engine.submitted]
    assert asked == [((9, 5), bad)] * 3


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_the_last_text_before_the_limit_says_so(server: Server, path: str) -> None:
    """As with vLLM, whose clients count chunks: each has further tokens, also the last."""
    content = {"messages": MESSAGES} if path == CHAT_PATH else {"prompt": "hi"}
    options = {"continuous_usage_stats": True}
    body = {"model": "tiny", "stream": True, "max_tokens": 5, "logprobs": 1} | content
    if path == CHAT_PATH:
        body |= {"logprobs": True, "top_logprobs": 0}
    *chunks, _ = events_of(server.post(path, body | {"stream_options": options}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == list(range(0 if path == CHAT_PATH else 1, 6))
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("length", None)
    assert last["text"] if path == COMPLETION_PATH else last["delta"]["content"]
    assert len(last["logprobs"]["content" if path == CHAT_PATH else "tokens"]) == 1


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
def test_token_ids_on_request(server: Server, path: str) -> None:
    content = {"messages": MESSAGES} if path == CHAT_PATH else {"prompt": "hi"}
    body = {"model": "tiny", "return_token_ids": True} | content
    reply = server.post(path, body).json()
    *chunks, _ = events_of(server.post(path, body | {"stream": True}))
    choices = [chunk["choices"][0] for chunk in chunks]
    streamed = [token for choice in choices for token in choice.get("token_ids", [])]
    expected = [*server.ids("hello there"), 2]
    assert reply["choices"][0]["token_ids"] == streamed == expected
    holders = (reply, chunks[0]) if path == CHAT_PATH else (reply["choices"][0], choices[0])
    for holder in holders:
        assert holder["prompt_token_ids"] == server.engine.submitted[0].prompt_ids


def test_tokens_as_ids_in_logprobs(server: Server) -> None:
    first = server.ids("hello there")[0]
    options = {"return_tokens_as_token_ids": True}
    chat = server.chat(logprobs=True, top_logprobs=1, **options).json()["choices"][0]["logprobs"]
    entry = chat["content"][0]
    assert entry["token"] == entry["top_logprobs"][0]["token"] == f"token_id:{first}"
    text = server.complete(logprobs=1, **options).json()["choices"][0]["logprobs"]
    assert text["tokens"][0] == f"token_id:{first}"
    assert text["top_logprobs"][0] == {f"token_id:{first}": -0.5}


@pytest.mark.parametrize(
    ("limit", "max_tokens", "kept"),
    [(3, 4, [7, 8, 9]), (0, 4, [5, 6, 7, 8, 9]), (-1, 61, [7, 8, 9]), (99, 4, [5, 6, 7, 8, 9])],
)
def test_prompts_are_cut_on_request(
    server: Server, limit: int, max_tokens: int, kept: list[int]
) -> None:
    fields = {"truncate_prompt_tokens": limit, "max_tokens": max_tokens}
    reply = server.complete(prompt=[5, 6, 7, 8, 9], echo=True, **fields).json()
    assert server.engine.submitted[0].prompt_ids == kept
    text = server.tokenizer.decode(kept)
    assert reply["choices"][0]["text"].startswith(text)
    long = server.chat(messages=[{"role": "user", "content": "a" * 5000}], **fields)
    assert long.status_code == (200 if limit in (3, -1) else 400)


def test_a_prompt_is_cut_on_the_asked_side(server: Server) -> None:
    cut = {"truncate_prompt_tokens": 3, "truncation_side": "right"}
    server.complete(prompt=[5, 6, 7, 8, 9], **cut)
    assert server.engine.submitted[0].prompt_ids == [5, 6, 7]
    reply = server.complete(prompt=[5, 6], truncation_side="left")
    assert reply.headers["x-aerie-warning"] == "not used: truncation_side"


def test_parts_may_have_the_names_of_the_responses_api(server: Server) -> None:
    for kind in ("text", "input_text", "output_text"):
        server.chat(messages=[{"role": "user", "content": [{"type": kind, "text": "hi"}]}])
    first, *others = [request.prompt_ids for request in server.engine.submitted]
    assert others == [first, first]


def test_a_body_may_begin_with_a_byte_order_mark(server: Server) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(CHAT).encode()
    assert server.post_raw(CHAT_PATH, body).status_code == 200


def test_bos_is_written_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = server.tokenizer.encode
    sent: list[bool] = []

    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        sent.append(add_special_tokens)
        return [BOS, *plain(text, False)] if add_special_tokens else plain(text, False)

    monkeypatch.setattr(server.tokenizer, "encode", encode)
    server.complete(prompt="hi")
    server.complete(prompt="<|im_start|>hi")
    server.complete(prompt="hi", add_special_tokens=False)
    server.chat(add_special_tokens=True)  # the template begins with BOS
    ids = [request.prompt_ids for request in server.engine.submitted]
    assert ids[:3] == [[BOS, 74, 75], [BOS, 74, 75], [74, 75]]
    assert ids[3].count(BOS) == plain("<|im_start|>user\nhi<|im_start|>").count(BOS)
    assert server.post("/tokenize", {"prompt": "<|im_start|>hi"}).json()["tokens"] == ids[1]


def history(content: Any, **call: Any) -> list[dict[str, Any]]:
    """A conversation with a call of a tool; without `content` for ..."""
    assistant = {"role": "assistant", "tool_calls": [CALL | call]}
    return [
        {"role": "user", "content": "u"},
        assistant if content is ... else assistant | {"content": content},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
    ]


SHOWS_CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.reasoning_content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endfor %}{{ m.tool_call_id }};{% endfor %}"
)


@pytest.mark.parametrize("content", [None, [], ...])
def test_calls_of_earlier_replies_reach_the_template(
    make_server: MakeServer, oracle: PreTrainedTokenizerBase, content: Any
) -> None:
    server = make_server(template=SHOWS_CALLS)
    assert warning(server, messages=history(content)) is None
    prompt = server.tokenizer.decode(server.engine.submitted[0].prompt_ids, False)
    assert prompt == 'user:u;assistant:[c1 f {"a": [1]}];tool:42c1;'
    function = {"name": "f", "arguments": {"a": [1]}}
    calls = [{"id": "c1", "type": "function", "function": function}]
    shown = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    assert prompt == oracle.apply_chat_template(shown, tokenize=False, chat_template=SHOWS_CALLS)
    tests_null = "{% if m.content is none %}null{% endif %};{% endfor %}"
    server = make_server(template=SHOWS_CALLS.replace(";{% endfor %}", tests_null))
    assert warning(server, messages=history(content)) is None
    prompt = server.tokenizer.decode(server.engine.submitted[0].prompt_ids, False)
    assert prompt == 'user:u;assistant:None[c1 f {"a": [1]}]null;tool:42c1;'


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_earlier_replies_reaches_the_template(
    make_server: MakeServer, oracle: PreTrainedTokenizerBase, name: str
) -> None:
    server = make_server(template=SHOWS_CALLS)
    messages = [{"role": "assistant", "content": "a", name: "because"}]
    assert warning(server, messages=messages) is None
    prompt = server.tokenizer.decode(server.engine.submitted[0].prompt_ids, False)
    expected = oracle.apply_chat_template(messages, tokenize=False, chat_template=SHOWS_CALLS)
    assert prompt == expected == "assistant:abecause;"


@pytest.mark.parametrize(
    ("arguments", "shown"), [('{"a": ', '"{\\"a\\": "'), ("", "{}"), ({"b": 1}, '{"b": 1}')]
)
def test_arguments_are_an_object_or_shown_as_they_are(
    make_server: MakeServer, arguments: Any, shown: str
) -> None:
    server = make_server(template=SHOWS_CALLS)
    messages = history("", function={"name": "f", "arguments": arguments}, index=0)
    assert warning(server, messages=messages) is None
    prompt = server.tokenizer.decode(server.engine.submitted[0].prompt_ids, False)
    assert f"[c1 f {shown}]" in prompt


@pytest.mark.parametrize("content", [None, "", [], ...])
def test_a_template_that_does_not_show_calls_gets_them_as_text(
    make_server: MakeServer, content: Any
) -> None:
    server = make_server(max_model_len=1000)
    assert warning(server, messages=history(content)) is None
    prompt = server.tokenizer.decode(server.engine.submitted[0].prompt_ids, False)
    call = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call}<|im_end|>" in prompt


@pytest.mark.parametrize("last", ["The answer", " The answer ", "a <|im_end|> b\n\n"])
@pytest.mark.parametrize("strips", [False, True])
def test_the_last_message_is_continued_as_in_transformers(
    make_server: MakeServer, oracle: PreTrainedTokenizerBase, last: str, strips: bool
) -> None:
    template = CHAT_TEMPLATE
    if strips:
        template = template.replace("message['content']", "message['content'] | trim")
    messages = [*MESSAGES, {"role": "assistant", "content": last}]
    expected = oracle.apply_chat_template(
        messages, tokenize=False, chat_template=template, continue_final_message=True
    )
    server = make_server(template=template)
    server.chat(messages=messages, continue_final_message=True)
    body = {"messages": messages, "continue_final_message": True}
    reply = server.post("/tokenize", body | {"add_generation_prompt": False}).json()
    prompt = server.engine.submitted[0].prompt_ids
    assert server.tokenizer.decode(prompt, False) == expected
    assert reply["tokens"] == prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"add_generation_prompt": True},
        {"messages": [{"role": "assistant", "content": " "}]},
        {"messages": [{"role": "assistant"}]},
    ],
)
def test_what_cannot_be_continued_is_refused(server: Server, fields: dict[str, Any]) -> None:
    error = error_of(server.chat(continue_final_message=True, **fields), 400)
    assert error["param"] == "continue_final_message"


def test_replies_can_be_sent_back_as_they_came(server: Server) -> None:
    message = server.chat().json()["choices"][0]["message"]
    nulls = dict.fromkeys(("annotations", "audio", "function_call", "tool_calls", "parsed"))
    conversation = [*MESSAGES, message | nulls, *MESSAGES]
    assert server.chat(messages=conversation).status_code == 200


def test_the_version_is_told(server: Server) -> None:
    assert list(server.get("/version").json()) == ["version"]


def test_model_cards_have_what_benchmarks_of_vllm_read(server: Server) -> None:
    card = server.get("/v1/models").json()["data"][0]
    assert card == server.get("/v1/models/tiny").json()
    assert server.get("/v1/models/").json() == server.get("/v1/models").json()
    assert card["root"] == server.config.model.source
    assert (card["parent"], card["max_model_len"]) == (None, 64)
    assert card["permission"][0]["allow_sampling"] is True


def test_the_text_of_tokens_on_request(server: Server) -> None:
    reply = server.post("/tokenize", {"prompt": "hi", "return_token_strs": True}).json()
    assert reply["token_strs"] == ["h", "i"]


def test_prompts_can_be_rendered_far_from_the_server(
    server: Server, oracle: PreTrainedTokenizerBase
) -> None:
    """As the remote tokenizer of lm-evaluation-harness does."""
    info = server.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == (oracle.bos_token, oracle.eos_token)
    assert set(oracle.all_special_tokens) <= set(info["additional_special_tokens"])
    assert info["chat_template"] == CHAT_TEMPLATE
    assert info["model_max_length"] == 64


def test_nothing_is_warned_of_when_all_was_used(server: Server) -> None:
    assert warning(server, **(CHAT | {"temperature": 0.5})) is None
