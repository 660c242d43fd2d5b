"""The server of llama.cpp out of the wheel xllamacpp.

Runs as a script in its own virtual environment, so it imports nothing of this project:
`python xllamacpp_server.py MODEL.gguf PORT THREADS STREAMS CONTEXT`, where CONTEXT is the number of
tokens of one stream.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main(model: str, port: int, threads: int, streams: int, context: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port, params.hostnames = port, ["127.0.0.1"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel, params.n_ctx = streams, streams * context
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
