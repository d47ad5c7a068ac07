"""The least that a step can read of a context: what no cap, however small, goes below.

In: an engine, the context's length, the KV bytes of every layer. Out: a fraction; and, where the cap that was asked for
is below it, why. Layers that are left to the door are read whole; a method has a least number of records.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from farkv.engine.step import Engine
from farkv.store.placement import Placement


class Least(NamedTuple):
    """The least fraction of the KV bytes of all layers that a step reads; why that is above the cap, or nothing."""

    fraction: float
    note: str = ""


class Cap(NamedTuple):
    """The fraction that a method keeps to; whether it was asked for, or is the method's own."""

    fraction: float
    was_asked: bool


def find_least(engine: Engine, tokens: int, sizes: dict[int, int], unmanaged: dict[int, int]) -> Least:
    """Return the least that is read of a context.

    Args:
        sizes, unmanaged: KV bytes of its layers: of those that the engine manages, and of the others, by layer.
    """
    total, others = sum(sizes.values()) + sum(unmanaged.values()), sum(unmanaged.values())
    if not total or not tokens:
        return Least(0.0)
    records = {i: count_least(engine, i, tokens) for i in sizes}
    fraction = (others + sum(n * sizes[i] / tokens for i, n in records.items())) / total
    cap = find_cap(engine)
    if cap is None:
        return Least(fraction)
    # A default gives way to its own least; what others read is still worth a word where it is more than that.
    reads = max(fraction, (others + cap.fraction * (total - others)) / total)
    if (reads if cap.was_asked else others / total) <= cap.fraction + 1e-9:
        return Least(fraction)
    why: list[str] = []
    if others:
        n = sum(size > 0 for size in unmanaged.values())
        why.append(f"{n} of {n + len(sizes)} layers are not managed and read all they hold, {others / total:.1%}")
    if sizes and max(records.values()) > cap.fraction * tokens:
        why.append(f"a managed layer reads at least {max(records.values()):,} of {tokens:,} records per KV head")
    note = f"fraction {cap.fraction:g} cannot be kept to: about {reads:.1%} of the KV bytes are read per step, "
    return Least(fraction, note + f"{fraction:.1%} at the least ({'; '.join(why)})")


def describe_crossover(engine: Engine, tokens: int) -> str:
    """Return whether a context is read whole because that is faster; nothing where that is not asked."""
    budgets, how = engine.parts.budgets, engine.setup.setting.kernels.dense_how
    most, decides = budgets.cap.dense_tokens, budgets.shares is None
    if not decides or not most or tokens <= budgets.cap.least:
        return ""
    if tokens <= most:
        said = (
            f"read everything: {tokens:,} tokens are not above the crossover of {most:,}, from which choosing is faster"
        )
    else:
        said = f"chose what to read: {tokens:,} tokens are above the crossover of {most:,}, up to which all is read"
    remedy = "" if how == "measured" else "; farkv bench --calibrate --model NAME measures it"
    return f"{said} ({how}{remedy})"


def count_least(engine: Engine, layer: int, tokens: int) -> int:
    """Return the fewest records per KV head that a decode step reads of one layer's `tokens`, the newest included."""
    parts, kept = engine.parts, tokens
    shares = parts.eviction.shares
    if shares is not None:
        # Its share, and the newest token while that is read.
        kept = min(tokens, shares.count_least(tokens) + (0 if shares.rule.grows else 1))
    if parts.selector.reads_all(layer):
        return kept
    budgets, placement = parts.budgets, parts.store.placement
    ends_early = parts.selector.rule is not None and parts.selector.cap.fraction < 1
    skips_pages = parts.selector.limits_pages and placement is Placement.DISK and budgets.share_of(layer) < 1
    return 1 if ends_early or skips_pages else min(kept, budgets.count_floor(tokens))


def find_cap(engine: Engine) -> Cap | None:
    """Return the fraction that bounds what is read; None where only a plan, or another budget, does."""
    parts = engine.parts
    shares, budgets = parts.eviction.shares, parts.budgets
    if budgets.shares is not None:
        return Cap(sum(budgets.shares.values()) / len(budgets.shares), was_asked=True)
    if parts.evictor is None or shares is None or not all(map(parts.selector.reads_all, engine.layers)):
        return make_cap(parts.selector.config, parts.selector.cap.fraction)
    rule = shares.rule
    if shares.is_planned or rule.tokens is not None or rule.retention is not None:
        return None
    return make_cap(parts.evictor.config, rule.fraction)


def make_cap(config: Any, default: float) -> Cap:
    """Return the fraction of a method's config, or the method's own where that was left out."""
    asked = getattr(config, "fraction", None)
    return Cap(default if asked is None else asked, asked is not None)
