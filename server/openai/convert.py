"""Converts a checked request to the inputs of the engine and the text stream."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.messages import EngineInfo
from engine.request import SamplingParams
from server.http.context import ServerContext
from server.http.errors import bad_value, context_overflow, invalid
from server.openai.logprobs import Echo, echo_of
from server.openai.schema import ChatMessage, ChatRequest, CompletionRequest, SamplingFields
from server.text.letters import Rendered
from server.text.rendering import Renderer
from server.text.stream import StreamOptions

DEFAULT_COMPLETION_TOKENS = 16
PROBED = 8  # characters for each token of the context: texts rarely have so many
CUT = 64  # tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt; `text` is None where the client sent token ids."""

    token_ids: list[int]
    text: str | None
    echo: Echo | None = None  # set when the prompt is to precede its completion


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """A conversation for the chat template, which takes texts and lists of parts."""
    rendered = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content: Any = message.content
        if not isinstance(content, str):
            content = [{"type": part.type, "text": part.text} for part in content]
        entry = {"role": role, "content": content}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        rendered.append(entry)
    return rendered


def render_chat(
    renderer: Renderer,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool | None,
    kwargs: dict[str, object] | None,
) -> Rendered:
    """The prompt of a conversation. ApiError 400 when the template refuses it."""
    opens = add_generation_prompt is not False
    try:
        return renderer.render(template_messages(messages), opens, kwargs or {})
    except ValueError as error:
        raise invalid(str(error), "messages", "chat_template_error") from error


def encode(
    context: ServerContext,
    info: EngineInfo,
    prompt: Rendered,
    add_special_tokens: bool,
    param: str,
) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ApiError: 400; the text is not valid Unicode, or exceeds the context. The latter is found
            without tokenising a whole text that is much too long.
    """
    text, max_model_len = prompt.text, info.max_model_len
    if len(text) > max_model_len:
        fewest = context.tokenizer.fewest_tokens(text)
        if fewest <= max_model_len and len(text) > PROBED * max_model_len:
            # Where a text is cut may change the last tokens, but not their number by much.
            begin = context.tokenizer.encode(text[: PROBED * max_model_len], False)
            fewest = len(begin) - CUT
        if fewest > max_model_len:
            raise context_overflow(
                max_model_len, f"your prompt has at least {fewest} tokens", param
            )
    try:
        return context.tokenizer.encode_rendered(prompt, add_special_tokens)
    except ValueError as error:
        raise invalid(f"{param}: {error}", param) from error


def chat_prompts(context: ServerContext, info: EngineInfo, body: ChatRequest) -> list[Prompt]:
    """Render and tokenise a conversation. Templates write the special tokens themselves."""
    prompt = render_chat(
        context.renderer, body.messages, body.add_generation_prompt, body.chat_template_kwargs
    )
    return [Prompt(encode(context, info, prompt, False, "messages"), prompt.plain())]


def completion_prompts(
    context: ServerContext, info: EngineInfo, body: CompletionRequest
) -> list[Prompt]:
    """Tokenise the prompts, or check the token ids that were sent; add echoes if requested."""
    return [_completion_prompt(context, info, body, prompt) for prompt in body.prompts()]


def _completion_prompt(
    context: ServerContext, info: EngineInfo, body: CompletionRequest, prompt: str | list[int]
) -> Prompt:
    if isinstance(prompt, str):
        token_ids, text = encode(context, info, Rendered(prompt), True, "prompt"), prompt
    else:
        check_token_ids(prompt, info, "prompt")
        token_ids, text = prompt, None
    if not body.echo or len(token_ids) > info.max_model_len:  # too long: `budget` refuses it
        return Prompt(token_ids, text)
    skips = body.skip_special_tokens is not False
    return Prompt(token_ids, text, echo_of(context.tokenizer, token_ids, text, skips))


def check_token_ids(token_ids: Sequence[int], info: EngineInfo, param: str) -> None:
    """ApiError 400 for ids that the model has no embedding for."""
    largest = max(token_ids, default=0)
    if largest >= info.vocab_size:
        raise bad_value(param, largest, f"token ids must be below {info.vocab_size}")


def budget(
    prompt: Prompt, asked: int | None, default: int | None, info: EngineInfo, param: str
) -> int:
    """Limit of output tokens of one choice: `asked`, else `default` or the rest of the context.

    Raises:
        ApiError: 400 for an empty prompt, and when prompt and output exceed the context.
    """
    num_prompt, max_model_len = len(prompt.token_ids), info.max_model_len
    if num_prompt == 0:
        raise invalid("The prompt is empty: it must have at least one token", param)
    room = max_model_len - num_prompt
    wanted = 1 if asked is None else asked
    if wanted > room:
        raise context_overflow(
            max_model_len,
            f"you requested {num_prompt + wanted} tokens ({num_prompt} in the prompt, {wanted} in "
            "the completion). Please reduce the length of either.",
            param,
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def chat_params(body: ChatRequest, prompt: Prompt, info: EngineInfo) -> SamplingParams:
    max_tokens = budget(prompt, body.token_limit, None, info, "messages")
    return _sampling_params(body, max_tokens, body.num_logprobs, None, info)


def completion_params(body: CompletionRequest, prompt: Prompt, info: EngineInfo) -> SamplingParams:
    max_tokens = budget(prompt, body.max_tokens, DEFAULT_COMPLETION_TOKENS, info, "prompt")
    scored = body.logprobs if body.echo else None
    return _sampling_params(body, max_tokens, body.logprobs, scored, info)


def _sampling_params(
    body: SamplingFields,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    info: EngineInfo,
) -> SamplingParams:
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        allowed = f"at most the tokens that may be generated, {max_tokens}"
        raise bad_value("min_tokens", min_tokens, allowed)
    check_token_ids(body.stop_token_ids or (), info, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(body.temperature, 1.0),
        top_k=max(body.top_k or 0, 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, info),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _logit_bias(entries: dict[str, float], info: EngineInfo) -> dict[int, float]:
    bias = {int(name): float(value) for name, value in entries.items()}
    check_token_ids(list(bias), info, "logit_bias")
    return bias


def with_seed_of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one choice: choices of a prompt differ only in their seed."""
    return msgspec.structs.replace(params, seed=(params.seed + choice) % 2**64)


def stream_options(body: SamplingFields, info: EngineInfo) -> StreamOptions:
    """How the tokens of each choice become text."""
    ends = set(body.stop_token_ids or ())
    if not body.ignore_eos:
        ends |= set(info.eos_token_ids)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return StreamOptions(
        stop=stop,
        stop_token_ids=frozenset(ends),
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
    )
