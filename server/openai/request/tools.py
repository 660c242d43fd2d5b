"""The tools of a chat request: functions that the model may call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from server.http.errors import shorten
from server.http.request.body import Fields, NotUsed
from server.http.request.validation import broken_rule
from server.openai.request.fields import HARMLESS

MAX_TOOLS = 128
MAX_NAME = 128  # OpenAI allows 64, Anthropic 128
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
FunctionName = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern="^[a-zA-Z0-9_-]+$")]


def _of_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is no JSON schema of an object: models are asked for named arguments."""
    kind, properties, needed = (schema.get(key) for key in ("type", "properties", "required"))
    if kind not in (None, "object"):
        raise ValueError(f'its "type" is {shorten(kind)}: it must be "object"')
    if properties is not None and not isinstance(properties, dict):
        raise ValueError(f'its "properties" is {shorten(properties)}: it must be an object')
    names = needed if isinstance(needed, list) else [needed]
    if needed is not None and not all(isinstance(name, str) for name in names):
        raise ValueError(f'its "required" is {shorten(needed)}: it must be an array of strings')
    return schema


ObjectSchema = Annotated[dict[str, Any], AfterValidator(_of_objects)]


class FunctionDefinition(Fields):
    name: FunctionName
    description: str | None = Field(None, description="What the function does and when to call it.")
    parameters: ObjectSchema | None = Field(
        None, description="JSON schema of an object, the arguments. Default: no arguments."
    )
    strict: bool | None = Field(
        None,
        description="True: arguments always fit the schema, and a keyword of it that cannot be "
        "ensured is an error. Else they fit it as far as that can be ensured, with `tool_choice` "
        "required or a named function only. Llama 4's calls in Python are not ensured with auto.",
    )


class Tool(Fields):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: NotUsed[Any] = Field(
        None, description=HARMLESS + "equal prefixes are found without it."
    )

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def parameters(self) -> dict[str, Any]:
        return self.function.parameters or NO_PARAMETERS

    def for_template(self) -> dict[str, Any]:
        """As transformers hands it to a template, its members always in the same order."""
        function = {"name": self.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Fields):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class ChosenTools(Fields):
    """One function that must be called, or those that may be."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> ChosenTools:
        for name in ("function", "allowed_tools"):
            if (getattr(self, name) is not None) != (self.type == name):
                raise broken_rule(
                    name,
                    f"tool_choice.{name} is required with the type {shorten(name)}, and only there",
                )
        return self

    @property
    def names(self) -> list[str]:
        """The functions that may be called."""
        if self.function is not None:
            return [self.function.name]
        assert self.allowed_tools is not None
        return [tool.function.name for tool in self.allowed_tools.tools]

    @property
    def is_required(self) -> bool:
        return self.allowed_tools is None or self.allowed_tools.mode == "required"


Tools = Annotated[
    Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None,
    Field(description=f"Up to {MAX_TOOLS} functions that the model may call."),
]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ChosenTools | None,
    Field(
        description="none: no function is called, and tools are not shown to the model; auto "
        "(default): the model decides; required: at least one is called; or "
        '{"type": "function", "function": {"name": ...}}: this one is; or {"type": '
        '"allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}: only these exist.'
    ),
]


def check_names(tools: Sequence[Tool]) -> None:
    """Refuse two functions of one name: a call of it would not say which."""
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise broken_rule(
                "tools",
                f"tools[{index}].function.name is {shorten(tool.name)}: another function has "
                "this name; they must differ",
            )
        seen.add(tool.name)


def chosen(tools: Sequence[Tool], choice: Any) -> list[Tool]:
    """The tools that may be called."""
    if choice == "none":
        return []
    if not isinstance(choice, ChosenTools):
        return list(tools)
    return [tool for tool in tools if tool.name in choice.names]


def check_choice(tools: Sequence[Tool], choice: Any) -> None:
    """Refuse a choice of tools that are not there."""
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise broken_rule("tool_choice", "tool_choice is only allowed with tools")
    known = [tool.name for tool in tools]
    for name in choice.names if isinstance(choice, ChosenTools) else ():
        if name not in known:
            raise broken_rule(
                "tool_choice",
                f"tool_choice names the function {shorten(name)}: it must be one of tools: "
                + ", ".join(shorten(each) for each in known[:8]),
            )


def must_call(choice: Any) -> bool:
    return choice == "required" or (isinstance(choice, ChosenTools) and choice.is_required)
