"""Random traffic against a server, and what became of each request. See `benchmarks.chaos`."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "tiny"
PATIENCE = 150.0  # seconds for the end of a request
SOAK_PAUSE = 0.5  # seconds between the requests of a quiet client
ERROR_STATUS = {408, 429, 500, 503}  # what a faulty or full server may answer
WORDS = "the quick brown fox jumps over a lazy dog and never loses its token"
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}},
    },
}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


@dataclass(frozen=True)
class Case:
    """One request whose text is known from a quiet run."""

    name: str
    path: str
    body: Mapping[str, Any]


@dataclass
class Tally:
    """Counts of ends, and everything that must not happen."""

    ends: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.ends["wrong"] += 1
        self.faults.append(text)


def cases(luck: random.Random) -> list[Case]:
    """Requests of every API and kind, with and without streaming."""
    found = []
    for number in range(8):
        prompt = " ".join(luck.choices(WORDS.split(), k=luck.choice((3, 12, 60))))
        seed = {"seed": luck.randrange(2**31), "temperature": luck.choice((0, 0.8, 1.0))}
        small = {"model": MODEL, "max_tokens": luck.choice((4, 24, 64))}
        chat = {**small, **seed, "messages": [{"role": "user", "content": prompt}]}
        text = {**small, **seed, "prompt": prompt}
        other = {k: v for k, v in seed.items() if k != "seed"} | {"temperature": 0}
        message = {**small, **other, "messages": chat["messages"]}
        response = {"model": MODEL, "max_output_tokens": 24, "temperature": 0, "input": prompt}
        tools = {"tools": [TOOL], "tool_choice": "required"}
        kinds: dict[str, tuple[str, dict[str, Any]]] = {
            "chat": ("/v1/chat/completions", chat),
            "json": ("/v1/chat/completions", {**chat, "response_format": JSON_FORMAT}),
            "tools": ("/v1/chat/completions", {**chat, **tools}),
            "completions": ("/v1/completions", {**text, "logprobs": 2}),
            "n": ("/v1/completions", {**text, "n": 3}),
            "stop": ("/v1/completions", {**text, "stop": ["e", "qu"]}),
            "messages": ("/v1/messages", message),
            "responses": ("/v1/responses", {**response, "store": False}),
        }
        for kind, (path, body) in kinds.items():
            for stream in (False, True):
                name = f"{kind}{'-stream' if stream else ''}"
                found.append(Case(f"{name}-{number}", path, {**body, "stream": stream}))
    return found


class Traffic:
    """Workers that send random cases until told to pause."""

    def __init__(self, url: str, known: Sequence[Case], luck: random.Random) -> None:
        self._url = url
        self._cases = known
        self._luck = luck
        self.expected: dict[str, str] = {}
        self.tally = Tally()
        self.may_break = False  # whether connections may break now: the HTTP process is harmed
        self._going = asyncio.Event()
        self._stopping = False
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits)
        self._idle = asyncio.Condition()
        self._num_open = 0

    async def learn(self) -> None:
        """The texts of all cases, in a quiet run, one after the other."""
        for case in self._cases:
            end, text = await self._send(case, abort_after=None)
            if end != "complete":
                raise RuntimeError(f"{case.name} ended with {end} in the quiet run: {text}")
            self.expected[case.name] = text

    async def work(self) -> None:
        """One worker."""
        while not self._stopping:
            await self._going.wait()
            self._num_open += 1
            try:
                if self._luck.random() < 0.1:
                    await self._send_nonsense()
                else:
                    await self.one()
            finally:
                self._num_open -= 1
                async with self._idle:
                    self._idle.notify_all()
            if self.tally.ends["refused"] and self._luck.random() < 0.5:
                await asyncio.sleep(0.02)

    async def soak(self, until: float, num_fuzzed: int, num_workers: int) -> None:
        """Quiet traffic until `until` of time.monotonic(), and spoilt requests beside it, as many
        as `num_fuzzed` if there is time for them."""
        began = time.monotonic()
        numbers = iter(range(num_fuzzed))

        async def work() -> None:
            while time.monotonic() < until:
                await self.one()
                await asyncio.sleep(SOAK_PAUSE)

        async def fuzz() -> None:
            for number in numbers:
                due = began + (until - began) * number / num_fuzzed
                await asyncio.sleep(due - time.monotonic())
                if time.monotonic() > until:
                    return
                await self._send_nonsense()

        await asyncio.gather(*(work() for _ in range(num_workers)), *(fuzz() for _ in range(4)))

    async def one(self) -> str:
        """Send one case; count how it ended."""
        case = self._luck.choice(self._cases)
        aborts = case.body["stream"] and self._luck.random() < 0.15
        end, text = await self._send(case, self._luck.randrange(1, 6) if aborts else None)
        self.tally.by_kind[case.name.partition("-")[0]] += 1
        if end == "complete" and self.expected and text != self.expected[case.name]:
            known = self.expected[case.name]
            self.tally.fault(f"{case.name}: another text: {text!r} instead of {known!r}")
        elif end.startswith("wrong"):
            self.tally.fault(f"{case.name}: {end}: {text[:300]}")
        elif end == "broken" and not self.may_break:
            self.tally.fault(f"{case.name}: the connection broke: {text}")
        else:
            self.tally.ends[end] += 1
        return end

    def go(self) -> None:
        self._going.set()

    async def pause(self) -> None:
        """Send no more, and wait for the ends of what is open."""
        self._going.clear()
        async with self._idle:
            await asyncio.wait_for(self._idle.wait_for(lambda: not self._num_open), PATIENCE + 10)

    async def close(self) -> None:
        self._stopping = True
        self._going.set()
        await self._client.aclose()

    async def _send_nonsense(self) -> None:
        """A body that is no valid request, which must get an error that says so."""
        case = self._luck.choice(self._cases)
        body = _spoil(json.dumps(case.body), self._luck)
        try:
            reply = await self._client.post(
                case.path, content=body, headers={"content-type": "application/json"}
            )
            valid = reply.status_code in ERROR_STATUS | {200, 400, 404, 413, 422}
            internal = reply.status_code == 500 and "failed to finish" not in reply.text
            if not valid or (internal and not self.may_break):
                self.tally.fault(f"nonsense {body!r}: {reply.status_code} {reply.text[:200]}")
            self.tally.ends["nonsense answered"] += 1
        except httpx.TransportError as error:
            if not self.may_break:
                self.tally.fault(f"nonsense {body!r}: {error!r}")
            self.tally.ends["broken"] += 1

    async def _send(self, case: Case, abort_after: int | None) -> tuple[str, str]:
        """How a request ended, and its text or what was wrong."""
        try:
            async with asyncio.timeout(PATIENCE):
                if case.body["stream"]:
                    return await self._stream(case, abort_after)
                reply = await self._client.post(case.path, json=case.body)
                if reply.status_code != 200:
                    return _refusal(reply.status_code, reply.text)
                return "complete", _whole(case.path, reply.json())
        except TimeoutError:
            return "wrong: no end", ""
        except httpx.TimeoutException as error:
            return "wrong: no end", repr(error)
        except httpx.TransportError as error:
            return "broken", repr(error)

    async def _stream(self, case: Case, abort_after: int | None) -> tuple[str, str]:
        async with self._client.stream("POST", case.path, json=case.body) as reply:
            if reply.status_code != 200:
                return _refusal(reply.status_code, (await reply.aread()).decode())
            reading = Reading(case.path)
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    reading.take(line.removeprefix("data: "))
                    if abort_after is not None and reading.num_events >= abort_after:
                        return "aborted by the client", ""
            return reading.end()


class Reading:
    """The events of a stream, from which its text and its ends are taken."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._texts: defaultdict[int, str] = defaultdict(str)
        self._ends: Counter[int] = Counter()
        self._done = 0
        self._error = ""
        self.num_events = 0

    def take(self, data: str) -> None:
        self.num_events += 1
        if data == "[DONE]":
            self._done += 1
            return
        event = json.loads(data)
        kind = event.get("type", "")
        if event.get("error"):
            self._error = json.dumps(event["error"])
        elif kind in ("response.failed", "error"):
            self._error = data
        elif self._path == "/v1/responses":
            self._texts[0] += event.get("delta", "") if kind.endswith("text.delta") else ""
            if kind in ("response.completed", "response.incomplete"):
                self._ends[0] += 1
                self._done += 1
        elif self._path == "/v1/messages":
            self._texts[0] += event.get("delta", {}).get("text", "")
            self._ends[0] += kind == "message_delta"
            self._done += kind == "message_stop"
        else:
            for choice in event["choices"]:
                self._texts[choice["index"]] += _text_of(choice, "delta")
                self._ends[choice["index"]] += choice.get("finish_reason") is not None

    def end(self) -> tuple[str, str]:
        if self._error:
            ends = self._done if self._path == "/v1/responses" else 0
            return ("wrong: an error and an end", self._error) if ends else ("error", self._error)
        if self._done != 1 or set(self._ends.values()) != {1}:
            return "wrong: not exactly one end", f"{self._done} {dict(self._ends)}"
        return "complete", "|".join(self._texts[index] for index in sorted(self._texts))


def _text_of(choice: Mapping[str, Any], part: str) -> str:
    if "text" in choice:
        return str(choice["text"] or "")
    message = choice.get(part) or {}
    calls = message.get("tool_calls") or ()
    return (message.get("content") or "") + "".join(
        (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
        for call in calls
    )


def _whole(path: str, body: Mapping[str, Any]) -> str:
    if path == "/v1/responses":
        return "".join(
            part.get("text", "") for item in body["output"] for part in item.get("content", ())
        )
    if path == "/v1/messages":
        return "".join(part.get("text", "") for part in body["content"])
    return "|".join(_text_of(choice, "message") for choice in body["choices"])


def _refusal(status: int, text: str) -> tuple[str, str]:
    try:
        json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"wrong: status {status} without an error object", text
    if status not in ERROR_STATUS:
        return f"wrong: status {status}", text
    return ("refused" if status in (429, 503) else "error"), text


def _spoil(body: str, luck: random.Random) -> bytes:
    """A few bytes changed, taken out or doubled."""
    raw = bytearray(body.encode())
    for _ in range(luck.randrange(1, 5)):
        at = luck.randrange(len(raw))
        kind = luck.randrange(3)
        if kind == 0:
            raw[at] = luck.randrange(256)
        elif kind == 1:
            del raw[at : at + luck.randrange(1, 8)]
        else:
            raw[at:at] = raw[at : at + luck.randrange(1, 20)]
        raw = raw or bytearray(b"0")
    return bytes(raw)
