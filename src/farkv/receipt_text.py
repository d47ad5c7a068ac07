"""A receipt in words: the rows of its table, as plain text and for a notebook. In: a receipt. Out: text."""

from __future__ import annotations

from html import escape
from typing import Any

from farkv.config import format_bytes

# A `Receipt`, which prints itself by this: it is named there.
Receipt = Any

# By `receipt.exact`.
EXACT_WORDS = {
    "bit": "the plain model's attention over all records",
    "rounding": "all was read, sums in another order",
    "verified": "full attention over all records decided every token",
    "no": "records were left out or coded",
}
# By `receipt.stop_reason`.
STOP_WORDS = {
    "end": "the model ended its answer",
    "length": "the answer is as long as it may be",
    "stop_string": "a stop string was found",
    "time": "the time was over",
    "interrupted": "it was interrupted",
    None: "",
}
# By the name in `receipt.fallbacks`: what its count is of, and what happened.
FALLBACK_WORDS = {
    "refit": ("refits of a layer's index", "the text had drifted away from what it was fitted to"),
    "skew_from_prompt": ("layers' skews", "no profile has them, so they were fitted to the prompt's own queries"),
    "identity_skew": ("layers' indexes", "heads whose queries or keys are not finite are indexed unskewed"),
    "not_finite": ("verified steps", "logits are not finite, so there is no distance to compare"),
    "generic_query": ("layers", "their query cannot be formed alone, so the whole block was run up to attention"),
    "whole_guesses": ("passes of guessed tokens", "they read all that is kept, not what each would choose"),
    "own_query": (
        "estimates",
        "the next layer's query could not be estimated, so its own chose, and had to wait",
    ),
}
# Layers in a row of bars.
BAR_LAYERS = 64


def format_receipt(receipt: Receipt) -> str:
    """Return the table as text of at most 80 columns."""
    rows = rows_of(receipt)
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"receipt: {receipt.method}, {receipt.model}"]
    lines += [f"{name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows]
    return "\n".join([*lines, *describe_notes(receipt)])


def format_html(receipt: Receipt) -> str:
    """Return the table for a notebook, with a bar per layer: what share of its records a step reads."""
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align:right'>{escape(value)}</td><td>{escape(note)}</td></tr>"
        for name, value, note in rows_of(receipt)
    )
    notes = "".join(f"<div>{escape(note)}</div>" for note in describe_notes(receipt))
    shares = [row.read_fraction for row in receipt.layers][:BAR_LAYERS]
    top = max(shares, default=0.0)
    bars = "".join(
        f"<span title='layer {row.layer}: {row.read_fraction:.1%} read' style='display:inline-block;width:6px;"
        f"margin-right:1px;background:#4878a8;height:{round(2 + 30 * row.read_fraction / top) if top else 2}px'></span>"
        for row in receipt.layers[:BAR_LAYERS]
    )
    picture = f"<div>read per layer, at most {top:.1%}</div><div style='height:34px'>{bars}</div>" if shares else ""
    title = f"<b>{escape(receipt.method)}</b>, {escape(receipt.model)}"
    return f"<div>{title}<table>{cells}</table>{picture}{notes}</div>"


def describe_notes(receipt: Receipt) -> list[str]:
    """Return what is to be known besides: layers that are not managed, rounded weights, what fell back."""
    notes: list[str] = []
    unmanaged = [row for row in receipt.layers if not row.managed]
    if unmanaged:
        names = ", ".join(f"{row.layer} ({row.why})" for row in unmanaged[:4])
        more = f" and {len(unmanaged) - 4} more" if len(unmanaged) > 4 else ""
        notes.append(f"not managed: layer {names}{more}")
    if receipt.weights.source is not None:
        notes.append(f"weights: {receipt.weights.dtype}, from {receipt.weights.source}")
    notes += receipt.notes
    if receipt.session_tokens:
        notes.append(f"{receipt.session_tokens:,} tokens were not read: they came from a session")
    for name, n in receipt.fallbacks.items():
        counted, what = FALLBACK_WORDS[name]
        notes.append(f"{n:,} {counted}: {what}")
    return notes


def rows_of(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Return (name, value, note) for each row."""
    size, limits, time = receipt.kv_bytes, receipt.limits, receipt.time

    def of(limit: int | None) -> str:
        return f"limit {format_bytes(limit)}" if limit else "no limit"

    rows = [
        ("context", f"{receipt.context_tokens:,} tokens", f"full KV cache {format_bytes(size.total)}"),
        *rows_of_asked(receipt),
        ("read per step", f"{receipt.read_fraction:.1%}", "of the KV bytes, all layers"),
        ("index scored", f"{receipt.index_fraction:.1%}", "of the KV bytes, per step"),
        ("held near", f"{receipt.resident_fraction:.1%}", "of the KV bytes, at the peak"),
        ("kept", f"{receipt.kept_fraction:.1%}", f"{receipt.evicted_records:,} records evicted"),
        *rows_of_managed(receipt),
        ("fetched", format_bytes(receipt.fetched_bytes_per_token), "per token, over the link"),
        ("near peak", format_bytes(size.near_peak), f"{of(limits.near)}; index {format_bytes(size.index_peak)}"),
        ("host peak", format_bytes(size.host_peak), of(limits.host)),
        *rows_of_disk(receipt),
        *rows_of_process(receipt),
        ("prefill", f"{time.prefill_s:.2f} s", ""),
        ("decode", f"{time.decode_s:.2f} s", f"{time.tokens_per_s:.1f} tokens/s, question included"),
    ]
    if time.first_token_s is not None:
        rows.append(("first token", f"{time.first_token_s:.2f} s", "after reading began"))
    rows.append(("in all", f"{time.total_s:.2f} s", STOP_WORDS[receipt.stop_reason]))
    if receipt.quality is not None:
        q = receipt.quality
        rows += [
            ("verified", f"{q.steps} steps", f"top-1 as full attention: {q.top1_agreement:.1%}"),
            ("KL to full", f"{q.kl_mean:.2g}", "nats, mean"),
            ("mass found", f"{q.mass_mean:.1%}", f"of the attention weight; worst {q.mass_min:.1%}"),
        ]
    rows += rows_of_drafts(receipt)
    rows += [("kernel", receipt.kernel, ""), ("exact", receipt.exact, EXACT_WORDS[receipt.exact])]
    return rows


def rows_of_drafts(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Return what stood of drafted tokens, and what they gained, where there were any."""
    drafts = receipt.drafts
    if drafts is None:
        return []
    stood = "none" if drafts.acceptance is None else f"{drafts.acceptance:.1%}"
    rows = [("drafts stood", stood, f"of {drafts.tried}; {drafts.rounds} passes over all gave {drafts.tokens} tokens")]
    if drafts.speedup is not None:
        rows.append(("drafts gained", f"{drafts.speedup:.2f} x", "over plain decoding, as measured on the way"))
    return rows


def rows_of_asked(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Return the cap that was asked for; none where it was left out."""
    asked = receipt.fraction_asked
    return [] if asked is None else [("asked for", f"{asked:.1%}", f"of the KV bytes, at most, by {receipt.method}")]


def rows_of_process(receipt: Receipt) -> list[tuple[str, str, str]]:
    """Return what the process took, and what the model runs on."""
    rss, threads = receipt.rss, f"{receipt.threads} thread" + ("s" if receipt.threads != 1 else "")
    peak = "unknown" if rss.peak is None else format_bytes(rss.peak)
    return [
        ("process peak", peak, f"resident; the model's weights {format_bytes(rss.weights)}"),
        ("runs on", receipt.device, f"{receipt.weights.dtype}, {threads}"),
    ]


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
    if receipt.notes and f"{receipt.least_read_fraction:.1%}" != f"{receipt.read_fraction:.1%}":
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
