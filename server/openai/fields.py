"""Types of request fields: their allowed values, and errors for what is not supported."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.json_schema import WithJsonSchema

from engine.step.shape import MAX_NODES
from server.http.body import Fields

HARMLESS = "Accepted without effect: "
MAX_INT = 2**63 - 1


def _refuse(value: Any) -> None:
    if value is not None:
        raise ValueError("not supported yet; leave it out or send null")


def _refuse_entries(value: Any) -> None:
    if value is not None and value != []:
        raise ValueError("not supported yet; leave it out, or send null or an empty array")


def _only_text(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema"):
        raise ValueError('not supported yet; only {"type": "text"} is')
    return value


def _only_none(value: Any) -> Any:
    if value not in (None, "none"):
        raise ValueError('not supported yet; only "none" is')
    return value


def _of_one_kind(value: Any) -> Any:
    """Without this check, the error for a mixed list would name one branch of the union."""
    if isinstance(value, list) and len({type(element) for element in value}) > 1:
        raise ValueError(
            "all elements must be of one kind: strings, token ids, or lists of token ids"
        )
    return value


class TextFormat(Fields):
    type: Literal["text"]


Unsupported = Annotated[
    None, BeforeValidator(_refuse), WithJsonSchema({"type": "null"}), Field(description="Refused.")
]
UnsupportedList = Annotated[
    None,
    BeforeValidator(_refuse_entries),
    WithJsonSchema({"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]}),
    Field(description="Refused, unless it is empty."),
]
OnlyNone = Annotated[
    Literal["none"] | None,
    BeforeValidator(_only_none),
    Field(description='Only "none", as tools are not supported yet.'),
]
ResponseFormat = Annotated[
    TextFormat | None,
    BeforeValidator(_only_text),
    Field(description='Only {"type": "text"}; structured output is refused for now.'),
]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Prompts = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(fail_fast=True, min_length=1)]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)],
    BeforeValidator(_of_one_kind),
]
Temperature = Annotated[
    float | None, Field(ge=0, le=2, description="Below 1e-5 it is greedy. Default 1.")
]
Fraction = Annotated[float, Field(ge=0, le=1)]
TopP = Annotated[float | None, Field(gt=0, le=1, description="Default 1: off.")]
Penalty = Annotated[float | None, Field(ge=-2, le=2, description="Default 0: off.")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Bias] | None,
    Field(
        max_length=1024, description="Token id, written as a string -> what is added to its logit."
    ),
]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=4)] | None,
    Field(description="Up to 4 strings that end the text; they are not part of it."),
]
Seed = Annotated[
    int | None,
    Field(
        ge=-(2**63),
        le=2**64 - 1,
        description="Any 64-bit integer; the same request with the same seed gives the same text. "
        "The first choice uses the seed, choice i of n a hash of the seed and i. Drawn at random "
        "when absent or -1.",
    ),
]
CacheSalt = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=256,
        description="The prompt cache is shared only between requests with the same salt.",
    ),
]


class StreamRequestOptions(Fields):
    """What a stream contains besides the choices."""

    include_usage: bool | None = Field(
        None, description="Send token counts in a last chunk without choices."
    )
    include_obfuscation: Literal[False] | None = Field(
        None, description="Only false: chunks are never padded."
    )


class SpeculationOptions(Fields):
    """Settings of speculative decoding. They change speed only, never the text."""

    enabled: bool = Field(True, description="False: nothing is drafted for this request.")
    max_nodes: int | None = Field(
        None,
        ge=0,
        le=MAX_NODES - 1,
        description="Most draft tokens verified per step and choice; 0: nothing is drafted. "
        "Default: the server decides.",
    )
    stats: bool = Field(
        False,
        description="Report draft statistics as `speculation`, in the reply or in the last chunk "
        "of a stream, which has no choices.",
    )
