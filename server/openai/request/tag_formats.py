"""Structural tags in the form of xgrammar: formats in each other, as a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from engine.grammar.compiler import WHITESPACE
from server.http.request.body import Fields

MAX_PARTS = 64  # elements, tags or triggers of one format
ANY = r"(.|\n)*"
Text = Annotated[str, Field(min_length=1, max_length=1024)]


class ConstString(Fields):
    type: Literal["const_string"]
    value: Text


class JsonSchema(Fields):
    type: Literal["json_schema"]
    json_schema: dict[str, Any]
    style: Literal["json"] = "json"


class Regex(Fields):
    type: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1, max_length=4096)]


class AnyText(Fields):
    """Free text, up to what follows it."""

    type: Literal["any_text"]


class Sequential(Fields):
    type: Literal["sequence"]
    elements: Formats


class Either(Fields):
    type: Literal["or"]
    elements: Formats


class Tag(Fields):
    """`content` between `begin` and `end`, or one of several ends."""

    type: Literal["tag"] = "tag"
    begin: Text
    content: Format
    end: str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]

    @property
    def ends(self) -> list[str]:
        return [self.end] if isinstance(self.end, str) else self.end


class TriggeredTags(Fields):
    """Free text; after a trigger, one of the tags that begin with it."""

    type: Literal["triggered_tags"]
    triggers: Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
    tags: Tags
    at_least_one: bool = False
    stop_after_first: bool = False


class TagsWithSeparator(Fields):
    """Tags, without other text between them than the separator."""

    type: Literal["tags_with_separator"]
    tags: Tags
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format: TypeAlias = Annotated[
    ConstString
    | JsonSchema
    | Regex
    | AnyText
    | Sequential
    | Either
    | Tag
    | TriggeredTags
    | TagsWithSeparator,
    Field(discriminator="type"),
]
Formats: TypeAlias = Annotated[
    list[Format], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)
]
Tags: TypeAlias = Annotated[list[Tag], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]


class Holder(Fields):
    """What a request sends."""

    format: Format


for model in (Sequential, Either, Tag, TriggeredTags, TagsWithSeparator, Holder):
    model.model_rebuild()


def lark_of(form: Format) -> str:
    """The grammar of a format, in llguidance's Lark.

    Raises:
        ValueError: free text is followed by what does not end it, or a tag has no trigger.
    """
    writer = _Writer()
    start = writer.write(form, ())
    return "\n".join([f"start: {start}", f"TEXT: /{ANY}/", *writer.rules])


class _Writer:
    """Collects rules. Free text ends lazily: where the first text comes that may follow it."""

    def __init__(self) -> None:
        self.rules: list[str] = []

    def write(self, form: Format, ends: Sequence[str]) -> str:
        """An expression for a format and one of the texts that end it; () or "": it just ends."""
        match form:
            case AnyText():
                return self._free(ends)
            case TriggeredTags():
                return self._triggered(form, ends)
            case Sequential():
                return self._sequence(form.elements, ends)
            case Either():
                return self._any_of(self.write(each, ends) for each in form.elements)
        return f"{self._closed(form)} {_one_of(ends)}".rstrip()

    def _closed(self, form: Format) -> str:
        """An expression for a format that says by itself where it ends."""
        match form:
            case ConstString():
                return json.dumps(form.value)
            case Regex():
                return f"/{_for_lark(form.pattern)}/"
            case JsonSchema():
                check_keywords(form.json_schema)
                schema = {**form.json_schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
                return self._rule(f"%json {json.dumps(schema)}")
            case Tag():
                return self._tag(form)
        assert isinstance(form, TagsWithSeparator)
        tags = self._any_of(self._tag(tag) for tag in form.tags)
        if not form.stop_after_first:
            between = f"{json.dumps(form.separator)} " if form.separator else ""
            tags = f"{tags} ({between}{tags})*"
        return f"({tags})" if form.at_least_one else f"({tags})?"

    def _sequence(self, elements: Sequence[Format], ends: Sequence[str]) -> str:
        first, *rest = elements
        if not rest:
            return self.write(first, ends)
        if not isinstance(first, AnyText | TriggeredTags):
            return f"{self.write(first, ())} {self._sequence(rest, ends)}"
        following, *others = rest
        if isinstance(following, ConstString):
            begin = self.write(first, [following.value])
            return f"{begin} {self._sequence(others, ends)}" if others else self._end(begin, ends)
        if isinstance(following, Tag):
            begin = self.write(first, [following.begin])
            tag = f"{begin} {self.write(following.content, following.ends)}"
            return f"{tag} {self._sequence(others, ends)}" if others else self._end(tag, ends)
        raise ValueError(f"{first.type} must be followed by const_string or tag, or be the last")

    def _end(self, before: str, ends: Sequence[str]) -> str:
        return f"{before} {_one_of(ends)}".rstrip()

    def _tag(self, tag: Tag) -> str:
        return f"{json.dumps(tag.begin)} {self.write(tag.content, tag.ends)}"

    def _triggered(self, form: TriggeredTags, ends: Sequence[str]) -> str:
        found = []
        for tag in form.tags:
            trigger = next((one for one in form.triggers if tag.begin.startswith(one)), None)
            if trigger is None:
                raise ValueError(
                    f"the tag that begins with {json.dumps(tag.begin)} must begin with one of the "
                    "triggers"
                )
            rest = tag.begin[len(trigger) :]
            begin = f"{self._free([trigger])} {json.dumps(rest) if rest else ''}".rstrip()
            found.append(self._rule(f"{begin} {self.write(tag.content, tag.ends)}"))
        tags = self._any_of(found)
        if form.stop_after_first:
            ended = self._end(tags, ends)
            return ended if form.at_least_one else self._any_of((ended, self._free(ends)))
        return f"{tags}{'+' if form.at_least_one else '*'} {self._free(ends)}"

    def _free(self, ends: Sequence[str]) -> str:
        if not any(ends):
            return "TEXT"
        name = f"r{len(self.rules)}"
        texts = "|".join(map(_literal, filter(None, ends)))
        self.rules.append(f"{name}[lazy]: /{ANY}({texts})/")
        return name

    def _rule(self, text: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}: {text}")
        return name

    def _any_of(self, expressions: Any) -> str:
        return f"({' | '.join(expressions)})"


def _one_of(texts: Sequence[str]) -> str:
    if not any(texts):
        return ""
    found = f"({' | '.join(json.dumps(text) for text in texts if text)})"
    return found if all(texts) else f"{found}?"


def _for_lark(pattern: str) -> str:
    """A regular expression as it stands between slashes."""
    return re.sub(r"\\?/", r"\\/", pattern).replace("\n", r"\n")


def _literal(text: str) -> str:
    """A regular expression for exactly this text, as it stands between slashes."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~/-])", r"\\\1", text).replace("\n", r"\n")


def check_keywords(schema: dict[str, Any]) -> None:
    """llguidance takes its own settings from a schema; they are ours to choose. ValueError."""
    if "x-guidance" in schema:
        raise ValueError('the keyword "x-guidance" is not supported')
