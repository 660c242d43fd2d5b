"""The command of `aerie` that makes quantised models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.host import host_config
from server.commands.options import LOOKING, ConfigFile, Overrides, failed

To = Annotated[
    Literal["fp8", "int4"],
    typer.Option(
        help="fp8: a scale for each output, inputs rounded on GPUs; int4: groups of 128 inputs, or "
        "of 64 or 32 where 128 do not fit.",
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Option(metavar="DIR", help="Directory of the new model.", show_default=False)
]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text like those the model will see; default: the conversations that come with "
        "aerie.",
        show_default=False,
    ),
]
Window = Annotated[int, typer.Option(min=16, help="Tokens of a piece of text.")]
MaxWindows = Annotated[int, typer.Option(min=1, help="Use the first pieces only.")]
Nearest = Annotated[
    bool,
    typer.Option(
        "--nearest",
        help="Round every number for itself: takes seconds and loses several times more.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command of this module to `app`."""
    app.command(rich_help_panel=LOOKING)(quantize)


def quantize(
    to: To,
    output: Output,
    overrides: Overrides = None,
    config: ConfigFile = None,
    text: Text = None,
    window: Window = 512,
    max_windows: MaxWindows = 128,
    nearest: Nearest = False,
) -> None:
    """Write a Llama with its linear layers in 8 or 4 bits (layout of compressed-tensors).

    Runs the model over a text, layer by layer, and rounds weights so that outputs change little
    (GPTQ). The LM head and the embedding stay as they are. Uses a GPU if there is one.

    Examples:

        aerie quantize --to fp8 --output llama-fp8 model.source=meta-llama/Llama-3.2-1B-Instruct

        aerie quantize --to int4 --output llama-int4 model.source=models/mine --text mine.txt
    """
    from server.assembly.quantising import Quantising, quantise

    asked = Quantising(to, output, text, window, max_windows, nearest)
    try:
        quantise(
            host_config(config, overrides or ()), asked, lambda line: typer.echo(line, err=True)
        )
    except (ValueError, OSError) as error:
        raise failed(error) from None
    typer.echo(f"aerie serve model.source={output}")
