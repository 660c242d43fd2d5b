"""What the routes of one application share, through `app.state`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from starlette.requests import Request as HttpRequest

from configs.resolve import HostConfig, with_sizes
from engine.messages import EngineInfo
from server.http.admission.lanes import Lanes
from server.http.admission.queue import Admission
from server.http.admission.state import ServerState
from server.http.engine_client import EngineClient
from server.http.errors import model_not_found
from server.http.middleware.callers import Callers
from server.http.middleware.keys import KeyRing
from server.http.monitoring.learning import Learning
from server.http.monitoring.metrics import Metrics
from server.http.monitoring.tracing import Tracing
from server.http.reply.background import Background
from server.http.reply.kept import KeptAnswers
from server.text.answer.forms import AnswerForm
from server.text.generation_config import SamplingDefaults
from server.text.grammars import GrammarChecker
from server.text.template.rendering import Renderer
from server.text.tokens.tokenizer import Tokenizer
from server.version import version

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Facts of this server that never change while it runs."""

    model_name: str  # what clients call the model
    created: int  # seconds since the epoch
    fingerprint: str  # changes with every setting that may change the text of a seeded request
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)  # of the model

    @classmethod
    def from_config(
        cls, config: HostConfig, defaults: SamplingDefaults | None = None
    ) -> ServerInfo:
        defaults = defaults or SamplingDefaults()
        settings = config.model.model_dump_json() + config.kernels.model_dump_json()
        digest = hashlib.sha256(f"{version()} {settings} {defaults}".encode()).hexdigest()
        return cls(config.model.served_name, int(time.time()), f"fp_{digest[:12]}", defaults)


@dataclass(frozen=True, slots=True)
class ServerContext:
    """Everything a route needs. There is one per application."""

    config: HostConfig
    client: EngineClient
    tokenizer: Tokenizer
    renderer: Renderer
    answer_form: AnswerForm
    grammars: GrammarChecker
    info: ServerInfo
    state: ServerState
    admission: Admission
    callers: Callers
    metrics: Metrics
    lanes: Lanes
    kept: KeptAnswers
    background: Background
    admin_keys: KeyRing
    tracing: Tracing | None
    learning: Learning | None = None  # None: the head does not learn

    async def in_pool(
        self,
        size: int,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run a function on another thread; `size` is about the bytes it is for."""
        return await self.lanes.run(size, lambda: function(*args, **kwargs))

    def engine_info(self) -> EngineInfo:
        """Facts of the running engine. ApiError 503 without one."""
        info = self.client.info
        if info is None:
            raise self.admission.engine_not_ready()
        return info

    def resolved_config(self) -> HostConfig:
        """The configuration with what the engine settled when it loaded the model."""
        info = self.client.info
        if info is None:
            return self.config
        sizes = {"max_model_len": info.max_model_len, "num_blocks": info.num_blocks}
        return with_sizes(self.config, **sizes)

    def check_model(self, name: str | None) -> None:
        """ApiError 404 unless `name` is the served model or None."""
        if name is not None and name != self.info.model_name:
            raise model_not_found(name)


def context_of(request: HttpRequest) -> ServerContext:
    """The context of the application that serves this request."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context
