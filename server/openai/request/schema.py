"""The requests of the API, field by field. Every field is honoured, or described as having no
effect, or refused; an unknown field is an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.request.body import Fields, NotUsed
from server.http.request.validation import broken_rule
from server.openai.request.conversation import ChatMessage, RenderingFields
from server.openai.request.fields import (
    HARMLESS,
    MAX_BEST_OF,
    MAX_INT,
    AllowedTokenIds,
    BadWords,
    CacheSalt,
    Fraction,
    LogitBias,
    LogprobTokenIds,
    NumLogprobs,
    OldChoice,
    OldFunctions,
    OnlyFalse,
    Penalty,
    Prediction,
    Prompts,
    Seed,
    SpeculationOptions,
    Stop,
    StreamRequestOptions,
    Suffix,
    Temperature,
    TokenId,
    TopP,
    TruncationSide,
    Unsupported,
)
from server.openai.request.structured import StructuredFields
from server.openai.request.tools import (
    ChosenTools,
    Tool,
    ToolChoice,
    check_choice,
    chosen,
    must_call,
)


class SamplingFields(StructuredFields):
    """What chat and text completions have in common."""

    model: str
    n: int | None = Field(None, ge=1, le=MAX_INT, description="Choices per prompt. Default 1.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_INT, description="Default: the rest of the context."
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_INT, description="The older name; `max_completion_tokens` wins."
    )
    temperature: Temperature = None
    top_p: TopP = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0, -1 (default): off.")
    min_p: Fraction | None = Field(None, description="Default 0: off.")
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Default 1: off.")
    logit_bias: LogitBias = None
    seed: Seed = None
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None = Field(
        None, description="Token ids that end the text, besides the model's own."
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Keep the stop string at the end of the text. Default false."
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_INT,
        description="Only tokens after the first `min_tokens` may end the text, as an end token or "
        "by completing a stop string. Default 0.",
    )
    ignore_eos: bool | None = Field(None, description="Continue after the model's end token.")
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text. Default true."
    )
    priority: int | None = Field(
        None,
        ge=-(2**31),
        le=2**31 - 1,
        description="Lower runs first. Default 0. The server may limit how urgent a "
        "request may be.",
    )
    cache_salt: CacheSalt = None
    speculation: SpeculationOptions | None = Field(
        None, description="Speculative decoding. Changes speed only, never the text."
    )
    stream: bool | None = Field(None, description="Send the text as it comes. Default false.")
    stream_options: StreamRequestOptions | None = Field(None, description="Needs `stream`.")
    add_special_tokens: bool | None = Field(
        None,
        description="Put BOS in front of a prompt that is text, unless it begins with it. Default: "
        "true for completions; false for chat, where the chat template writes it.",
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=MAX_INT,
        description="Use only so many of the last tokens of each prompt; 0: all; -1: as many as "
        "leave room for the output. Default: all.",
    )
    truncation_side: TruncationSide = None
    return_token_ids: bool | None = Field(
        None, description="Add `token_ids` to choices, and `prompt_token_ids`. Default false."
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Write tokens in log-probabilities as "token_id:50". Default false.'
    )
    prompt_logprobs: NumLogprobs = Field(
        None,
        description="As in vLLM: the log-probability of each prompt token, and so many "
        "alternatives, by token id. Not with `stream`.",
    )
    logprob_token_ids: LogprobTokenIds = None
    allowed_token_ids: AllowedTokenIds = None
    bad_words: BadWords = None
    use_beam_search: OnlyFalse | None = Field(None, description="Only false.")
    length_penalty: float | None = Field(
        None, ge=1, le=1, description="Only 1: it is for beam search."
    )
    spaces_between_special_tokens: NotUsed[bool] = Field(
        None, description=HARMLESS + "the tokenizer decides about spaces."
    )
    request_id: NotUsed[str] = Field(
        None, description=HARMLESS + "the header x-request-id sets the id."
    )
    user: NotUsed[str] = Field(None, description=HARMLESS + "end users are not distinguished.")
    service_tier: NotUsed[str] = Field(None, description=HARMLESS + "there is one tier.")
    store: NotUsed[bool] = Field(None, description=HARMLESS + "no completion is ever stored.")
    metadata: NotUsed[dict[str, Any]] = Field(
        None, description=HARMLESS + "it labels stored completions, and none is stored."
    )
    safety_identifier: NotUsed[str] = Field(
        None, description=HARMLESS + "end users are not distinguished."
    )
    prompt_cache_key: str | None = Field(
        None,
        description="Names a session. Where there are several engines, requests of one session go "
        "to the same one; equal prefixes are found without a key.",
    )
    prompt_cache_retention: NotUsed[str] = Field(
        None, description=HARMLESS + "prefixes stay cached as long as there is room."
    )

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise broken_rule(
                "stream_options", "stream_options is only allowed when stream is true"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_scored_in_one_piece(self) -> SamplingFields:
        if self.prompt_logprobs is not None and self.stream:
            raise broken_rule(
                "prompt_logprobs", "prompt_logprobs is only allowed when stream is false"
            )
        return self

    def not_used(self) -> Iterator[str]:
        if self.truncation_side is not None and not self.truncate_prompt_tokens:
            yield "truncation_side"

    @property
    def num_choices(self) -> int:
        """Per prompt."""
        return self.n or 1

    @property
    def num_sequences(self) -> int:
        """Choices of all prompts."""
        return self.num_choices

    @property
    def token_limit(self) -> int | None:
        """Most output tokens of a choice; None: the route decides."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def max_draft_nodes(self) -> int | None:
        """Per choice and step; None: the client sets no limit."""
        if self.speculation is None:
            return None
        return self.speculation.max_nodes if self.speculation.enabled else 0

    @property
    def min_draft_nodes(self) -> int:
        """Per choice and step, whether or not they pay."""
        return 0 if self.speculation is None else self.speculation.min_nodes

    @property
    def include_draft_stats(self) -> bool:
        return self.speculation is not None and self.speculation.stats

    @property
    def include_trace(self) -> bool:
        return self.speculation is not None and self.speculation.trace


class ChatRequest(SamplingFields, RenderingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    logprobs: bool | None = Field(
        None,
        description="Log-probability of each output token under the model, before temperature and "
        "the other sampling parameters but among the tokens that the text may have. Minus infinity "
        "is written as -9999.",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Alternatives per token; needs `logprobs`."
    )
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, min_length=1)] | None = (
        Field(None, description='Only ["text"].')
    )
    include_reasoning: bool | None = Field(
        None, description="False: the reply has no reasoning. Default true."
    )
    reasoning_effort: NotUsed[str] = Field(
        None, description=HARMLESS + "the model is asked as the chat template says."
    )
    verbosity: NotUsed[str] = Field(
        None, description=HARMLESS + "the model is asked as the chat template says."
    )
    prediction: Prediction | None = Field(
        None,
        description="A text that the answer is expected to repeat, perhaps with changes, such as a "
        "file to be edited. It is drafted where it goes on as the answer did so far, which changes "
        "speed only, never the text. The details of `usage` then count its tokens.",
    )
    prompt_cache_options: NotUsed[dict[str, Any]] = Field(
        None, description=HARMLESS + "prefixes stay cached as long as there is room."
    )
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(
        None, description="False: an answer ends after its first call. Default true."
    )
    functions: OldFunctions = None
    function_call: OldChoice = None
    echo: bool | None = Field(
        None,
        description="As in vLLM: the reply begins with the text of the last message, if that is of "
        "the assistant.",
    )
    audio: Unsupported = None
    moderation: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise broken_rule("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        if self.logprob_token_ids and not self.logprobs:
            raise broken_rule(
                "logprob_token_ids", "logprob_token_ids is only allowed when logprobs is true"
            )
        return self

    @model_validator(mode="after")
    def _tools_fit_together(self) -> ChatRequest:
        check_choice(self.tools or (), self.tool_choice)
        if self.functions and self.function_call != "none":
            raise broken_rule(
                "functions",
                f"functions is an array of {len(self.functions)}: send them as tools, or send "
                '"function_call": "none"',
            )
        return self

    def not_used(self) -> Iterator[str]:
        yield from SamplingFields.not_used(self)
        if self.echo and not self.echoed:
            yield "echo"
        if self.prediction is not None and self.max_draft_nodes == 0:
            yield "prediction"
        if self.functions:
            yield "functions"
        if self.tools and self.tool_choice == "none":
            yield "tools"
        if self.parallel_tool_calls is not None and not self.shown_tools:
            yield "parallel_tool_calls"

    @property
    def echoed(self) -> str:
        """The text with which the reply begins."""
        last = self.messages[-1]
        return last.text if self.echo and last.role == "assistant" else ""

    @property
    def shown_tools(self) -> Sequence[Tool]:
        return chosen(self.tools or (), self.tool_choice)

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls."""
        return must_call(self.tool_choice)

    @property
    def names_a_tool(self) -> bool:
        """Whether one function is named that must be called."""
        return isinstance(self.tool_choice, ChosenTools) and self.tool_choice.type == "function"

    @property
    def most_calls(self) -> int | None:
        """After so many calls an answer ends; None: there is no limit."""
        return 1 if self.parallel_tool_calls is False or self.names_a_tool else None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per output token; None when no logprobs were asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompts = Field(
        description="A text, several texts, token ids, or several lists of token ids."
    )
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_INT, description="Default 16. 0 with `echo` scores a prompt."
    )
    max_completion_tokens: int | None = Field(
        None, ge=0, le=MAX_INT, description="Another name of it, as chat has; it wins."
    )
    logprobs: NumLogprobs = None
    echo: bool | None = Field(None, description="Put the prompt in front of the text.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_BEST_OF,
        description="Write so many texts per prompt and return the `n` whose tokens have the "
        "highest mean log-probability. At least `n`; more only without `stream`. Default `n`.",
    )
    suffix: Suffix = None

    @model_validator(mode="after")
    def _token_ids_need_logprobs(self) -> CompletionRequest:
        if self.logprob_token_ids and self.logprobs is None:
            raise broken_rule(
                "logprob_token_ids", "logprob_token_ids is only allowed when logprobs is a number"
            )
        return self

    @model_validator(mode="after")
    def _best_of_covers_n(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.num_returned:
            least = f"it must be at least n, which is {self.num_returned}"
            raise broken_rule("best_of", f"best_of is {self.best_of}: {least}")
        if self.chooses and self.stream:
            raise broken_rule("best_of", "best_of must not be more than n when stream is true")
        return self

    @property
    def num_returned(self) -> int:
        """Choices of a prompt in the reply."""
        return self.n or 1

    @property
    def num_choices(self) -> int:
        return self.best_of or self.num_returned

    @property
    def chooses(self) -> bool:
        """Whether more choices are written than returned."""
        return self.num_choices > self.num_returned

    @property
    def num_sequences(self) -> int:
        return self.num_choices * len(self.prompts())

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, whichever of the four forms was sent."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def names_of_prompts(self) -> list[str]:
        """How errors about each prompt name it."""
        prompts = self.prompts()
        if prompts is not self.prompt:
            return ["prompt"]
        return [f"prompt[{index}]" for index in range(len(prompts))]


class TokenizeRequest(RenderingFields):
    """POST /tokenize. Exactly one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Put BOS in front. Default: true for a prompt, false for messages."
    )
    return_token_strs: bool | None = Field(
        None, description="Add `token_strs`, the text of each token. Default false."
    )

    @model_validator(mode="after")
    def _one_of_prompt_and_messages(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise broken_rule("prompt", "exactly one of prompt and messages is required")
        needs = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        for name in needs:
            if self.messages is None and getattr(self, name):
                raise broken_rule(name, f"{name} is only allowed with messages")
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
