"""Types of request fields: their allowed values, and errors for what is not supported."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.json_schema import WithJsonSchema

from engine.step.shape import MAX_NODES
from server.http.errors import shorten
from server.http.request.body import Fields, NotUsed
from server.http.request.validation import broken_rule

HARMLESS = "Accepted without effect: "
MAX_INT = 2**63 - 1
MAX_STOPS = 32
MAX_STOP = 1024
MAX_LOGPROBS = 20
MAX_PARTS = 1024
MAX_BEST_OF = 20
MAX_BIASES = 1024
MAX_NAMED = 128
MAX_BAD_WORDS = 1024


def _refuse(value: Any) -> None:
    if value is not None:
        raise ValueError("not supported yet; leave it out or send null")


def _only(allowed: bool) -> BeforeValidator:
    """A literal alone takes 0 and 1, too, which Python takes for false and true."""

    def check(value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise ValueError(f"it must be {str(allowed).lower()}")
        return value

    return BeforeValidator(check)


def _no_choice(value: Any) -> Any:
    if value not in (None, "none", "auto"):
        raise ValueError('not supported; send tools and tool_choice, or "none"')
    return value


def _without_empty(value: Any) -> Any:
    """Clients send empty strings for no stop string; they could never end a text."""
    if isinstance(value, list):
        return [entry for entry in value if entry != ""]
    return None if value == "" else value


def _no_suffix(value: Any) -> None:
    _refuse(_without_empty(value))


def _false_is_null(value: Any) -> Any:
    return None if value is False else value


def _different_ids(value: dict[str, float]) -> dict[str, float]:
    """Refuse two keys that name the same token: one of them would have no effect."""
    names: dict[int, str] = {}
    for name in value:
        other = names.setdefault(int(name), name)
        if other != name:
            raise ValueError(f"its keys {shorten(other)} and {shorten(name)} are the same token id")
    return value


def _token_key(name: str) -> str:
    if not (name.isascii() and name.isdigit() and len(name) <= 10):
        raise ValueError('a key must be a token id, written as a string such as "50"')
    return name


def _of_one_kind(value: Any) -> Any:
    """Without this check, the error for a mixed list would name one branch of the union."""
    if isinstance(value, list) and len({type(element) for element in value}) > 1:
        raise ValueError(
            "all elements must be of one kind: strings, token ids, or lists of token ids"
        )
    return value


OnlyFalse = Annotated[Literal[False], _only(False)]
OnlyTrue = Annotated[Literal[True], _only(True)]
Unsupported = Annotated[
    None, BeforeValidator(_refuse), WithJsonSchema({"type": "null"}), Field(description="Refused.")
]
Suffix = Annotated[
    None,
    BeforeValidator(_no_suffix),
    WithJsonSchema({"anyOf": [{"type": "string", "maxLength": 0}, {"type": "null"}]}),
    Field(description="Refused, unless it is empty."),
]
OldFunctions = Annotated[
    list[dict[str, Any]] | None,
    Field(
        description='Only with `function_call` "none", and then without effect: it is the older '
        "form of `tools`."
    ),
]
OldChoice = Annotated[
    Literal["none", "auto"] | None,
    BeforeValidator(_no_choice),
    Field(description='Only "none", or "auto" without functions: the older `tool_choice`.'),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
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
TopP = Annotated[
    float | None, Field(ge=0, le=1, description="0: always the likeliest token. Default 1: off.")
]
Penalty = Annotated[float | None, Field(ge=-2, le=2, description="Default 0: off.")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    Annotated[
        dict[
            Annotated[
                str,
                AfterValidator(_token_key),
                WithJsonSchema({"type": "string", "pattern": "^[0-9]{1,10}$"}),
            ],
            Bias,
        ],
        Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
        AfterValidator(_different_ids),
    ]
    | None,
    Field(description="Token id, written as a string -> what is added to its logit."),
]
MaybeEmpty = Annotated[str, Field(max_length=MAX_STOP)]
Stop = Annotated[
    MaybeEmpty | Annotated[list[MaybeEmpty], Field(fail_fast=True, max_length=MAX_STOPS)] | None,
    AfterValidator(_without_empty),
    Field(
        description=f"Up to {MAX_STOPS} strings that end the text; they are not part of it. "
        "Empty strings are left out."
    ),
]
NumLogprobs = Annotated[
    int | None,
    Field(
        ge=0,
        le=MAX_LOGPROBS,
        description="Alternatives per token; log-probabilities are those under the model, before "
        "the sampling parameters but among the tokens that the text may have. Minus infinity is "
        "written as -9999. False: none.",
    ),
    BeforeValidator(_false_is_null),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
                {"type": "boolean", "const": False},
                {"type": "null"},
            ]
        }
    ),
]
TruncationSide = Annotated[
    Literal["left", "right"] | None,
    Field(
        description="Where `truncate_prompt_tokens` cuts: left (default) keeps the last tokens of "
        "a prompt, right the first."
    ),
]
LogprobTokenIds = Annotated[
    Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_NAMED)] | None,
    Field(
        description="As in vLLM: the alternatives of each output token are these, in this order, "
        "instead of the likeliest ones. Needs `logprobs`."
    ),
]
AllowedTokenIds = Annotated[
    Annotated[list[TokenId], Field(fail_fast=True, min_length=1)] | None,
    Field(
        description="As in vLLM: no other tokens are drawn. Without the model's end token among "
        "them, the text ends by its length or a stop string."
    ),
]
BadWord = Annotated[str, Field(min_length=1, max_length=1024)]
BadWords = Annotated[
    Annotated[list[BadWord], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None,
    Field(
        description="As in vLLM: the tokens of these words, with and without a space before them, "
        "are not drawn one after the other. Other tokens may spell the same text."
    ),
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


class PredictedPart(Fields):
    type: Literal["text"]
    text: str


class Prediction(Fields):
    """What the answer is expected to be."""

    type: Literal["content"]
    content: str | Annotated[list[PredictedPart], Field(fail_fast=True, max_length=MAX_PARTS)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamRequestOptions(Fields):
    """What a stream contains besides the choices."""

    include_usage: bool | None = Field(
        None, description="Send token counts in a last chunk without choices."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Send the token counts so far in every chunk."
    )
    include_obfuscation: NotUsed[bool] = Field(
        None, description=HARMLESS + "chunks are never padded."
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
    min_nodes: int = Field(
        0,
        ge=0,
        le=MAX_NODES - 1,
        description="Least tokens that the draft head drafts per step and choice, even if the "
        "server expects that to be slower: to see what speculation does, or to measure "
        "it. At most `max_nodes`, and 0 without `enabled`.",
    )
    stats: bool = Field(
        False,
        description="Report draft statistics as `speculation`, and as vLLM does in "
        "`metrics.speculative_decoding`, in the reply or in the last chunk of a stream, which has "
        "no choices.",
    )
    trace: bool = Field(
        False,
        description="Add `trace` to choices: which tokens were drafted, by what and at which "
        "depth, and the draft tree of every step with the accepted path.",
    )

    @model_validator(mode="after")
    def _the_least_is_no_more_than_the_most(self) -> SpeculationOptions:
        most = self.max_nodes if self.enabled else 0
        if most is not None and self.min_nodes > most:
            why = "speculation.max_nodes" if self.enabled else "speculation.enabled is false"
            raise broken_rule(
                "min_nodes",
                f"speculation.min_nodes is {self.min_nodes}, more than {most} ({why})",
            )
        return self


class UntracedSpeculation(SpeculationOptions):
    """The same, where no choice could carry a trace."""

    trace: OnlyFalse = Field(False, description="Only false.")
