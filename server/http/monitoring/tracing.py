"""One OpenTelemetry span for each request, sent to `server.otlp_endpoint`; off without one.

Names of attributes are those of the semantic conventions for HTTP and GenAI, and vLLM's
`gen_ai.latency.*` for times, which the conventions do not have yet.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from server.version import version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from starlette.types import Scope

TRACES_PATH = "/v1/traces"  # of a collector, where the endpoint names no path
PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
LAST_SPANS = 2.0  # seconds in which a server that ends may send what it still has
INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"

Value = str | bool | int | float | Sequence[str]
# The trace of the request that the present task serves, for the lines of the log.
CURRENT_TRACE: ContextVar[str | None] = ContextVar("aerie_trace", default=None)


def trace_of(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The trace id of a W3C `traceparent` header; None without a valid one."""
    found = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
    parent = PARENT.match(found[0]) if len(found) == 1 else None
    return None if parent is None else parent[1]


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to a collector, as OTLP over HTTP.

    Raises:
        ValueError: the endpoint is no such address, or the packages are missing.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(
            f"server.otlp_endpoint is {endpoint!r}; it must be an address such as "
            "http://collector:4318, without a password (OTEL_EXPORTER_OTLP_HEADERS may hold one)"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError(f"server.otlp_endpoint needs OpenTelemetry: {INSTALL}") from error
    if parts.path in ("", "/"):
        endpoint = endpoint.rstrip("/") + TRACES_PATH
    return OTLPSpanExporter(endpoint=endpoint)


class Tracing:
    """Starts the spans of requests, and sends them in batches from a thread of its own.

    The SDK's own variables (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER) hold.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        own = Resource({"service.name": "aerie", "service.version": version()})
        resource = own.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("aerie", version())
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope) -> RequestSpan:
        """The span of a request that has just arrived, within the trace of its `traceparent`."""
        from opentelemetry.trace import SpanKind

        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path']}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.path": scope["path"]},
        )
        return RequestSpan(span, f"{span.get_span_context().trace_id:032x}")

    def flush(self) -> None:
        """Send what has ended; returns when it is sent, or cannot be."""
        self._provider.force_flush(int(LAST_SPANS * 1000))

    def close(self) -> None:
        """Send what is left, for at most `LAST_SPANS`: a collector that does not answer must not
        keep the server from ending."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(LAST_SPANS)


@dataclass(slots=True)
class RequestSpan:
    """The span of one request."""

    span: Span
    trace_id: str  # 32 hexadecimal digits

    def describe(self, name: str, attributes: Mapping[str, Value | None]) -> None:
        """What the request turned out to ask for and to get; None is left out."""
        self.span.update_name(name)
        known = {key: value for key, value in attributes.items() if value is not None}
        self.span.set_attributes(known)

    def mark(self, event: str, seconds: float) -> None:
        """Something that happened at `seconds` of time.time()."""
        self.span.add_event(event, timestamp=int(seconds * 1e9))

    def end(self, status: int | None, error: str | None) -> None:
        """`status` None: nothing was sent. An error of the client is no error of the span, as the
        conventions want it."""
        from opentelemetry.trace import Status, StatusCode

        if status is not None:
            self.span.set_attribute("http.response.status_code", status)
        if error is not None:
            failed = status is None or not 400 <= status < 500
            self.span.set_attribute("error.type", str(status) if status else error)
            if failed:
                self.span.set_status(Status(StatusCode.ERROR, error))
        self.span.end()


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Tracing to this endpoint; None without one. ValueError as `otlp_exporter`."""
    return None if endpoint is None else Tracing(otlp_exporter(endpoint))
