"""Frameworks that people use, unchanged, against a running server: `make test-clients`. A test is
skipped where its framework is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from engine.checkpoints.source import BUNDLED_ALIAS
from tests.support.servers.live_server import LiveServer, child_environment
from tests.support.waiting import DEADLINE

# The frameworks' own warnings are not ours to mend.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
KEY = "none"
HI = "Say hello in one word."
ASK = "Tell me about a person."
WEATHER = "What is the weather in Paris?"


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    mood: Literal["glad", "sad"]


@pytest.fixture(scope="module")
def server(native_cache: Path) -> Iterator[LiveServer]:
    settings = ("cache.num_blocks=512", f"files.dir={native_cache}", "speculation.tree=chain3")
    with LiveServer(*settings, config="smollm2") as live:
        yield live
        assert live.stop() == 0


@pytest.fixture
def base_url(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the API is. No framework may look for anything on the internet."""
    for name in ("LITELLM_LOCAL_MODEL_COST_MAP", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    return f"{server.url}/v1"


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_litellm(base_url: str) -> None:
    litellm = pytest.importorskip("litellm")
    known = {"model": f"openai/{BUNDLED_ALIAS}", "api_base": base_url, "api_key": KEY}
    messages = [{"role": "user", "content": HI}]
    fields = known | {"messages": messages, "max_tokens": 12, "temperature": 0}
    whole = litellm.completion(**fields)
    chunks = list(litellm.completion(**fields, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    called = litellm.completion(**fields | {"max_tokens": 60}, tools=[TOOL], tool_choice="required")
    (call, *_) = called.choices[0].message.tool_calls
    assert "city" in json.loads(call.function.arguments)
    person = litellm.completion(**fields | {"max_tokens": 80}, response_format=Person)
    assert Person.model_validate_json(person.choices[0].message.content)
    long = fields | {"messages": [{"role": "user", "content": "a b " * 9000}]}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**long)


def test_langchain(base_url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    tools = pytest.importorskip("langchain_core.tools")
    messages = pytest.importorskip("langchain_core.messages")

    @tools.tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"Sunny in {city}"

    model = langchain.ChatOpenAI(
        model=BUNDLED_ALIAS, base_url=base_url, api_key=KEY, temperature=0, max_tokens=80
    )
    said = model.invoke(HI)
    assert said.content
    assert "".join(chunk.content for chunk in model.stream(HI)) == said.content
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Person, method=method).invoke(ASK), Person)
    asked = [messages.HumanMessage(WEATHER)]
    forced = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    called = forced.invoke(asked)
    results = [get_weather.invoke(call) for call in called.tool_calls]
    assert results[0].content.startswith("Sunny in ")
    assert model.bind_tools([get_weather]).invoke([*asked, called, *results]).response_metadata


def test_a_langchain_agent(base_url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    agents = pytest.importorskip("langchain.agents")
    asked: list[str] = []

    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return f"Sunny in {city}"

    model = langchain.ChatOpenAI(
        model=BUNDLED_ALIAS, base_url=base_url, api_key=KEY, temperature=0, max_tokens=60
    )
    agent = agents.create_agent(model, [get_weather])
    ended = agent.invoke({"messages": [{"role": "user", "content": WEATHER}]})
    assert ended["messages"][-1].type == "ai"


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor(base_url: str, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    with openai.OpenAI(base_url=base_url, api_key=KEY) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        person = client.chat.completions.create(
            model=BUNDLED_ALIAS,
            messages=[{"role": "user", "content": ASK}],
            response_model=Person,
            max_tokens=120,
            max_retries=1,
            temperature=0,
        )
    assert isinstance(person, Person)


def test_pydantic_ai(base_url: str) -> None:
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=base_url, api_key=KEY)
    model = models.OpenAIChatModel(BUNDLED_ALIAS, provider=provider)
    settings = {"temperature": 0.0, "max_tokens": 120}
    assert ai.Agent(model, model_settings=settings).run_sync(HI).output
    for wanted in (Person, ai.NativeOutput(Person)):
        agent = ai.Agent(model, output_type=wanted, model_settings=settings)
        assert isinstance(agent.run_sync(ASK).output, Person)


def test_llm(base_url: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    known = {"model_id": "aerie", "model_name": BUNDLED_ALIAS, "api_base": base_url}
    flags = {"supports_tools": True, "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([known | flags]))

    home = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}  # no other models

    def run(*arguments: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "llm", "-m", "aerie", "--key", KEY, *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
            env=child_environment(home),
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert run(HI, "-o", "max_tokens", "12").strip()
    schema = json.dumps(Person.model_json_schema())
    person = run(ASK, "--schema", schema, "-o", "max_tokens", "120", "--no-stream")
    assert Person.model_validate_json(person)
