"""A process that trains a draft head, with the configuration as JSON in the first line of standard
input. The server stops it while requests run, so the kernel must end it with the server: a thread
that waits for the end of standard input would stand still, too."""

from __future__ import annotations

import ctypes
import signal
import sys

from configs.training import HostTrainingConfig
from server.process.setup.logs import show_stacks_on_request
from server.process.setup.parent import die_with_parent, open_pipe

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    show_stacks_on_request()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    pipe = open_pipe()
    config = HostTrainingConfig.model_validate_json(pipe.readline())
    die_with_parent(pipe)
    from server.assembly.heads.training import train_draft

    try:
        train_draft(config)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
