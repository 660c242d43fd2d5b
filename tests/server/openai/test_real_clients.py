"""Bodies as known clients send them, with the model's name replaced: all must be answered."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support.engines.scripted_engine import INFO
from tests.support.servers.http_server import CHAT_PATH, COMPLETION_PATH, MODEL, Server

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "s"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}]}
USAGE = {"include_usage": True}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object"},
        "strict": False,
    },
}
PLAIN_TOOL = ("name", "description", "parameters")
CALL = {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": '{"a":1}'}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}

CHATS: dict[str, dict[str, Any]] = {
    "curl": {"messages": [USER]},
    "curl, JSON mode": {"messages": [USER], "response_format": {"type": "json_object"}},
    "LangChain structured output": {"messages": [USER], "response_format": SCHEMA},
    "curl with all samplers": {
        "messages": [USER], "temperature": 0.7, "top_p": 0.95, "max_tokens": 8, "n": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "stop": None, "stream": False,
    },
    "openai-python, reasoning": {
        "messages": [{"role": "developer", "content": "d"}, USER], "reasoning_effort": "medium",
        "verbosity": "low", "store": False, "metadata": {"k": "v"}, "service_tier": "auto",
    },
    "openai-python, stream": {"messages": [USER], "stream": True, "stream_options": USAGE},
    "openai-python, history of tools": {
        "messages": [
            USER,
            {
                "content": None, "refusal": None, "role": "assistant", "annotations": [],
                "audio": None, "function_call": None, "tool_calls": [CALL],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        ],
    },
    "openai-python, parsed message sent back": {
        "messages": [USER, {"role": "assistant", "content": "a", "parsed": None}, USER],
    },
    "openai-node": {"messages": [USER], "stream": True, "user": "u", "logit_bias": {"5": -100}},
    "go-openai": {"messages": [{"role": "user", "content": "hi", "name": "n"}], "max_tokens": 8},
    "LangChain ChatOpenAI": {
        "messages": [{"content": "hi", "role": "user"}], "stream": False, "temperature": 0.7,
        "n": 1, "max_completion_tokens": 8, "logprobs": False, "seed": 1,
    },
    "LangChain, history of tools": {
        "messages": [
            SYSTEM, USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "call_1"},
        ],
        "stream": True, "stream_options": USAGE, "temperature": 0.0,
    },
    "LangChain bind_tools": {
        "messages": [USER], "tools": [TOOL], "parallel_tool_calls": False, "tool_choice": "auto",
    },
    "Vercel AI SDK, tools": {"messages": [USER], "tools": [TOOL], "tool_choice": "auto"},
    "LangChain agents": {"messages": [USER], "stop": ["\nObservation", "\n\tObservation"]},
    "LangChain4j": {"messages": [USER], "temperature": 0.3, "max_tokens": 8, "user": "u"},
    "Spring AI": {"messages": [USER], "stream": False, "temperature": 0.7, "tools": []},
    "Semantic Kernel": {
        "messages": [USER], "max_tokens": 8, "temperature": 1, "top_p": 1, "n": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"},
    },
    "LlamaIndex OpenAILike": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stream": False,
        "temperature": 0.1, "max_tokens": 8,
    },
    "litellm": {"messages": [SYSTEM, USER], "temperature": 0.0, "max_tokens": 8, "stream": False},
    "litellm, prompt caching": {
        "messages": [
            {
                "role": "system",
                "content": [
                    {"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}
                ],
            },
            {"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}},
        ],
    },
    "aider": {"messages": [SYSTEM, USER], "temperature": 0, "stream": True},
    "continue.dev": {
        "messages": [SYSTEM, PARTS], "max_tokens": 8, "temperature": 0.5, "top_p": 1,
        "stream": True, "frequency_penalty": 0, "presence_penalty": 0, "stop": list("abcde"),
        "prediction": {"type": "content", "content": "x"},
    },
    "Cline": {
        "messages": [SYSTEM, PARTS, {"role": "assistant", "content": "a"}, PARTS],
        "temperature": 0, "stream": True, "stream_options": USAGE,
    },
    "Cline, reasoning sent back": {
        "messages": [USER, {"role": "assistant", "content": "a", "reasoning_content": "r"}, USER],
    },
    "Zed": {
        "messages": [USER], "stream": True, "max_tokens": 8, "temperature": 1.0, "stop": [],
        "tools": [], "tool_choice": "auto", "prompt_cache_key": "k",
    },
    "Vercel AI SDK": {
        "messages": [SYSTEM, USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "call_1", "content": '{"x":1}'}],
        "max_tokens": 8, "temperature": 0, "stream": True, "stream_options": USAGE,
        "reasoning_effort": "low",
    },
    "Open WebUI": {"stream": True, "messages": [USER], "stream_options": USAGE, "max_tokens": 8},
    "LibreChat": {"messages": [USER], "stream": True, "user": "64f", "top_p": 1, "temperature": 1},
    "SillyTavern": {
        "messages": [SYSTEM, USER], "temperature": 1, "max_tokens": 8, "stream": True,
        "presence_penalty": 0, "frequency_penalty": 0, "top_p": 1, "top_k": 0, "min_p": 0,
        "repetition_penalty": 1, "stop": [], "logit_bias": {}, "seed": -1,
    },
    "Hugging Face InferenceClient": {
        "messages": [USER], "frequency_penalty": None, "logit_bias": None, "logprobs": None,
        "max_tokens": 8, "n": None, "presence_penalty": None, "response_format": None, "seed": None,
        "stop": None, "temperature": None, "tool_choice": None, "tool_prompt": None, "tools": None,
        "top_logprobs": None, "top_p": None, "stream": False, "stream_options": None,
    },
    "Haystack": {"messages": [USER], "n": 1, "stream": False, "tools": []},
    "DSPy": {"messages": [SYSTEM, USER], "temperature": 0.0, "max_tokens": 8, "stream": False},
    "smolagents": {"messages": [PARTS], "stop": ["Observation:", "Calling tools:"]},
    "OpenAI Agents SDK": {"messages": [SYSTEM, USER], "stream": True, "stream_options": USAGE,
                          "parallel_tool_calls": False, "tools": []},
    "promptfoo": {"messages": [USER], "max_tokens": 8, "temperature": 0, "top_p": 1,
                  "presence_penalty": 0, "frequency_penalty": 0},
    "guidellm": {
        "messages": [PARTS], "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 8, "max_tokens": 8, "stop": None, "ignore_eos": True,
    },
    "vllm bench serve": {
        "messages": [PARTS], "temperature": 0.0, "max_completion_tokens": 8, "stream": True,
        "stream_options": USAGE, "ignore_eos": True,
    },
    "aiperf": {
        "messages": [{"role": "user", "name": "n", "content": "hi"}], "stream": True,
        "stream_options": USAGE, "max_completion_tokens": 8, "min_tokens": 8, "ignore_eos": True,
    },
    "llmperf": {"messages": [{"role": "system", "content": ""}, USER], "stream": True,
                "max_tokens": 8},
    "lm-evaluation-harness": {
        "messages": [{"role": "user", "content": "hi", "type": "text"}], "max_tokens": 8,
        "temperature": 0, "stop": ["\n\n", "Q:"], "seed": 1234,
    },
    "vLLM's documentation": {
        "messages": [USER], "top_k": 20, "min_p": 0.0, "chat_template_kwargs": {"a": False},
        "use_beam_search": False, "length_penalty": 1.0, "stop_token_ids": [], "min_tokens": 0,
        "skip_special_tokens": True, "spaces_between_special_tokens": True, "priority": 0,
        "truncate_prompt_tokens": None, "include_stop_str_in_output": False, "request_id": "r",
        "add_generation_prompt": True, "add_special_tokens": False, "return_token_ids": False,
    },
}  # fmt: skip
COMPLETIONS: dict[str, dict[str, Any]] = {
    "curl": {"prompt": "hi", "max_tokens": 7, "temperature": 0},
    "LangChain OpenAI": {
        "prompt": ["hi"], "frequency_penalty": 0, "logit_bias": {}, "max_tokens": 8, "n": 1,
        "presence_penalty": 0, "temperature": 0.7, "top_p": 1, "best_of": 1, "seed": None,
        "logprobs": None, "stream": False,
    },
    "LlamaIndex": {"prompt": "hi", "temperature": 0.1, "max_tokens": 8, "stream": True},
    "continue.dev, autocompletion": {
        "prompt": "a<fim>b", "max_tokens": 8, "temperature": 0.01, "top_p": 1, "stream": True,
        "frequency_penalty": 0, "presence_penalty": 0, "suffix": "",
        "stop": [f"<stop {index}>" for index in range(16)],
    },
    "guidellm": {
        "prompt": "hi", "stream": True, "max_tokens": 8, "stop": None, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "vllm bench serve": {
        "prompt": "hi", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8,
        "logprobs": None, "stream": True, "stream_options": USAGE, "ignore_eos": True,
    },
    "sglang bench_serving": {
        "prompt": "hi", "temperature": 0.0, "best_of": 1, "max_tokens": 8, "stream": True,
        "ignore_eos": True,
    },
    "lm-evaluation-harness, likelihoods": {
        "prompt": [[5, 6, 7]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
        "echo": True,
    },
    "vLLM's documentation": {
        "prompt": "hi", "logprobs": False, "top_k": -1, "add_special_tokens": True, "suffix": None,
        "user": "u", "max_completion_tokens": 4, "return_tokens_as_token_ids": None,
    },
}  # fmt: skip


FLAT = {"type": "function", "strict": False, **{k: TOOL["function"][k] for k in PLAIN_TOOL}}
RESPONSES: dict[str, dict[str, Any]] = {
    "openai-python": {"input": "hi", "instructions": "s", "store": True, "temperature": 0.5},
    "OpenAI Agents SDK": {
        "input": [{"role": "user", "content": "hi"}], "instructions": "s", "include": [],
        "tools": [FLAT], "tool_choice": "auto", "parallel_tool_calls": False, "metadata": {},
        "prompt_cache_retention": None, "truncation": None, "store": None, "stream": True,
    },
    "Codex": {
        "instructions": "s", "tools": [FLAT], "tool_choice": "auto", "parallel_tool_calls": False,
        "input": [
            {"type": "message", "role": "developer",
             "content": [{"type": "input_text", "text": "d"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "reasoning": {"effort": "medium", "summary": "auto"}, "store": False, "stream": True,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "text": {"verbosity": "medium"},
    },
    "Vercel AI SDK": {
        "input": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ],
        "temperature": 0, "max_output_tokens": 99, "stream": True,
        "text": {"format": {"type": "text"}},
    },
}  # fmt: skip
CACHED = {"cache_control": {"type": "ephemeral"}}
MESSAGES: dict[str, dict[str, Any]] = {
    "anthropic-sdk-python": {"max_tokens": 8, "messages": [USER], "system": "s"},
    "Claude Code": {
        "max_tokens": 32000, "stream": True, "temperature": 1,
        "system": [{"type": "text", "text": "s", **CACHED}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", **CACHED}]}],
        "tools": [{"name": "mcp__" + "x" * 90, "description": "d", "input_schema": {
            "$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
            "properties": {"a": {"type": "string"}}, "additionalProperties": False}}],
        "metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    },
    "LangChain ChatAnthropic": {
        "max_tokens": 8, "messages": [USER], "stop_sequences": ["x"], "top_k": 5, "top_p": 0.9,
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    },
}  # fmt: skip
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "LangChain OpenAIEmbeddings": {"input": [[5, 6], [7]], "encoding_format": "base64"},
    "LlamaIndex": {"input": ["hi"], "user": None, "dimensions": None},
}
ALL = {
    CHAT_PATH: CHATS,
    COMPLETION_PATH: COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/embeddings": EMBEDDINGS,
}
ENDS = {"/v1/responses": '"type":"response.completed"', "/v1/messages": '"type":"message_stop"'}


@pytest.mark.parametrize(
    ("path", "body"),
    [(path, body) for path, bodies in ALL.items() for body in bodies.values()],
    ids=[f"{path}: {name}" for path, bodies in ALL.items() for name in bodies],
)
def test_bodies_of_known_clients_are_answered(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    server.engine.info = msgspec.structs.replace(INFO, max_model_len=1000)
    response = server.post(path, {"model": MODEL} | body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        end = response.text.removesuffix("\n\n").split("\n\n")[-1]
        assert ENDS.get(path, "data: [DONE]") in end
