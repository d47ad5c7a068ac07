"""`farkv report`: an HTML page and a table of the results of `farkv eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from farkv.cli.options import JsonOption
from farkv.cli.terminal import err, say
from farkv.quote import quote


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Results folder of farkv eval --out DIR.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Page title. Default: the model's name.")] = None,
    as_json: JsonOption = False,
) -> None:
    r"""Write the report of an evaluation: one self-contained page, readable offline.

    [bold]Examples[/bold]

      farkv report results -o report.html

      farkv report results --title "Demo model, 32 K" --json
    """
    # Imports numpy and the tables only when needed.
    from farkv.evals.report import describe_report, write_report
    from farkv.evals.show import draw_table

    page = write_report(folder, out, title)
    if as_json:
        typer.echo(json.dumps(describe_report(page, out), allow_nan=False))
        return
    err.print(draw_table(page.table))
    err.print(page.findings.headline)
    say(f"wrote {quote(out)}")
