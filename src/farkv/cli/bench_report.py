"""A benchmark while it runs and when it ends. In: what measures. Out: a bar, a table, a picture, one object."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from farkv.cli.interrupted import Interrupted
from farkv.cli.terminal import err, say
from farkv.quote import quote
from farkv.show import Tell, show_progress

if TYPE_CHECKING:
    from farkv.bench.report import Report

STOPPED = "before the end: the table has what was finished"


def measure(title: str, work: Callable[[Tell], Any], show: Callable[[Any], Any], *, as_json: bool) -> Any:
    """Run a benchmark and print its table; return its report.

    Raises:
        Interrupted: by Ctrl-C; what was finished was printed, as an object too where that was asked for.
    """
    from farkv.bench.stopped import Stopped

    with show_progress(err, title, quiet=as_json) as tell:
        try:
            report, stopped = work(tell), None
        except Stopped as stop:
            report, stopped = stop.report, stop
    err.print(show(report))
    if stopped is not None:
        print_object(report, as_json=as_json)
        raise Interrupted(STOPPED) from stopped
    return report


def print_object(report: Any, *, as_json: bool) -> None:
    """Print a report as one object on stdout, where that was asked for."""
    if as_json:
        typer.echo(json.dumps(report.to_dict()))


def finish(report: Report, plot: Path | None, *, as_json: bool) -> None:
    """Write the plot, and print the JSON object on stdout."""
    if plot is not None:
        from farkv.bench.plot import plot_rows

        plot_rows(report, plot)
        say(f"wrote {quote(plot)}")
    print_object(report, as_json=as_json)
