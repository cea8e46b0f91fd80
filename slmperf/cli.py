"""The command `slmperf`. Only typer is imported here; each command imports what it needs.

This is the one place where a user's mistake becomes a line on stderr and exit code 2: every other
module raises `slmperf.check.InputError`, or lets the OSError of a path through.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slmperf.bench import commands as bench_commands
from slmperf.bench.evaluation import command as evaluation
from slmperf.plan import commands as plan_commands
from slmperf.prune.command import commands as prune_commands
from slmperf.quant.command import commands as quant_commands
from slmperf.serve import export as export_command
from slmperf.serve.deploy import commands as deploy_commands

app = typer.Typer(
    help="Turn a large teacher into a small, fast ranking model, and measure what it costs.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_commands.app, name="bench")
app.add_typer(plan_commands.app, name="plan")
app.command()(prune_commands.prune)
app.command()(quant_commands.quantize)
app.command()(export_command.export)
app.command()(deploy_commands.deploy)
app.command("eval")(evaluation.evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        from slmperf import __version__

        typer.echo(f"slmperf {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and the report; runs/RECIPE if not given."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Interactions or prompts, instead of what the recipe names."),
    ] = None,
) -> None:
    """Run a recipe: teacher, distil, prune, quantise, evaluate, report.

    A run that was stopped goes on where it was; finished stages are not computed again.
    """
    from slmperf import recipe as recipes

    recipes.run(recipe, out or Path("runs") / recipe.stem, data=data)


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and the table; runs/RECIPE if not given."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text as JSONL, instead of what the recipe names."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print sizes, steps and memory; train and write nothing."),
    ] = False,
) -> None:
    """Train on text in stages: teachers, distillation, the student's own text; a table of losses.

    A run that was stopped goes on where it was; finished stages are not computed again.
    """
    from slmperf.recipe import distillation

    if dry_run:
        typer.echo(distillation.preview(recipe, data))
        return
    distillation.run(recipe, out or Path("runs") / recipe.stem, data=data)


@app.command()
def audit(
    trainer: Annotated[
        Path,
        typer.Option(help="A script that uses transformers.Trainer.", show_default=False),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: the script's own arguments.")
    ] = None,
    formula: Annotated[
        str | None,
        typer.Option(
            help="What the loss is meant to be, such as 'divergence=jsd,beta=0.5,kd_weight=0.9,"
            "ce_weight=0.1,temperature=2'; by the trainer's settings if not given."
        ),
    ] = None,
    step: Annotated[int, typer.Option(help="The step to look at.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the results here, as JSON.")] = None,
) -> None:
    """Audit one step of a training script: its loss's gradient, terms, wasted rows, time.

    The script runs until that step and then ends, without saving anything.
    """
    from slmperf.bench.auditing.report import write_report
    from slmperf.bench.auditing.script import audit_trainer
    from slmperf.bench.results import check_files

    check_files(out, None)
    report = audit_trainer(trainer, arguments or (), formula=formula, step=step)
    if out is not None:
        write_report(out, report)
    typer.echo(report)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what was built, what this machine has, and which implementation each op takes."""
    from slmperf.bench.doctor import facts as find

    facts = find()
    if as_json:
        import json

        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="slmperf doctor", title_justify="left")
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for section, rows in facts.items():
        for number, (name, value) in enumerate(rows.items()):
            last = number == len(rows) - 1
            table.add_row("" if number else section, name, _cell(value), end_section=last)
    # A pipe has no width; 120 columns keep a line of the table a line of the log.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_cell(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_cell(inner) for inner in value)
    return "-" if value in ("", None) else str(value)


def main() -> None:
    """Entry point: run the command; a user's mistake becomes one line and exit code 2."""
    from slmperf.check import InputError

    # Everything runs on local files; no library asks a model hub on our behalf.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        code = _complain(str(error))
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if error.filename is None:  # not about a path: our own trouble, shown whole
            raise
        code = _complain(f"{error.filename}: {error.strerror}")
    except typer.TyperException as error:  # wrong options and arguments
        code = _complain(error.format_message())
    sys.exit(code)


def _complain(text: str) -> int:
    print("error: " + " ".join(text.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
