"""Terminal output: receipts and plans as tables that fit 80 columns, and how far a command is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from farkv.calibrate.plan import Allocation, Plan
from farkv.calibrate.proposing import Proposal
from farkv.config import format_bytes
from farkv.receipt import Receipt
from farkv.receipt_text import describe_notes, rows_of

# Is told how much is done, of how much, if that is known.
Tell = Callable[[int, int | None], None]
# The time remaining follows from the steps of so many seconds.
MEAN_S = 3600.0


def draw_receipt(receipt: Receipt) -> RenderableType:
    """Return the receipt as a table: bytes read, held and moved, time and quality."""
    table = Table(title=f"receipt: {receipt.method}", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for name, value, note in rows_of(receipt):
        table.add_row(name, value, note)
    parts: list[RenderableType] = [table]
    parts += [Text(note, style="yellow") for note in describe_notes(receipt)]
    return Group(*parts)


def draw_plan(plan: Plan) -> RenderableType:
    """Return a table per lever: each layer's share, the attention mass it holds, and what an equal share would hold."""
    tables: list[RenderableType] = []
    for name, allocation in plan.levers.items():
        table = Table(title=f"{name}: {allocation.rule}, {describe_budget(allocation)}", title_justify="left")
        for column in ("layer", "share", "holds", "equal holds"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        widest = max(*allocation.shares, 1e-9)
        rows = zip(plan.layers, allocation.shares, allocation.retention, allocation.uniform, strict=True)
        for layer, share, held, equal in rows:
            table.add_row(str(layer), f"{share:.1%}", f"{held:.1%}", f"{equal:.1%}", "█" * round(24 * share / widest))
        n = len(plan.layers)
        held, equal = sum(allocation.retention) / n, sum(allocation.uniform) / n
        table.add_section()
        table.add_row("mean", f"{allocation.ratio:.1%}", f"{held:.1%}", f"{equal:.1%}", "")
        tables.append(table)
        if allocation.losses:
            names = {"planned": "these shares", "uniform": "equal shares", "least": "--rule loss"}
            losses = ", ".join(f"{names[name]} {nats:.2g}" for name, nats in allocation.losses.items())
            tables.append(Text(f"measured loss, nats per token, summed over layers: {losses}"))
    return Group(*tables)


def draw_proposal(proposal: Proposal) -> RenderableType:
    """Return a table of what every candidate budget holds and loses by lever, the proposed ones marked."""
    levers = list(proposal.ratios)
    title = "no budget was given; attention mass that each would hold, and what was measured to be lost"
    table = Table(title=title, title_justify="left")
    for name in ("budget", *(column for lever in levers for column in (lever, "loss")), "proposed for"):
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in proposal.candidates:
        cells = [f"{candidate.ratio:.0%}"]
        for lever in levers:
            lost = candidate.losses.get(lever)
            cells += [f"{candidate.held[lever]:.1%}", "–" if lost is None else format_loss(lost)]
        chosen = [lever for lever, ratio in proposal.ratios.items() if ratio == candidate.ratio]
        table.add_row(*cells, ", ".join(chosen), style="bold" if chosen else "")
    most = (
        "" if proposal.loses is None else f", and loses at most {proposal.loses:g} nats per token, summed over layers"
    )
    note = (
        f"proposed, of the KV cache: the smallest budget that holds {proposal.holds:.0%} of the mass, mean over layers "
        f"and prompts of the profile{most}. Another: --ratio, --retention, --tokens or --bytes"
    )
    return Group(table, Text(note))


def format_loss(nats: float) -> str:
    """Return a loss in a few letters."""
    return "<0.001" if 0 < nats < 1e-3 else f"{nats:.2g}"


def describe_budget(allocation: Allocation) -> str:
    """Return the requested budget as text."""
    budget = ", ".join(f"{name} {value:g}" for name, value in allocation.budget.items())
    return budget + (f", plus {allocation.base} records per layer" if allocation.base else "")


class Phases:
    """One line that says how far a command is: the phase that tells last is the one that is shown."""

    def __init__(self, bar: Progress | None):
        self._bar = bar

    def begin(self, title: str, *, in_bytes: bool = False) -> Tell:
        """Return the callback (done, total) of a phase, which is shown from its first call on; None: not known yet.

        Args:
            in_bytes: what is done are bytes.
        """
        bar = self._bar
        if bar is None:
            return lambda done, total: None
        task: TaskID | None = None
        shown: int | None = None

        def tell(done: int, total: int | None) -> None:
            nonlocal task, shown
            is_new = task is None or total != shown
            if task is None:
                for other in bar.task_ids:
                    bar.update(other, visible=False)
                # A phase that is taken up again where it was stopped did not do all that in no time.
                task = bar.add_task(title, total=total, completed=done, in_bytes=in_bytes)
            bar.update(task, completed=done, total=total, refresh=is_new)
            shown = total

        return tell


class _Count(ProgressColumn):
    """How much is done, of how much."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        show: Any = format_bytes if task.fields["in_bytes"] else "{:,}".format
        return Text(f"{show(int(task.completed))} of {show(int(task.total))}", style="progress.download")


@contextmanager
def show_phases(console: Console, *, quiet: bool) -> Iterator[Phases]:
    """Show on a terminal how far a command is, phase by phase; nothing of it stays there."""
    if quiet or not console.is_terminal:
        yield Phases(None)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), _Count(), TimeRemainingColumn())
    # What goes to stdout meanwhile is the answer, and perhaps in a pipe. The rate is that of all steps, not of the
    # last half minute: one may take longer.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, speed_estimate_period=MEAN_S
    ) as bar:  # fmt: skip
        yield Phases(bar)


@contextmanager
def show_progress(console: Console, title: str, *, quiet: bool) -> Iterator[Tell]:
    """Show a progress bar of one phase; yields a callback (done, total)."""
    with show_phases(console, quiet=quiet) as phases:
        tell = phases.begin(title)
        tell(0, None)
        yield tell
