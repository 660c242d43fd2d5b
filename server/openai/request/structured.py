"""Fields of requests whose output must match a grammar, and the grammar that they ask for."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from llguidance import StructTag
from pydantic import Field, ValidationError, model_validator

from engine.grammar.compiler import WHITESPACE
from engine.messages import EngineInfo
from engine.request import Grammar, GrammarKind
from server.http.context import ServerContext
from server.http.errors import ApiError, bad_value
from server.http.request.body import Fields, NotUsed, object_in
from server.http.request.validation import broken_rule, validation_error
from server.openai.request.fields import HARMLESS, OnlyFalse, OnlyTrue, Unsupported
from server.openai.request.references import endless_reference
from server.openai.request.tag_formats import Holder, check_keywords, lark_of

MAX_SCHEMA = 2**17  # characters of a JSON schema
MAX_REGEX = 4096
MAX_GRAMMAR = 2**16
MAX_CHOICES = 1024
MAX_TAGS = 2 * MAX_SCHEMA
SEARCH = 5.0  # seconds to find which part of a grammar cannot be used
ANY_OBJECT = '{"type": "object"}'
KEYWORDS = (
    "type, enum, const, anyOf, oneOf, allOf, $ref, $defs, properties, required, "
    "additionalProperties, patternProperties, minProperties, maxProperties, items, prefixItems, "
    "minItems, maxItems, minLength, maxLength, pattern, format, minimum, maximum, "
    "exclusiveMinimum, exclusiveMaximum, multipleOf"
)
FORMATS = "date-time, date, time, duration, email, hostname, ipv4, ipv6, uuid, uri"
UNKNOWN_KEYS = re.compile(r"Unimplemented keys: \[(.*)\]")
UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)")
ONE_OF = "oneOf constraints are not supported"
ONE_OF_NEEDS = "oneOf needs schemas that exclude each other, such as by a const; else send anyOf"

Schema = dict[str, Any]
SchemaOrText = Schema | str
Content = TypeVar("Content", bound=Fields)
Regex = Annotated[str, Field(min_length=1, max_length=MAX_REGEX)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_REGEX)]],
    Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES),
]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]


class JsonSchemaFormat(Fields):
    """The text is JSON that fits a schema, in the order of its `properties`."""

    name: str | None = None
    description: NotUsed[str] = Field(None, description=HARMLESS + "the model is not shown it.")
    schema_: Schema = Field(alias="schema", description=f"Keywords: {KEYWORDS}.")
    strict: bool | None = Field(None, description="The text always fits, also when false.")


class TagStructure(Fields):
    """A part of a text between `begin` and `end` that fits a schema."""

    begin: Annotated[str, Field(min_length=1, max_length=1024)]
    schema_: Schema = Field(alias="schema")
    end: Annotated[str, Field(max_length=1024)]


class StructuralTag(Fields):
    """Free text; after a trigger, one of the structures that begin with it."""

    type: Literal["structural_tag"] = "structural_tag"
    structures: Annotated[list[TagStructure], Field(fail_fast=True, min_length=1, max_length=64)]
    triggers: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]],
        Field(fail_fast=True, min_length=1, max_length=64),
    ]

    @model_validator(mode="after")
    def _structures_begin_with_a_trigger(self) -> StructuralTag:
        for at, structure in enumerate(self.structures):
            if not self.trigger_of(structure):
                raise broken_rule(
                    f"structures[{at}].begin",
                    f"structures[{at}].begin is {json.dumps(structure.begin)}: it must begin with "
                    "one of triggers",
                )
        return self

    def trigger_of(self, structure: TagStructure) -> str | None:
        return next((one for one in self.triggers if structure.begin.startswith(one)), None)


# The parts of a response format, and the type that each is for.
PARTS = {
    "schema": "json_object",
    "json_schema": "json_schema",
    "structures": "structural_tag",
    "triggers": "structural_tag",
    "format": "structural_tag",
}


class ResponseFormat(Fields):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = Field(None, description="With `json_schema`.")
    schema_: Schema | None = Field(
        None, alias="schema", description="With `json_object`: what it must fit, as in llama.cpp."
    )
    structures: list[TagStructure] | None = Field(None, description="With `structural_tag`.")
    triggers: list[str] | None = Field(None, description="With `structural_tag`.")
    format: Schema | None = Field(
        None,
        description="With `structural_tag`, in place of `structures` and `triggers`: a format as "
        "xgrammar has them, const_string, json_schema, regex, any_text, sequence, or, tag, "
        "triggered_tags or tags_with_separator.",
    )

    @model_validator(mode="after")
    def _parts_fit_the_type(self) -> ResponseFormat:
        given = {name for name in PARTS if getattr(self, _attribute(name)) is not None}
        for name in given:
            if PARTS[name] != self.type:
                raise broken_rule(name, f'{name} is only allowed with type "{PARTS[name]}"')
        needed = ["json_schema"] if self.type == "json_schema" else []
        if self.type == "structural_tag" and "format" not in given:
            needed = ["structures", "triggers"]
        for name in needed:
            if name not in given:
                raise broken_rule(name, f'{name} is missing: type "{self.type}" requires it')
        if "format" in given and len(given) > 1:
            raise broken_rule("format", "format is only allowed without structures and triggers")
        return self


class StructuredOutputs(Fields):
    """Exactly one of these says what the text must be."""

    json_: SchemaOrText | None = Field(
        None, alias="json", description="A JSON schema, or its JSON as a string."
    )
    regex: Regex | None = Field(None, description="The whole text matches, without look-around.")
    choice: Choices | None = Field(None, description="The text is one of these.")
    grammar: GrammarText | None = Field(None, description="Lark as llguidance reads it, or GBNF.")
    json_object: OnlyTrue | None = Field(None, description="The text is a JSON object.")
    structural_tag: SchemaOrText | None = Field(
        None,
        description="An object with `structures` and `triggers`, or with `format`; or its JSON as "
        "a string.",
    )
    disable_fallback: NotUsed[bool] = Field(None, description=HARMLESS + "there is one backend.")
    disable_any_whitespace: OnlyFalse | None = Field(None, description="Only false.")
    disable_additional_properties: OnlyFalse | None = Field(None, description="Only false.")
    whitespace_pattern: Unsupported = None

    def given(self) -> list[str]:
        return [name for name in ASKED if getattr(self, _attribute(name)) is not None]


ASKED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
# Fields by which vLLM asked earlier, and SGLang asks: which of `structured_outputs` they mean.
GUIDED = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")} | {
    "regex": "regex",
    "ebnf": "grammar",
}


def _attribute(name: str) -> str:
    return f"{name}_" if name in ("json", "schema") else name


class StructuredFields(Fields):
    """What the text must be, in the names of OpenAI, vLLM and SGLang. At most one says so."""

    response_format: ResponseFormat | None = Field(
        None,
        description="The text is a JSON object, or fits a JSON schema. The model draws only tokens "
        'that may follow. It ends when it is complete; `finish_reason` "length" means that it '
        "is not.",
    )
    structured_outputs: StructuredOutputs | None = Field(None, description="As in vLLM.")
    guided_json: SchemaOrText | None = Field(None, description="`structured_outputs.json`")
    guided_regex: Regex | None = Field(None, description="`structured_outputs.regex`")
    guided_choice: Choices | None = Field(None, description="`structured_outputs.choice`")
    guided_grammar: GrammarText | None = Field(None, description="`structured_outputs.grammar`")
    guided_decoding_backend: NotUsed[str] = Field(
        None, description=HARMLESS + "there is one backend."
    )
    regex: Regex | None = Field(None, description="`structured_outputs.regex`")
    ebnf: GrammarText | None = Field(None, description="`structured_outputs.grammar`")

    @model_validator(mode="after")
    def _one_structure(self) -> StructuredFields:
        names = ("response_format", "structured_outputs", *GUIDED)
        given = [name for name in names if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type == "text":
            given.remove("response_format")
        if len(given) > 1:
            raise broken_rule(given[1], f"{given[1]} is not allowed with {given[0]}")
        parts = self.structured_outputs
        if parts is not None and len(parts.given()) != 1:
            wanted = ", ".join(ASKED)
            raise broken_rule("structured_outputs", f"structured_outputs needs one of {wanted}")
        return self


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar that was not checked yet, and the field that asks for it."""

    grammar: Grammar
    field: str
    value: Any
    owner: str = ""  # in a sentence about the value: whose it is
    parts: tuple[AskedGrammar, ...] = ()  # asked one by one to say which of them cannot be used


def json_rule(schema: Schema, lenient: bool) -> str:
    """JSON in llguidance's Lark. Where it is lenient, keywords that are not supported mean
    nothing."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def asked_grammar(body: StructuredFields) -> AskedGrammar | None:
    """What the text must match; None: any text will do.

    Raises:
        ApiError: 400 for a value that is no schema, or too long.
    """
    form = body.response_format
    if form is not None and form.type != "text":
        return _of_format(form)
    if body.structured_outputs is not None:
        (name,) = body.structured_outputs.given()
        value = getattr(body.structured_outputs, _attribute(name))
        return _asked(name, f"structured_outputs.{name}", value)
    for field, name in GUIDED.items():
        if getattr(body, field) is not None:
            return _asked(name, field, getattr(body, field))
    return None


def _of_format(form: ResponseFormat) -> AskedGrammar:
    if form.schema_ is not None:
        return _asked("json", "response_format.schema", form.schema_)
    if form.type == "json_object":
        return _asked("json_object", "response_format", True)
    if form.json_schema is not None:
        return _asked("json", "response_format.json_schema.schema", form.json_schema.schema_)
    parts = form.model_dump(by_alias=True, include={"structures", "triggers", "format"})
    known = {name: part for name, part in parts.items() if part is not None}
    return _asked("structural_tag", "response_format", known)


def _asked(name: str, field: str, value: Any) -> AskedGrammar:
    kind, write = WRITERS[name]
    try:
        if isinstance(value, str) and name in OBJECTS:
            value = object_in(value, field)
        return AskedGrammar(Grammar(kind, write(value)), field, value)
    except ValueError as error:
        raise bad_value(field, _shown(value), str(error)) from error


def _shown(value: Any) -> Any:
    return value.model_dump(by_alias=True) if isinstance(value, Fields) else value


def _schema(value: Schema) -> str:
    check_keywords(value)
    text = json.dumps(value)
    if len(text) > MAX_SCHEMA:
        raise ValueError(f"it must have at most {MAX_SCHEMA} characters, and has {len(text)}")
    return text


def _choice(values: list[str]) -> str:
    return "start: " + " | ".join(map(json.dumps, values))


def _tags(content: Schema) -> str:
    if "format" in content:
        given = {name: part for name, part in content.items() if name != "type"}
        text = lark_of(_validated(Holder, given).format)
        if len(text) > MAX_TAGS:
            raise ValueError(f"its grammar must have at most {MAX_TAGS} characters")
        return text
    value = _validated(StructuralTag, content)
    tags = []
    for one in value.structures:
        check_keywords(one.schema_)
        schema = {**one.schema_, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        trigger = value.trigger_of(one) or ""
        tags.append(StructTag(trigger=trigger, begin=one.begin, grammar=schema, end=one.end))
    return StructTag.to_grammar(tags, assume_special=False)


def _validated(model: type[Content], content: Schema) -> Content:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError(str(validation_error(error, content))) from error


def _same(value: str) -> str:
    return value


OBJECTS = ("json", "structural_tag")  # the value may be the JSON of an object, as a string
WRITERS: dict[str, tuple[GrammarKind, Callable[[Any], str]]] = {
    "json": ("json_schema", _schema),
    "json_object": ("json_schema", lambda _: ANY_OBJECT),
    "regex": ("regex", _same),
    "choice": ("lark", _choice),
    "grammar": ("lark", _same),
    "structural_tag": ("lark", _tags),
}


def checked_grammar(context: ServerContext, info: EngineInfo, asked: AskedGrammar) -> Grammar:
    """The grammar for the engine; it may wait for a process that compiles it.

    Raises:
        ApiError: 400; the grammar cannot be used.
    """
    for part in (asked, *asked.parts):
        is_schema = part.grammar.kind == "json_schema"
        endless = endless_reference(json.loads(part.grammar.text) if is_schema else part.value)
        if endless is not None:
            raise refusal(part, f'its "$ref" {json.dumps(endless)} leads back to itself')
    try:
        return context.grammars.check(asked.grammar, info)
    except ValueError as error:
        raise _of_a_part(context, info, asked) or refusal(asked, str(error)) from error


def _of_a_part(context: ServerContext, info: EngineInfo, asked: AskedGrammar) -> ApiError | None:
    """The refusal of the first part that cannot be used by itself, if one is found in time."""
    until = time.monotonic() + SEARCH
    for part in asked.parts:
        if time.monotonic() > until:
            break
        try:
            context.grammars.check(part.grammar, info)
        except ValueError as error:
            return refusal(part, str(error))
    return None


def refusal(asked: AskedGrammar, reason: str) -> ApiError:
    """400 that says why, and what is allowed instead, where that can be said."""
    unknown = UNKNOWN_KEYS.search(reason)
    if unknown is not None:
        reason = f"the keyword {unknown[1]} is not supported; supported are {KEYWORDS}"
    elif (form := UNKNOWN_FORMAT.search(reason)) is not None:
        reason = f"the format {json.dumps(form[1])} is not supported; supported are {FORMATS}"
    elif ONE_OF in reason:
        reason = ONE_OF_NEEDS
    return bad_value(asked.field, _shown(asked.value), asked.owner + reason)
