"""What the server says when it is ready: what it serves, and where."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from configs.redact import redacted
from configs.resolve import HostConfig
from engine.messages import EngineInfo
from server.process.setup.logs import machine_line

logger = logging.getLogger(__name__)


def ready_text(config: HostConfig, info: EngineInfo, url: str) -> str:
    """What standard output gets once the server is ready: a summary, or the whole configuration
    where the operator wants that or logs are JSON."""
    facts: dict[str, Any] = summary(config, info)
    if config.log.configuration or config.log.format == "json":
        facts = {"config": redacted(config), "ops": info.ops_in_words}
    return announcement(facts, url, config.log.format)


def announcement(facts: Mapping[str, Any], url: str, form: str) -> str:
    """What standard output gets once the server is ready; `form` is `log.format`."""
    if form == "json":
        places = {"url": url, "openai_base_url": f"{url}/v1"}
        return machine_line("configuration", facts) + machine_line("ready", places)
    text: str = yaml.safe_dump(facts, sort_keys=False, width=1000)
    return f"{text}READY {url}  (OpenAI base URL: {url}/v1)\n"


def summary(config: HostConfig, info: EngineInfo) -> dict[str, str]:
    """What somebody who starts a server wants to know first."""
    kernels = Counter(backend.name for backend in info.ops.values())
    drafts = [] if info.draft is None else [f"{info.draft.kind} head {info.draft.path}"]
    drafts += ["lookup"] if config.speculation.looks_up else []
    tree = f"; tree {config.speculation.tree}" if info.draft is not None else ""
    roles = {} if config.parallel.roles is None else {"engines": config.parallel.roles}
    return {
        "model": f"{config.model.served_name}, {info.max_model_len} tokens of context",
        "device": f"{info.device}, {config.kernels.threads} threads",
        "kernels": ", ".join(f"{name} ({count})" for name, count in kernels.most_common()),
        "drafts": (", ".join(drafts) or "none") + tree,
        **roles,
        "cache": f"{info.num_blocks * info.block_size} tokens",
        "more": "--verbose, /info, aerie config"
        + ("; a page to chat at /" if config.server.page else ""),
    }


def warn_of_fallback(info: EngineInfo) -> None:
    """Log why native kernels, which were to be used where possible, could not be had."""
    for fallback in dict.fromkeys(one for one in info.ops.values() if one.is_fallback):
        operations = ", ".join(name for name, backend in info.ops.items() if backend == fallback)
        logger.warning("slow kernels are used for %s: %s", operations, fallback)
