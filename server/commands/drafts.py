"""The commands of `aerie` that train, measure and publish draft heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.host import host_config, host_training_config
from configs.load import shipped_configs
from configs.training import TRAIN
from server.commands.options import HEADS, ConfigFile, Overrides, failed

CHAINS = tuple(f"chain{length}" for length in range(1, 8))
TREES = (*CHAINS, "tree4", "tree8", "tree16", "dynamic8", "dynamic16")


PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='JSONL with {"turns": [user texts]} or {"messages": [...]} per line; default: the '
        "sample that comes with aerie.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Use the first prompts only.", show_default=False)
]
Turns = Annotated[int, typer.Option(min=1, help="Turns of each prompt to answer.")]
Trees = Annotated[
    list[str] | None,
    typer.Option(
        "--tree",
        metavar="NAME",
        help=f"Tree to measure; may be repeated. Default: {', '.join(TREES)}.",
        show_default=False,
    ),
]
Temperatures = Annotated[
    list[float] | None,
    typer.Option("--temperature", help="May be repeated. Default: 0 and 1.", show_default=False),
]
OutputTokens = Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")]
Batch = Annotated[
    int, typer.Option(min=1, help="Requests at once; acceptance does not depend on it.")
]
CompareRanking = Annotated[
    bool,
    typer.Option(
        "--compare-ranking", help="At temperatures above 0, also rank without the target's noise."
    ),
]
WithLookup = Annotated[
    bool,
    typer.Option("--with-lookup", help="Measure every tree again together with prompt lookup."),
]
CompareAux = Annotated[
    bool,
    typer.Option(
        "--compare-aux",
        help="Also read the head's ids of target layers as outputs and as boundaries "
        "(speculation.aux_layers), and say which is accepted more.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the numbers there as JSON.", show_default=False),
]
TrainingFile = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help=f"YAML file, or a shipped one: {', '.join(shipped_configs(TRAIN))}.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(rich_help_panel=HEADS)(eval_draft)
    app.command(rich_help_panel=HEADS)(train_draft)
    app.command(rich_help_panel=HEADS)(publish_draft)


def eval_draft(
    overrides: Overrides = None,
    config: ConfigFile = None,
    prompts: PromptFile = None,
    limit: Limit = None,
    turns: Turns = 2,
    tree: Trees = None,
    temperature: Temperatures = None,
    output_tokens: OutputTokens = 128,
    batch: Batch = 1,
    compare_ranking: CompareRanking = False,
    with_lookup: WithLookup = False,
    compare_aux: CompareAux = False,
    output: Output = None,
) -> None:
    """Measure how many tokens of a draft head (speculation.draft) are accepted.

    Shows the acceptance length (mean tokens per verified tree, the bonus token included), how deep
    trees are accepted, and the speed relative to plain decoding, by tree and temperature. Later
    turns follow the model's own answers.

    Examples:

        aerie eval-draft speculation.draft=heads/mine --limit 20 --output acceptance.json

        aerie eval-draft speculation.draft=heads/mine --tree chain3 --tree tree8 --temperature 0

        aerie eval-draft speculation.draft=heads/mine --tree chain3 --compare-aux
    """
    from server.assembly.heads.evaluation import Evaluation, evaluate_draft, show

    try:
        evaluation = Evaluation(
            prompts=prompts,
            limit=limit,
            num_turns=turns,
            trees=tuple(tree or TREES),
            temperatures=tuple(temperature or (0.0, 1.0)),
            output_tokens=output_tokens,
            batch=batch,
            compare_ranking=compare_ranking,
            with_lookup=with_lookup,
            compare_aux=compare_aux,
        )
        report = evaluate_draft(host_config(config, overrides or ()), evaluation)
        show(report)
        if output is not None:
            report.write(output)
    except (ValueError, OSError) as error:
        raise failed(error) from None


def train_draft(
    config: TrainingFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check configuration and data; tell sizes, memory, time."),
    ] = False,
) -> None:
    """Train a draft head, or continue an earlier run with the same run.output.

    run.output then holds the head (for speculation.draft), history.jsonl, learning-curve.svg and
    checkpoints. `torchrun --nproc-per-node N -m aerie train-draft ...` trains in N processes.

    Examples:

        aerie train-draft --config sample

        aerie train-draft --config smollm2-eagle3 'data.conversations=[answers.jsonl]'

        aerie train-draft --config smollm2-eagle3-gpu 'data.prompts=[prompts.jsonl]' --dry-run
    """
    from server.assembly.heads.training import train_draft as run
    from server.assembly.heads.training_estimate import dry_run as lines

    try:
        settings = host_training_config(config, overrides or ())
        if dry_run:
            for line in lines(settings):
                typer.echo(line)
        else:
            run(settings)
    except (ValueError, OSError) as error:
        raise failed(error) from None


def publish_draft(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a training run (run.output).")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the published head.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[card.KEY=VALUE]...", help="Fields of the model card.", show_default=False
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Numbers for the model card, written by eval-draft.",
            show_default=False,
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing head.")] = False,
    max_file_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Split the weights into files of at most this size.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the newest checkpoint of a training run as a head with its model card.

    Examples:

        aerie publish-draft draft-head --report acceptance.json --output heads/mine

        aerie publish-draft draft-head --output heads/mine card.licence=apache-2.0
    """
    from server.assembly.heads.training import publish_run

    try:
        publish_run(
            run,
            output,
            overrides=overrides or (),
            report=report,
            replace=replace,
            max_file_bytes=max_file_bytes,
        )
        typer.echo(output)
    except (ValueError, OSError) as error:
        raise failed(error) from None
