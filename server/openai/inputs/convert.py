"""Converts a checked request to the inputs of the engine and the text stream."""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from engine.messages import EngineInfo
from engine.request import SamplingParams
from server.http.context import ServerContext
from server.http.errors import ApiError, bad_value, context_overflow, invalid
from server.openai.inputs.echo import Echo, echo_of
from server.openai.inputs.tool_grammar import forced_syntax
from server.openai.request.conversation import render_chat
from server.openai.request.schema import ChatRequest, CompletionRequest, SamplingFields
from server.openai.request.structured import asked_grammar
from server.text.answer.calls import CallRules
from server.text.answer.forms import Reading
from server.text.letters import Rendered
from server.text.output.stream import StreamOptions
from server.text.tokens.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
RANDOM_SEED = -1  # as in other servers: draw one
PROBED = 8  # characters for each token of the context: texts rarely have so many
PIECE = 64 * 1024  # characters that are tokenised at a time, to see whether a text is too long
CUT = 64  # tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt; `text` is None where the client sent token ids."""

    token_ids: list[int]
    text: str | None
    param: str  # the field that it comes from
    echo: Echo | None = None  # set when the prompt is to precede its completion
    prediction: list[int] = field(default_factory=list)  # tokens that the client expects
    bad_words: tuple[tuple[int, ...], ...] = ()  # see `SamplingParams`


def encode(
    context: ServerContext,
    info: EngineInfo,
    prompt: Rendered,
    add_special_tokens: bool,
    param: str,
    *,
    may_be_long: bool = False,
) -> list[int]:
    """Token ids of a prompt, with one BOS token where the text begins with it and
    `add_special_tokens` would put another in front.

    Raises:
        ApiError: 400; the text is not valid Unicode, or exceeds the context. The latter is found
            without tokenising a whole text that is much too long, unless it `may_be_long`.
    """
    if not may_be_long:
        _check_length(context.tokenizer, info.max_model_len, prompt.text, param)
    special = add_special_tokens and not _begins_with_bos(context.tokenizer, prompt.text)
    try:
        return context.tokenizer.encode_rendered(prompt, special)
    except ValueError as error:
        raise invalid(f"{param}: {error}", param) from error


def _check_length(tokenizer: Tokenizer, max_model_len: int, text: str, param: str) -> None:
    """ApiError 400 for a text of more tokens than the context, as far as this is seen quickly."""
    if len(text) <= max_model_len:
        return
    fewest = tokenizer.fewest_tokens(text)
    if fewest <= max_model_len and len(text) > PROBED * max_model_len:
        fewest = _fewest_of_begin(tokenizer, max_model_len, text)
    if fewest > max_model_len:
        raise _prompt_overflow(max_model_len, f"at least {fewest} tokens", param)


def _fewest_of_begin(tokenizer: Tokenizer, max_model_len: int, text: str) -> int:
    """A number of tokens that the text has at least, from as much of its begin as shows that it is
    too long: some tokens stand for so many spaces that the whole would take very long."""
    found = 0
    for begin in range(0, len(text), PIECE):
        # Where a text is cut may change the tokens around it, but not their number by much.
        found += max(len(tokenizer.encode(text[begin : begin + PIECE], False)) - CUT, 0)
        if found > max_model_len:
            break
    return found


def _prompt_overflow(max_model_len: int, length: str, param: str) -> ApiError:
    requested = f"your prompt has {length}. Please reduce the length of {param}."
    return context_overflow(max_model_len, requested, param)


def _begins_with_bos(tokenizer: Tokenizer, text: str) -> bool:
    bos = tokenizer.special_tokens.get("bos_token")
    return bool(bos) and tokenizer.bos_token_id is not None and text.startswith(str(bos))


def chat_prompts(context: ServerContext, info: EngineInfo, body: ChatRequest) -> list[Prompt]:
    """Render and tokenise a conversation. Templates write the special tokens themselves."""
    prompt = render_chat(context.renderer, context.answer_form, body.messages, body)
    special = bool(body.add_special_tokens)
    token_ids = encode(context, info, prompt, special, "messages", may_be_long=_cuts(body))
    kept = _kept_tokens(token_ids, body, info)
    predicted, bad = _predicted(context, info, body), _bad_words(context.tokenizer, body)
    return [Prompt(kept, prompt.plain(), "messages", prediction=predicted, bad_words=bad)]


def _bad_words(tokenizer: Tokenizer, body: SamplingFields) -> tuple[tuple[int, ...], ...]:
    """The tokens of each, as text that begins with it has them and as other text has them."""
    found: dict[tuple[int, ...], None] = {}
    for at, word in enumerate(body.bad_words or ()):
        bare = word.lstrip(" ") or word
        try:
            found |= {tuple(tokenizer.encode(text, False)): None for text in (bare, " " + bare)}
        except ValueError as error:
            raise invalid(f"bad_words[{at}]: {error}", f"bad_words[{at}]") from error
    return tuple(token_ids for token_ids in found if token_ids)


def _predicted(context: ServerContext, info: EngineInfo, body: ChatRequest) -> list[int]:
    """Tokens of the predicted answer, as far as an answer can have them."""
    if body.prediction is None:
        return []
    text = body.prediction.text[: PROBED * info.max_model_len]
    token_ids = encode(context, info, Rendered(text), False, "prediction", may_be_long=True)
    return token_ids[: info.max_model_len]


def chat_reading(context: ServerContext, body: ChatRequest) -> Reading:
    """How the answers to a conversation are read."""
    names = frozenset(tool.name for tool in body.shown_tools)
    syntax, thinks = context.answer_form.syntax, context.answer_form.thinks
    if syntax is None or not names:
        return Reading(thinks=thinks)
    if body.must_call or asked_grammar(body) is not None:  # then it is written as a grammar says
        syntax, thinks = forced_syntax(syntax, body.shown_tools), False
    hidden = frozenset[str]()
    if body.skip_special_tokens is not False:
        hidden = context.tokenizer.special_texts.intersection(syntax.marks)
    return Reading(syntax, CallRules(names, hidden, body.most_calls, body.must_call), thinks)


def _cuts(body: SamplingFields) -> bool:
    """Whether only the last tokens of a prompt are wanted."""
    return body.truncate_prompt_tokens not in (None, 0)


def _kept_tokens(token_ids: list[int], body: SamplingFields, info: EngineInfo) -> list[int]:
    """The tokens of a prompt that are to be used."""
    limit = body.truncate_prompt_tokens
    if limit is None or limit == 0:
        return token_ids
    if limit == -1:
        limit = max(info.max_model_len - _or_one(body.token_limit), 1)
    return token_ids[:limit] if body.truncation_side == "right" else token_ids[-limit:]


def _or_one(asked: int | None) -> int:
    return 1 if asked is None else asked


def completion_prompts(
    context: ServerContext, info: EngineInfo, body: CompletionRequest
) -> list[Prompt]:
    """Tokenise the prompts, or check the token ids that were sent; add echoes if requested."""
    prompts: Sequence[str | list[int]] = body.prompts()
    found = [
        _completion_prompt(context, info, body, prompt, param)
        for prompt, param in zip(prompts, body.names_of_prompts(), strict=True)
    ]
    bad = _bad_words(context.tokenizer, body)
    return [replace(prompt, bad_words=bad) for prompt in found] if bad else found


def _completion_prompt(
    context: ServerContext,
    info: EngineInfo,
    body: CompletionRequest,
    prompt: str | list[int],
    param: str,
) -> Prompt:
    text: str | None = None
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        text, rendered = prompt, Rendered(prompt)
        token_ids = encode(context, info, rendered, special, param, may_be_long=_cuts(body))
    else:
        check_token_ids(prompt, info, param)
        token_ids = prompt
    kept = _kept_tokens(token_ids, body, info)
    if len(kept) < len(token_ids):
        token_ids, text = kept, None
    if not body.echo or len(token_ids) > info.max_model_len:  # too long: `budget` refuses it
        return Prompt(token_ids, text, param)
    skips = body.skip_special_tokens is not False
    return Prompt(token_ids, text, param, echo_of(context.tokenizer, token_ids, text, skips))


def check_token_ids(token_ids: Sequence[int], info: EngineInfo, param: str) -> None:
    """ApiError 400 for ids that the model has no embedding for."""
    if max(token_ids, default=0) >= info.vocab_size:
        index = next(at for at, token_id in enumerate(token_ids) if token_id >= info.vocab_size)
        raise _unknown_token(f"{param}[{index}]", token_ids[index], info)


def _unknown_token(param: str, token_id: int, info: EngineInfo) -> ApiError:
    return bad_value(param, token_id, f"token ids must be below {info.vocab_size}")


def budget(prompt: Prompt, asked: int | None, default: int | None, info: EngineInfo) -> int:
    """Limit of output tokens of one choice: `asked`, else `default` or the rest of the context.

    Raises:
        ApiError: 400 for an empty prompt, and when prompt and output exceed the context.
    """
    num_prompt, max_model_len = len(prompt.token_ids), info.max_model_len
    if num_prompt == 0:
        must = f"{prompt.param} must have at least one token"
        raise invalid(f"The prompt is empty: {must}", prompt.param)
    room = max_model_len - num_prompt
    if asked and asked > room:
        raise context_overflow(
            max_model_len,
            f"you requested {num_prompt + asked} tokens ({num_prompt} in the prompt, {asked} in "
            "the completion). Please reduce the length of either.",
            prompt.param,
        )
    if _or_one(asked) > room:
        no_room = "" if asked == 0 else ", which leaves no room for an answer"
        raise _prompt_overflow(max_model_len, f"{num_prompt} tokens{no_room}", prompt.param)
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def chat_params(body: ChatRequest, prompt: Prompt, info: EngineInfo) -> SamplingParams:
    max_tokens = budget(prompt, body.token_limit, None, info)
    params = _sampling_params(body, max_tokens, body.num_logprobs, body.prompt_logprobs, info)
    return msgspec.structs.replace(params, bad_words=prompt.bad_words)


def completion_params(body: CompletionRequest, prompt: Prompt, info: EngineInfo) -> SamplingParams:
    max_tokens = budget(prompt, body.token_limit, DEFAULT_COMPLETION_TOKENS, info)
    echoed = body.logprobs if body.echo else None
    asked = [count for count in (echoed, body.prompt_logprobs) if count is not None]
    logprobs = 0 if body.chooses and body.logprobs is None else body.logprobs
    params = _sampling_params(body, max_tokens, logprobs, max(asked, default=None), info)
    return msgspec.structs.replace(params, bad_words=prompt.bad_words)


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
    check_token_ids(body.logprob_token_ids or (), info, "logprob_token_ids")
    check_token_ids(body.allowed_token_ids or (), info, "allowed_token_ids")
    named = tuple(dict.fromkeys(body.logprob_token_ids or ()))
    only_likeliest = body.top_p == 0
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=0.0 if only_likeliest else _or(body.temperature, 1.0),
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if only_likeliest else _or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        seed=_seed(body.seed),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, info),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        ignore_eos=bool(body.ignore_eos),
        logprobs=0 if named else logprobs,
        logprob_token_ids=named,
        allowed_token_ids=tuple(dict.fromkeys(body.allowed_token_ids or ())),
        prompt_logprobs=prompt_logprobs,
    )


def _seed(asked: int | None) -> int:
    return secrets.randbits(64) if asked is None or asked == RANDOM_SEED else asked % 2**64


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _logit_bias(entries: dict[str, float], info: EngineInfo) -> dict[int, float]:
    bias = {int(name): float(value) for name, value in entries.items()}
    for name in entries:
        if int(name) >= info.vocab_size:
            raise _unknown_token(f"logit_bias.{name}", int(name), info)
    return bias


def with_seed_of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one choice: choices of a prompt differ only in their seed. The first has
    the seed of the request; the others a hash, so that requests with seeds close to each other have
    no texts in common."""
    if choice == 0:
        return params
    packed = struct.pack("<QQ", params.seed, choice)
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return msgspec.structs.replace(params, seed=int.from_bytes(digest, "little"))


def cache_salt(label: str, asked: str | None) -> str:
    """The engine's salt for a caller with this label ("": any) and for the client's own salt."""
    return f"{label}/{asked or ''}" if label or asked else ""


def stream_options(body: SamplingFields, info: EngineInfo, marks: frozenset[str]) -> StreamOptions:
    """How the tokens of each choice become text; `marks` are texts that it must show."""
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
        shown_specials=marks,
    )
