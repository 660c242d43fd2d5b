"""POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.messages import EngineInfo
from server.http.context import ServerContext, context_of
from server.http.errors import invalid
from server.http.reply.sse import StructResponse
from server.http.request.body import body_size, read_body
from server.http.routes.openapi import Routes, operation
from server.openai.inputs.convert import check_token_ids, encode
from server.openai.reply.bodies import Detokenized, Tokenized, TokenizerInfo
from server.openai.request.conversation import render_chat
from server.openai.request.schema import DetokenizeRequest, TokenizeRequest
from server.text.letters import Rendered

router = APIRouter()
ROUTES = Routes(
    router, (TokenizeRequest, DetokenizeRequest), (Tokenized, Detokenized, TokenizerInfo)
)


@router.post("/tokenize", **operation(TokenizeRequest, Tokenized))
async def tokenize(http: HttpRequest) -> Response:
    """Token ids of a prompt or of a rendered conversation."""
    context = context_of(http)
    info = context.engine_info()
    body = await read_body(http, TokenizeRequest)
    context.check_model(body.model)
    token_ids, texts = await context.in_pool(body_size(http), _tokens, context, info, body)
    return StructResponse(
        Tokenized(
            count=len(token_ids),
            max_model_len=info.max_model_len,
            tokens=token_ids,
            token_strs=texts,
        )
    )


@router.post("/detokenize", **operation(DetokenizeRequest, Detokenized))
async def detokenize(http: HttpRequest) -> Response:
    """The text of token ids, special tokens included."""
    context = context_of(http)
    info = context.engine_info()
    body = await read_body(http, DetokenizeRequest)
    context.check_model(body.model)
    check_token_ids(body.tokens, info, "tokens")
    text = await context.in_pool(body_size(http), _text, context, body.tokens)
    return StructResponse(Detokenized(prompt=text))


@router.get("/tokenizer_info", **operation(None, TokenizerInfo))
async def tokenizer_info(http: HttpRequest) -> Response:
    """The chat template and the special tokens. They are no secret: /tokenize shows what the
    template writes."""
    context = context_of(http)
    tokenizer, named = context.tokenizer, context.tokenizer.special_tokens
    return StructResponse(
        TokenizerInfo(
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            unk_token=named.get("unk_token"),
            additional_special_tokens=sorted(tokenizer.special_texts),
            vocab_size=tokenizer.vocab_size,
            model_max_length=context.engine_info().max_model_len,
            chat_template=context.renderer.template.source,
        )
    )


def _tokens(
    context: ServerContext, info: EngineInfo, body: TokenizeRequest
) -> tuple[list[int], list[str] | None]:
    """The ids, and the texts if they are wanted."""
    token_ids = _token_ids(context, info, body)
    if not body.return_token_strs:
        return token_ids, None
    return token_ids, [context.tokenizer.token_text(token_id) for token_id in token_ids]


def _token_ids(context: ServerContext, info: EngineInfo, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        assert body.prompt is not None  # a rule of the schema
        special = body.add_special_tokens is not False
        return encode(context, info, Rendered(body.prompt), special, "prompt")
    prompt = render_chat(context.renderer, context.answer_form, body.messages, body)
    return encode(context, info, prompt, bool(body.add_special_tokens), "messages")


def _text(context: ServerContext, token_ids: list[int]) -> str:
    try:
        return context.tokenizer.decode(token_ids, skip_special_tokens=False)
    except ValueError as error:
        raise invalid(f"tokens: {error}", "tokens") from error
