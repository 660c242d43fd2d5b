"""Spans of requests, with OpenTelemetry's exporter in memory, and trace ids in the log."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.messages import Finished, Tokens
from engine.request import FinishReason, Request
from server.http.monitoring import tracing
from server.http.monitoring.tracing import trace_of
from server.process.setup.logs import JsonFormatter
from server.text.tokens.tokenizer import Tokenizer
from tests.support.engines.scripted_engine import Script, fail
from tests.support.servers.http_server import Server
from tests.support.waiting import DEADLINE

pytest.importorskip("opentelemetry.sdk", reason="the extra [otel] is missing")
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
WAITED, PREFILLED = 0.25, 0.5  # seconds
Spans = Callable[[], list[ReadableSpan]]


@pytest.fixture
def traced(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Server, Spans]]]:
    """Makes servers whose spans can be read."""
    servers: list[Server] = []
    monkeypatch.setattr(tracing, "LAST_SPANS", DEADLINE)

    def make(script: Script | None = None, **options: Any) -> tuple[Server, Spans]:
        memory = InMemorySpanExporter()
        monkeypatch.setattr(tracing, "otlp_exporter", lambda endpoint: memory)
        server = Server(tokenizer, script, otlp_endpoint="http://collector:4318", **options)
        servers.append(server)

        def spans() -> list[ReadableSpan]:
            assert server.context.tracing is not None
            server.context.tracing.flush()
            return list(memory.get_finished_spans())

        return server, spans

    yield make
    for server in servers:
        assert server.context.tracing is not None
        server.context.tracing.close()


def timed(request: Request) -> list[Tokens | Finished]:
    scheduled = request.arrival_time + WAITED
    end = Finished(
        request.request_id,
        FinishReason.STOP,
        len(request.prompt_ids),
        2,
        num_cached=1,
        num_drafted=3,
        num_accepted=1,
        first_scheduled_time=scheduled,
        first_token_time=scheduled + PREFILLED,
    )
    return [Tokens(request.request_id, [40, 41]), end]


def test_a_generation_is_a_span_of_the_clients_trace(
    traced: Callable[..., tuple[Server, Spans]],
) -> None:
    server, spans = traced(timed)
    fields = {"temperature": 0.5, "max_tokens": 9, "seed": 7, "stream": True}
    reply = server.run(
        lambda client: client.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields,
            headers=HEADER,
        )
    )
    assert reply.status_code == 200
    (span,) = spans()
    assert (span.name, span.kind) == ("chat tiny", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    found = dict(span.attributes or {})
    wanted = {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "aerie",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.response.finish_reasons": ("stop",),
        "aerie.draft.tokens": 3,
        "aerie.draft.accepted_tokens": 1,
    }
    assert found | wanted == found
    assert found["gen_ai.usage.input_tokens"] == len(server.engine.submitted[0].prompt_ids)
    latency = {k.rpartition(".")[2]: v for k, v in found.items() if ".latency." in k}
    assert latency["time_in_queue"] == pytest.approx(WAITED, abs=1e-4)
    assert latency["time_in_model_prefill"] == pytest.approx(PREFILLED, abs=1e-4)
    assert latency["time_to_first_token"] == pytest.approx(WAITED + PREFILLED, abs=1e-4)
    assert {"time_in_model_decode", "e2e"} <= set(latency)
    assert [event.name for event in span.events] == ["first token"]
    assert span.status.is_ok


def test_errors_mark_spans_but_the_clients_own_are_no_failures(
    traced: Callable[..., tuple[Server, Spans]],
) -> None:
    server, spans = traced(fail([40], "out of paper"))
    assert server.chat().status_code == 500
    assert server.chat(temperature=-1).status_code == 400
    assert server.get("/health").status_code == 200  # polled, so it has no span
    failed, refused = spans()
    assert (failed.name, failed.status.is_ok) == ("chat tiny", False)
    assert (refused.name, refused.status.is_ok) == ("POST /v1/chat/completions", True)
    for span, status in ((failed, "500"), (refused, "400")):
        assert (span.attributes or {})["error.type"] == status


def test_lines_of_the_log_name_the_trace(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tokenizer)  # without spans, too
    with caplog.at_level(logging.INFO):
        assert server.get("/v1/models", headers=HEADER).status_code == 200
    (record,) = [
        each for each in caplog.records if each.name == "server.http.middleware.request_log"
    ]
    assert f"trace_id={TRACE}" in record.getMessage()
    assert json.loads(JsonFormatter().format(record))["trace_id"] == TRACE


@pytest.mark.parametrize(
    ("value", "trace"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f"cc-{TRACE}-{PARENT}-01-later", TRACE),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        ("nonsense\xff", None),
        ("", None),
    ],
)
def test_only_a_valid_traceparent_names_a_trace(value: str, trace: str | None) -> None:
    assert trace_of([(b"traceparent", value.encode("latin-1"))]) == trace


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://a", "http://u:p@a:1", "http://", ""])
def test_an_endpoint_that_is_none_stops_the_start(tokenizer: Tokenizer, endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"server\.otlp_endpoint is"):
        Server(tokenizer, otlp_endpoint=endpoint)


def test_a_collector_that_does_not_answer_keeps_nobody(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "LAST_SPANS", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(DEADLINE))
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra is missing")
    with socket.create_server(("127.0.0.1", 0)) as collector:
        server = Server(tokenizer, otlp_endpoint=f"http://127.0.0.1:{collector.getsockname()[1]}")
        assert server.chat().status_code == 200
        tracer = server.context.tracing
        assert tracer is not None
        shut_down, sent = tracer._provider.shutdown, threading.Event()
        monkeypatch.setattr(tracer._provider, "shutdown", lambda: (shut_down(), sent.set()))
        tracer.close()
        assert not sent.is_set()
