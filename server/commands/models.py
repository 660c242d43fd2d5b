"""The commands of `aerie` that show and fetch models."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from server.commands.options import LOOKING, failed
from server.terminal.screen import harmless

Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Files to fetch, such as '*Q4_K_M.gguf'; may be repeated. Default: configuration, "
        "tokenizer and safetensors.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit. Default: main.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(rich_help_panel=LOOKING)(models)
    app.command(rich_help_panel=LOOKING)(pull)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """List the models that this machine has: bundled ones, and those of the hub's cache.

    The first column is what model.source, or speculation.draft for a head, may be. Whatever lies in
    a directory or a .gguf file can be served by its path, too.
    """
    from engine.checkpoints.hub import cache_folder, free_bytes, sized
    from server.assembly.library import library

    try:
        known = library()
    except OSError as error:
        raise failed(error) from None
    for each in known:
        if as_json:
            fields = {name: getattr(each, name) for name in each.__slots__}
            typer.echo(json.dumps(fields | {"path": each.path and str(each.path)}))
            continue
        size = sized(each.num_bytes) if each.num_bytes else "-"
        typer.echo(harmless(f"{each.source}\n  {each.origin}, {size}, {each.form}"))
        if each.note:
            typer.echo(harmless(f"  {each.note}"))
    if not as_json:
        folder = cache_folder()
        typer.echo(f"cache: {folder} ({sized(free_bytes(folder))} free); aerie pull fetches more")


def pull(
    hub_id: Annotated[str, typer.Argument(metavar="HUB_ID", help="Such as org/name.")],
    revision: Revision = None,
    include: Include = None,
) -> None:
    """Fetch a model from the Hugging Face hub before it is served.

    Shows the size first, and refuses what does not fit on the disk. A download that was interrupted
    goes on where it stopped. HF_TOKEN opens gated models, HF_HOME moves the cache. Prints what
    model.source may be.

    Examples:

        aerie pull meta-llama/Llama-3.2-1B-Instruct

        aerie pull org/name-GGUF --include '*Q4_K_M.gguf'
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from engine.checkpoints.hub import pull as fetch

    if not sys.stderr.isatty():
        disable_progress_bars()  # they are no lines of a log
    try:
        folder = fetch(hub_id, revision, include or (), lambda text: typer.echo(text, err=True))
    except (ValueError, OSError) as error:
        raise failed(error) from None
    ggufs = [str(path) for path in sorted(folder.rglob("*.gguf"))] if include else []
    for source in ggufs or [hub_id]:
        pinned = f" model.revision={revision}" if revision and not ggufs else ""
        typer.echo(f"aerie serve model.source={source}{pinned}")
