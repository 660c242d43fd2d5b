"""From the checked body of a request to the inputs of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from engine.messages import EngineInfo
from engine.request import SamplingParams
from server.http.admission.lanes import LONG
from server.http.context import ServerContext, context_of
from server.http.request.body import body_size
from server.openai.inputs.convert import Prompt, chat_params, chat_prompts
from server.openai.inputs.defaults import limited
from server.openai.inputs.tool_grammar import chat_grammar
from server.openai.request.schema import ChatRequest, SamplingFields
from server.openai.request.structured import AskedGrammar, checked_grammar

Asked = TypeVar("Asked", bound=SamplingFields)


@dataclass(frozen=True, slots=True)
class Conversion(Generic[Asked]):
    """How the bodies of a route become inputs of the engine."""

    prompts: Callable[[ServerContext, EngineInfo, Asked], list[Prompt]]  # runs off the event loop
    params: Callable[[Asked, Prompt, EngineInfo], SamplingParams]
    grammar: Callable[[ServerContext, Asked], AskedGrammar | None]

    async def inputs(
        self, http: HttpRequest, info: EngineInfo, body: Asked
    ) -> tuple[list[Prompt], list[SamplingParams]]:
        """The prompts, and how to sample after each.

        Raises:
            ApiError: 400; the engine could not do what is asked.
        """
        context = context_of(http)
        prompts = await context.in_pool(body_size(http), self.prompts, context, info, body)
        defaults = context.info.defaults
        params = [limited(self.params(body, prompt, info), body, defaults) for prompt in prompts]
        return prompts, await _with_grammar(context, info, self.grammar(context, body), params)


async def _with_grammar(
    context: ServerContext,
    info: EngineInfo,
    asked: AskedGrammar | None,
    params: list[SamplingParams],
) -> list[SamplingParams]:
    """The parameters of each prompt with the grammar that the request asks for. A new one is
    compiled by another process, for which the threads for long work wait."""
    if asked is None:
        return params
    grammar = context.grammars.known(asked.grammar)
    if grammar is None:
        grammar = await context.in_pool(LONG, checked_grammar, context, info, asked)
    return [msgspec.structs.replace(each, grammar=grammar) for each in params]


CHAT: Conversion[ChatRequest] = Conversion(chat_prompts, chat_params, chat_grammar)
