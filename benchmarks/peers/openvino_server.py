"""Serves OpenVINO GenAI over the OpenAI completions API: its package on PyPI has no server.

Runs as a script in OpenVINO's own virtual environment, so it imports nothing of this project:
`python openvino_server.py MODEL.gguf PORT CACHE`. One thread steps the pipeline with continuous
batching; each request has a thread that streams its tokens.
"""

from __future__ import annotations

import json
import queue
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import openvino_genai

CACHE_GIB = 2
SAVED = "openvino_model.xml"


def converted(gguf: Path, folder: Path) -> Path:
    """The folder of the model in OpenVINO's format, written at the first start; weights stay in the
    blocks of the file."""
    if not (folder / SAVED).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / gguf.name  # the pipeline writes beside what it reads
        shutil.copy(gguf, copy)
        openvino_genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
        copy.unlink()
    return folder


class Engine:
    """The pipeline and the thread that steps it."""

    def __init__(self, folder: Path) -> None:
        settings = openvino_genai.SchedulerConfig()
        settings.cache_size = CACHE_GIB
        settings.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), settings, "CPU")
        self._ids = count()
        self._open: dict[int, tuple[Any, Any]] = {}  # handle, queue
        self._work = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def tokenizer(self) -> Any:
        return self._pipeline.get_tokenizer()

    def submit(self, prompt: str, max_tokens: int, ignore_eos: bool) -> Any:
        """A queue of lists of new tokens, and of None after the last one."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, ignore_eos, False
        config.apply_chat_template = False  # prompts of the completions API are complete
        tokens: Any = queue.Queue()
        with self._work:
            number = next(self._ids)
            handle = self._pipeline.add_request(number, prompt, config)
            self._open[number] = handle, tokens
            self._work.notify()
        return tokens

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: bool(self._open))
                self._pipeline.step()
                for number, (handle, tokens) in list(self._open.items()):
                    self._hand_out(number, handle, tokens)

    def _hand_out(self, number: int, handle: Any, tokens: Any) -> None:
        while handle.can_read():
            tokens.put([t for output in handle.read().values() for t in output.generated_ids])
        if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
            tokens.put(None)
            del self._open[number]


def handler(engine: Engine, model: str) -> type[BaseHTTPRequestHandler]:
    """The routes /v1/models and /v1/completions."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged."""

        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            self._reply(200 if found else 404, {"data": [{"id": model}] if found else []})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            if self.path != "/v1/completions" or not body.get("stream"):
                self._reply(404, {"error": "only streams of /v1/completions are served"})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self._stream(body)
            self.close_connection = True

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, body: dict[str, Any]) -> None:
            tokens = engine.submit(body["prompt"], body["max_tokens"], bool(body.get("ignore_eos")))
            ids: list[int] = []
            sent = ""
            while (new := tokens.get()) is not None:
                ids += new
                text = engine.tokenizer.decode(ids)
                # A character may need several tokens; what precedes it does not change.
                piece = "" if text.endswith("\ufffd") else text[len(sent) :]
                sent += piece
                self._event({"choices": [{"index": 0, "text": piece, "finish_reason": None}]})
            self._event({"choices": [], "usage": {"completion_tokens": len(ids)}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, content: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main(gguf: Path, port: int, cache: Path) -> None:
    engine = Engine(converted(gguf, cache))
    Server(("127.0.0.1", port), handler(engine, gguf.stem)).serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
