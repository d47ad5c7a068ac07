"""Terminal output: receipts and plans as tables that fit 80 columns, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from farkv.calibrate.plan import Allocation, Plan
from farkv.config import format_bytes
from farkv.receipt import BIT, INEXACT, ROUNDING, Receipt

EXACT_WORDS = {
    BIT: "the plain model's attention over all records",
    ROUNDING: "all was read, sums in another order",
    INEXACT: "records were left out or coded",
}


def draw_receipt(receipt: Receipt) -> RenderableType:
    """Return the receipt as a table: bytes read, held and moved, time and quality."""
    table = Table(title=f"receipt: {receipt.method}", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for name, value, note in rows_of(receipt):
        table.add_row(name, value, note)
    parts: list[RenderableType] = [table]
    unmanaged = [row for row in receipt.layers if not row.managed]
    if unmanaged:
        names = ", ".join(f"{row.layer} ({row.why})" for row in unmanaged[:4])
        more = f" and {len(unmanaged) - 4} more" if len(unmanaged) > 4 else ""
        parts.append(Text(f"not managed: layer {names}{more}", style="yellow"))
    if receipt.weights.source is not None:
        parts.append(Text(f"weights: {receipt.weights.dtype}, from {receipt.weights.source}", style="yellow"))
    parts += [Text(note, style="yellow") for note in receipt.notes]
    if receipt.fallbacks:
        parts.append(Text(f"fallbacks: {receipt.fallbacks}", style="yellow"))
    return Group(*parts)


def rows_of(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Return (name, value, note) for each row."""
    size, limits, time = receipt.kv_bytes, receipt.limits, receipt.time

    def of(limit: int | None) -> str:
        return f"limit {format_bytes(limit)}" if limit else "no limit"

    rows = [
        ("context", f"{receipt.context_tokens:,} tokens", f"full KV cache {format_bytes(size.total)}"),
        ("read per step", f"{receipt.read_fraction:.1%}", "of the KV bytes, all layers"),
        ("index scored", f"{receipt.index_fraction:.1%}", "of the KV bytes, per step"),
        ("held near", f"{receipt.resident_fraction:.1%}", "of the KV bytes, at the peak"),
        ("kept", f"{receipt.kept_fraction:.1%}", f"{receipt.evicted_records:,} records evicted"),
        *rows_of_managed(receipt),
        ("fetched", format_bytes(receipt.fetched_bytes_per_token), "per token, over the link"),
        ("near peak", format_bytes(size.near_peak), f"{of(limits.near)}; index {format_bytes(size.index_peak)}"),
        ("host peak", format_bytes(size.host_peak), of(limits.host)),
        *rows_of_disk(receipt),
        ("prefill", f"{time.prefill_s:.2f} s", ""),
        ("decode", f"{time.decode_s:.2f} s", f"{time.tokens_per_s:.1f} tokens/s, question included"),
    ]
    if receipt.quality is not None:
        q = receipt.quality
        rows += [
            ("verified", f"{q.steps} steps", f"top-1 as full attention: {q.top1_agreement:.1%}"),
            ("KL to full", f"{q.kl_mean:.2g}", "nats, mean"),
            ("mass found", f"{q.mass_mean:.1%}", f"of the attention weight; worst {q.mass_min:.1%}"),
        ]
    rows += [("kernel", receipt.kernel, ""), ("exact", receipt.exact, EXACT_WORDS[receipt.exact])]
    return rows


def rows_of_managed(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Return what is read and held of the managed layers alone, and the least of all, where they say more."""
    rows: list[tuple[str, str, str]] = []
    for name, whole, part in (
        ("read", receipt.read_fraction, receipt.managed_read_fraction),
        ("near", receipt.resident_fraction, receipt.managed_resident_fraction),
        ("kept", receipt.kept_fraction, receipt.managed_kept_fraction),
    ):
        if f"{whole:.1%}" != f"{part:.1%}":
            rows.append((f"managed, {name}", f"{part:.1%}", "of the KV bytes of managed layers"))
    if f"{receipt.peak_read_fraction:.1%}" != f"{receipt.read_fraction:.1%}":
        rows.append(("most in a step", f"{receipt.peak_read_fraction:.1%}", "of the KV bytes, read by one step"))
    if receipt.notes:
        rows.append(("least possible", f"{receipt.least_read_fraction:.1%}", "of the KV bytes, read per step"))
    return rows


def rows_of_disk(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Return the rows about the disk and quantised storage; none where neither is in use."""
    rows, size, limit = [], receipt.kv_bytes, receipt.limits.disk
    if size.disk_peak or receipt.disk_bytes_per_token:
        note = f"limit {format_bytes(limit)}" if limit else "no limit"
        rows.append(("disk peak", format_bytes(size.disk_peak), note))
        rows.append(("read from disk", format_bytes(receipt.disk_bytes_per_token), "per token"))
    if receipt.quant.host is not None:
        rows.append(("stored as", receipt.quant.host, f"largest error {receipt.quant.max_error:.2g}"))
    return rows


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


def describe_budget(allocation: Allocation) -> str:
    """Return the requested budget as text."""
    budget = ", ".join(f"{name} {value:g}" for name, value in allocation.budget.items())
    return budget + (f", plus {allocation.base} records per layer" if allocation.base else "")


@contextmanager
def show_progress(console: Console, title: str, *, quiet: bool) -> Iterator[Any]:
    """Show a progress bar; yields a callback (done, total)."""
    if quiet or not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
