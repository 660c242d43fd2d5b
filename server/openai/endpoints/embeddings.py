"""POST /v1/embeddings: prompts as vectors."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.messages import EngineInfo
from engine.request import Pooling, SamplingParams
from server.http.context import context_of
from server.http.errors import bad_value, invalid
from server.http.request.body import Fields, NotUsed, body_size, read_body
from server.http.routes.openapi import Routes, operation
from server.openai.inputs.conversion import Conversion
from server.openai.inputs.convert import Prompt, completion_params, completion_prompts
from server.openai.reply.answer import Task, respond
from server.openai.reply.choice import ChoiceDelta
from server.openai.reply.generation import Generation
from server.openai.request.fields import HARMLESS, MAX_INT, CacheSalt, Prompts, TruncationSide
from server.openai.request.schema import CompletionRequest
from server.openai.request.wording import worded
from server.text.answer.forms import Reading

SAME = (
    "model",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "priority",
    "cache_salt",
)
SMALLEST = 1e-12  # a shorter vector has no direction

Vector = NDArray[np.float32]


class EmbeddingsRequest(Fields):
    """POST /v1/embeddings."""

    model: str
    input: Prompts = Field(
        description="A text, several texts, token ids, or several lists of token ids."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of float32 numbers, little-endian. Default float."
    )
    dimensions: Annotated[int, Field(ge=1, le=MAX_INT)] | None = Field(
        None, description="Use only so many leading numbers of each vector. Default: all."
    )
    pooling: Pooling | None = Field(
        None,
        description="last: the final hidden state of the last token; mean: the mean over all "
        "tokens. Default: model.pooling of the server.",
    )
    normalize: bool | None = Field(
        None, description="Vectors have length 1. Default true. False: as the model gives them."
    )
    add_special_tokens: bool | None = Field(
        None, description="Put BOS in front of a text, unless it begins with it. Default true."
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=MAX_INT,
        description="Use only so many of the last tokens of each input; 0: all; -1: as many as the "
        "context has room for. Default: all.",
    )
    truncation_side: TruncationSide = None
    priority: int | None = Field(
        None, ge=-(2**31), le=2**31 - 1, description="Lower runs first. Default 0."
    )
    cache_salt: CacheSalt = None
    user: NotUsed[str] = Field(None, description=HARMLESS + "end users are not distinguished.")

    @property
    def num_inputs(self) -> int:
        is_one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return 1 if is_one else len(self.input)


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


router = APIRouter()
ROUTES = Routes(router, (EmbeddingsRequest,), (EmbeddingList,))


@router.post("/v1/embeddings", **operation(EmbeddingsRequest, EmbeddingList))
async def create_embeddings(http: HttpRequest) -> Response:
    """Vectors of one or several inputs: final hidden states of the model."""
    context = context_of(http)
    context.admission.check_open()
    request = await read_body(http, EmbeddingsRequest)
    _check_sizes(request, context.config.server.max_embeddings, context.engine_info())
    pooling = request.pooling or context.config.model.pooling
    with worded([("prompt", "input")]):
        body = await context.in_pool(body_size(http), _as_completion, request)
        return await respond(http, _task(request, pooling), body)


def _as_completion(request: EmbeddingsRequest) -> CompletionRequest:
    """A request for no more text after the same prompts."""
    fields = {name: getattr(request, name) for name in SAME}
    return CompletionRequest.model_validate({**fields, "prompt": request.input, "max_tokens": 0})


def _check_sizes(request: EmbeddingsRequest, most: int, info: EngineInfo) -> None:
    if request.num_inputs > most:
        raise invalid(
            f"input is an array of {request.num_inputs}: at most {most} inputs per request "
            "(server.max_embeddings)",
            "input",
        )
    if request.dimensions is not None and request.dimensions > info.hidden_size:
        allowed = f"it must be at most {info.hidden_size}, as vectors of this model"
        raise bad_value("dimensions", request.dimensions, allowed)


class EmbeddingWriter:
    """Implements `Writer`: the states of all prompts as vectors. They are never streamed."""

    def __init__(
        self, request: EmbeddingsRequest, generation: Generation, _: CompletionRequest
    ) -> None:
        self._request = request
        self._generation = generation
        self._found: dict[int, Embedding] = {}

    def events(self, delta: ChoiceDelta) -> bytes:  # noqa: ARG002
        return b""

    def last_events(self) -> bytes:
        return b""

    def add(self, delta: ChoiceDelta) -> None:
        if delta.pooled is not None:
            vector = shaped(delta.pooled, self._request.dimensions, self._request.normalize)
            as_text = self._request.encoding_format == "base64"
            shown: Any = _in_base64(vector) if as_text else vector.tolist()
            encoded = msgspec.Raw(msgspec.json.encode(shown))  # now: all at the end would take long
            embedding = Embedding(index=delta.index, embedding=cast("Any", encoded))
            self._found[delta.index] = embedding

    def whole(self) -> EmbeddingList:
        count = self._generation.usage_so_far().prompt_tokens
        return EmbeddingList(
            data=[self._found[index] for index in sorted(self._found)],
            model=self._generation.model,
            usage=EmbeddingsUsage(prompt_tokens=count, total_tokens=count),
        )


def shaped(state: bytes, dimensions: int | None, normalize: bool | None) -> Vector:
    """A state, float32 [H], as the vector that was asked for."""
    vector: Vector = np.frombuffer(state, np.float32)[:dimensions]
    if normalize is False:
        return vector
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / np.float32(max(length, SMALLEST))).astype(np.float32)


def _in_base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _task(request: EmbeddingsRequest, pooling: Pooling) -> Task[CompletionRequest]:
    def params(body: CompletionRequest, prompt: Prompt, info: EngineInfo) -> SamplingParams:
        return msgspec.structs.replace(completion_params(body, prompt, info), pooling=pooling)

    def writer(generation: Generation, body: CompletionRequest) -> EmbeddingWriter:
        return EmbeddingWriter(request, generation, body)

    return Task(
        CompletionRequest,
        "embd-",
        Conversion(completion_prompts, params, lambda *_: None),
        writer,
        lambda *_: Reading(),
        most_sequences="max_embeddings",
    )
