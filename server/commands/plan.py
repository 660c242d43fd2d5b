"""The commands of `aerie` that check a configuration and prepare for serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from configs.host import host_config
from configs.planning import shipped_gpus
from configs.redact import SECRETS, redacted
from configs.schema import Config
from server.commands.options import LOOKING, MEASURING, ConfigFile, Overrides, failed

UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


GpuName = Annotated[
    str, typer.Option("--gpu", metavar="GPU", help=f"{', '.join(shipped_gpus())}, or a file.")
]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, help="Number of GPUs; default: parallel.tensor.", show_default=False),
]
Batch = Annotated[str, typer.Option(metavar="SIZES", help="Batch sizes: 1..128, or 1,8,64.")]
Context = Annotated[
    str, typer.Option(metavar="TOKENS", help="Context of every sequence, such as 8k.")
]
AcceptanceOption = Annotated[
    float, typer.Option(help="Mean tokens of a round with a chain of 3 drafts, from 1 to 4.")
]
Weights = Annotated[
    str, typer.Option(metavar="FORMAT", help="Of linear layers: stored, bf16, fp8, int8, int4.")
]
Head = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="eagle, eagle3 or dense3: assume such a head, with the target's widths, instead of "
        "reading speculation.draft.",
        show_default=False,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of one GPU, such as 79GiB; default: all that the GPU has.",
        show_default=False,
    ),
]
Svg = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw ms per token over batch.", show_default=False),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all numbers.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(name="config", rich_help_panel=LOOKING)(show_config)
    app.command(rich_help_panel=LOOKING)(prepare)
    app.command(rich_help_panel=MEASURING)(plan)


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


def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    gpu: GpuName = "h100",
    ranks: Ranks = None,
    batch: Batch = "1..128",
    context: Context = "8k",
    acceptance: AcceptanceOption = 2.8,
    weights: Weights = "stored",
    head: Head = None,
    gpu_memory: GpuMemory = None,
    svg: Svg = None,
    json_file: JsonFile = None,
) -> None:
    """Predict memory and time per token on GPUs. Needs no GPU and reads no weights.

    Needs only config.json of the model and its draft head; those of Llama 3.1 8B, 3.3 70B and
    Llama 4 come with aerie. docs/planning.md says how well predictions agree with measurements.

    Examples:

        aerie plan --config llama33-70b-8xh100 --head eagle3

        aerie plan model.source=meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8 --ranks 8
        --head dense3 --svg maverick.svg
    """
    from server.assembly.planning import PlanOptions, head_kind, write_json, write_svg
    from server.assembly.planning import plan as predicted
    from server.planning.prediction import batch_sizes, context_tokens
    from server.planning.tables import show

    settings = [*(overrides or ()), *([] if ranks is None else [f"parallel.tensor={ranks}"])]
    try:
        options = PlanOptions(
            gpu=gpu,
            gpu_bytes=None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory"),
            batches=batch_sizes(batch),
            context=context_tokens(context),
            acceptance=acceptance,
            weights=weights,
            head=head_kind(head),
        )
        found = predicted(host_config(config, settings), options)
        show(found)
        if svg is not None:
            write_svg(found, svg)
        if json_file is not None:
            write_json(found, json_file)
    except (ValueError, OSError) as error:
        raise failed(error) from None


def parse_bytes(text: str, option: str) -> int:
    """`80GiB` -> bytes. ValueError for anything but a number with one of `UNITS`."""
    for unit, size in UNITS.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return int(float(number) * size)
    raise ValueError(f"{option} {text!r} is not a size such as 80GiB; units: {', '.join(UNITS)}")
