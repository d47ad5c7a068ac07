"""The command line: `farkv run`, `profile`, `plan`, `demo`, `eval`, `report`, `bench`; one file per command.

In: arguments. Out: the answer (or one JSON object) on stdout, everything else on stderr. A user error prints one line
and exits with code 2.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from farkv.cli.bench import app as bench
from farkv.cli.demo import demo
from farkv.cli.eval import evaluate
from farkv.cli.plan import plan_layers
from farkv.cli.profile import profile_model
from farkv.cli.report import report
from farkv.cli.run import run
from farkv.errors import FarKVError

app = typer.Typer(
    name="farkv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run the context that your memory cannot hold, under hard byte limits, with a receipt.",
)
app.command()(run)
app.command(name="profile")(profile_model)
app.command(name="plan")(plan_layers)
app.command()(demo)
app.command(name="eval")(evaluate)
app.command()(report)
app.add_typer(bench)


def show_version(asked: bool) -> bool:
    """Print the version and stop."""
    if asked:
        typer.echo(f"farkv {version('farkv')}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Accept the options that precede the command."""


def main() -> None:
    """Run the command line; a FarKVError becomes one line and exit code 2."""
    try:
        app()
    except FarKVError as error:
        sys.stderr.write(f"farkv: {error}\n")
        sys.exit(2)
    except BrokenPipeError:
        # The process reading our output has exited, for example `| head`.
        sys.exit(1)
