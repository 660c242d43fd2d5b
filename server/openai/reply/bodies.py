"""The responses of the API as msgspec structs; their JSON is the wire format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]
# As in vLLM: which of the request's `stop` strings or `stop_token_ids` ended the text; null if none
# did. Chunks have it where they have a finish reason.
StopReason = str | int | UnsetType | None
# Values on request, as in vLLM: where they were not asked for, whole replies have null, because
# clients of vLLM read them without looking whether they are there, and chunks leave them out.
TokenIds = list[int] | UnsetType | None


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Drafted tokens: accepted ones are in the completion, rejected ones are not. Where the client
    sent a prediction, they are those drafted from it."""

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of all choices; in a chunk, those so far."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET  # known at the end
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class SpeculationStats(msgspec.Struct, frozen=True, kw_only=True):
    """Draft statistics of all choices."""

    drafted: int  # tokens
    accepted: int
    # Mean tokens emitted per step with a draft, the target's own included; null without drafts.
    acceptance_length: float | None


class SpeculativeDecoding(msgspec.Struct, frozen=True, kw_only=True):
    """Draft statistics of all choices, as vLLM reports them and load tools read them."""

    mean_acceptance_length: float  # tokens per step with a draft, the target's own included
    draft_acceptance_rate: float
    acceptance_histogram: list[int]  # at [n]: steps with a draft of which n tokens were accepted
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int  # tokens of the largest draft


class ReplyMetrics(msgspec.Struct, frozen=True, kw_only=True):
    speculative_decoding: SpeculativeDecoding


Origin = Literal["bonus", "draft", "lookup", "grammar"]


class TracedToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token of the text. `bonus`: the model's own, after the accepted drafts of its step; the
    others were drafted by the draft head, by lookup or by the grammar, at `depth` 1, 2, ..."""

    token: str
    bytes: list[int]
    origin: Origin
    depth: int  # 0 for the bonus token


class TracedNode(msgspec.Struct, frozen=True, kw_only=True):
    """A drafted token. `parent` is 0 for the newest token of the text, i for the i-th of these
    nodes, -1 for a node that could not be used."""

    token: str
    parent: int


class TracedRound(msgspec.Struct, frozen=True, kw_only=True):
    """The draft tree that one step verified; after the accepted nodes comes the bonus token."""

    source: Origin | None  # null: nothing was drafted
    nodes: Sequence[TracedNode]  # numbered from 1 on
    accepted: Sequence[int]  # numbers of accepted nodes, a path from the root


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens and steps since the last chunk. A token comes with its text, which may be after its
    step; one that no text shows has none, as with log-probabilities."""

    tokens: list[TracedToken]
    rounds: list[TracedRound]


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class PromptTokenScore(msgspec.Struct, frozen=True, kw_only=True):
    logprob: float
    rank: int | None  # 1: the likeliest; null where it is not among the alternatives
    decoded_token: str


# For each prompt token its own score and those of alternatives, by token id; null for the first.
PromptScores = list[dict[str, PromptTokenScore] | None]


class ReplyFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET  # in the first delta of a call
    arguments: str  # JSON as the model wrote it, which a token limit may have cut


class ReplyToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool. In deltas it is `index` that tells the calls apart."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: ReplyFunction


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None  # null where there is none beside calls or reasoning
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ReplyToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatReply
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: StopReason = None
    token_ids: TokenIds = None
    trace: Trace | UnsetType = UNSET


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What replies and chunks of all routes have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    speculation: SpeculationStats | UnsetType = UNSET
    metrics: ReplyMetrics | UnsetType = UNSET  # with `speculation`, if there were drafts


class ChatCompletion(Reply, frozen=True, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    service_tier: Literal["default"] = "default"
    prompt_token_ids: TokenIds = None
    prompt_logprobs: PromptScores | None = None
    kv_transfer_params: None = None


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ReplyToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: StopReason = UNSET
    token_ids: TokenIds = UNSET
    trace: Trace | UnsetType = UNSET


class ChatChunk(Reply, frozen=True, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    service_tier: Literal["default"] = "default"
    prompt_token_ids: TokenIds = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Lists with one entry per token. The first token of an echoed prompt has no logprob."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Also the choice of a chunk, where `finish_reason` is null until the last one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = UNSET
    token_ids: TokenIds = UNSET
    trace: Trace | UnsetType = UNSET
    prompt_token_ids: TokenIds = UNSET
    prompt_logprobs: PromptScores | UnsetType | None = UNSET


class Completion(Reply, frozen=True, kw_only=True):
    """Also the chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    kv_transfer_params: UnsetType | None = UNSET


class ModelPermission(msgspec.Struct, frozen=True, kw_only=True):
    """What older OpenAI clients read: every client may do the same."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str  # where the model comes from: a name of the hub, a directory or a file
    parent: str | None = None
    max_model_len: int | None  # null while the engine is loading
    permission: list[ModelPermission]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None  # on request: the text of each token


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """As a `tokenizer_config.json`: what renders and reads prompts far from the server."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]  # all that are special
    vocab_size: int
    model_max_length: int
    chat_template: str | None
