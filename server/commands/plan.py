"""The commands of `aerie` that check a configuration and prepare for serving."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from configs.host import host_config
from configs.redact import SECRETS, redacted
from configs.schema import Config
from server.commands.options import ConfigFile, Overrides, failed

UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(name="config")(show_config)
    app.command()(prepare)
    app.command()(plan_memory)


def show_config(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Check a configuration and print all of it, with the meaning of every key."""
    try:
        resolved = host_config(config, overrides or ())
    except (ValueError, OSError) as error:
        raise failed(error) from None
    values = redacted(resolved)
    for name, section in Config():  # the schema's own sections: they describe their keys
        typer.echo(f"{name}:  # {type(section).__doc__}")
        for key, about in type(section).model_fields.items():
            text = f"{key}: {json.dumps(values[name][key])}"
            if f"{name}.{key}" in SECRETS and values[name][key]:  # so that the output can be used
                text = f"# {key}: {len(values[name][key])} of them, not shown"
            typer.echo(f"  {text}" + (f"  # {about.description}" if about.description else ""))


def prepare(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Compile the CPU kernels and convert the tokenizer now, not at the first start."""
    from server.assembly.compose import prepare_kernels
    from server.text.chat_codec import load_codec

    try:
        resolved = host_config(config, overrides or ())
        typer.echo(f"native kernels: {prepare_kernels(resolved)}")
        load_codec(resolved)
    except (ValueError, OSError) as error:
        raise failed(error) from None


def plan_memory(
    overrides: Overrides = None,
    config: ConfigFile = None,
    gpu_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of one GPU, such as 80GiB or 79000MiB.")
    ] = "80GiB",
) -> None:
    """Show the memory needed on each GPU, and how many 8k-token sequences fit. Reads no weights.

    Needs only config.json of the model and its draft head (fetched for hub ids).

    Example:

        aerie plan-memory --config llama33-70b-8xh100 --gpu-memory 80GiB
    """
    from server.assembly.memory_plan import plan_memory as plan

    try:
        size = parse_bytes(gpu_memory, "--gpu-memory")
        found = plan(host_config(config, overrides or ()), size)
    except (ValueError, OSError) as error:
        raise failed(error) from None
    for line in found.lines():
        typer.echo(line)


def parse_bytes(text: str, option: str) -> int:
    """`80GiB` -> bytes. ValueError for anything but a number with one of `UNITS`."""
    for unit, size in UNITS.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return int(float(number) * size)
    raise ValueError(f"{option} {text!r} is not a size such as 80GiB; units: {', '.join(UNITS)}")
