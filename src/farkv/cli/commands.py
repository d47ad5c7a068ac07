"""All commands and what every one of them takes: `--debug`, and numbers that are some.

In: one file per command. Out: the command line as one command.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.main import get_command

from farkv.cli.bench import app as bench
from farkv.cli.demo import demo
from farkv.cli.eval import evaluate
from farkv.cli.plan import plan_layers
from farkv.cli.profile import profile_model
from farkv.cli.report import report
from farkv.cli.run import run
from farkv.config import MOST_COUNT, check_seed
from farkv.quote import show_value

app = typer.Typer(
    name="farkv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
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
    r"""Run the context that your memory cannot hold, under hard byte limits, with a receipt.

    [bold]Examples[/bold]

      farkv demo

      farkv run --model NAME_OR_PATH --file book.txt "Who wrote the letter?"

      farkv run --help
    """


def build_command(on_debug: Callable[[bool], None]) -> Any:
    """Return the whole command line as one command.

    Args:
        on_debug: told where `--debug` is given, which every command takes, before its name or behind it.
    """
    probe = typer.Typer()
    probe.command()(_take_debug)
    (option,) = (param for param in get_command(probe).params if param.name == "debug")
    option.callback = lambda context, param, asked: on_debug(asked) if asked else None
    command = get_command(app)
    _prepare(command, option)
    return command


def _take_debug(
    debug: Annotated[
        bool, typer.Option("--debug", expose_value=False, is_eager=True, help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Exist only to have the option made."""


def _prepare(command: Any, option: Any) -> None:
    for param in command.params:
        if getattr(param, "callback", None) is None:
            param.callback = check_number
    command.params.append(option)
    for inner in getattr(command, "commands", {}).values():
        _prepare(inner, option)


def check_number(_: Any, param: Any, value: Any) -> Any:
    """Return an option's value unchanged, or refuse a number that no command can use."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise typer.BadParameter(f"expected a finite number, got {number}")
        if isinstance(number, int):
            if param.name == "seed":
                check_seed(number, "--seed")
            elif abs(number) > MOST_COUNT:
                raise typer.BadParameter(f"expected at most {MOST_COUNT}, got {show_value(number)}")
    return value
