"""The sequences of another engine continue in this one's batch: records, padding, and what the method keeps of them.

In: two engines of one method and model. Out: one with both batches, each sequence as it was; the other is empty.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Bool, Tensor
from farkv.account import ROUNDING
from farkv.engine.bank import Sequence
from farkv.engine.bytes_near import plan_near
from farkv.engine.step import Engine
from farkv.engine.usage import find_exact
from farkv.errors import CacheStateError
from farkv.store.join import admit_join, check_join, join_layer


def join_engines(engine: Engine, other: Engine) -> None:
    """Join two engines; shorter sequences are padded on the left.

    Raises:
        CacheStateError: they are not of one method, or not in plain pools.
        CapacityError: a limit cannot hold both; nothing has changed.
    """
    if engine is other or describe(engine) != describe(other):
        raise CacheStateError(
            "join: expected two caches made by one attached model, of one method and the same limits; "
            "make both with new_cache() of the same handle"
        )
    check_join(engine.store, other.store)
    first, pair = engine.layers[0], (engine, other)
    n_tokens = max(each.store.seen(first) for each in pair)
    batches = engine.store.batch(first), other.store.batch(first)
    shape = engine.store.shape(first)._replace(batch=sum(batches))
    room = max(n_tokens, engine.store.limits.reserve_tokens)
    need, limits = engine.parts.admission.count_join(shape, room)
    admit_join((engine.store, other.store), shape, room, plan_near(need, limits, room).need)
    for each in pair:
        # What was used recently would take the room of the joined index.
        each.store.drop_recently_used()
        each.pending.clear()
    join_banks(engine, other)
    real = join_real(engine, other, n_tokens)
    engine.padding.set(real, real)
    for layer in engine.layers:
        lengths = engine.store.length(layer), other.store.length(layer)
        engine.selector.join(other.selector, layer, batches, lengths)
        join_layer(engine.store, other.store, layer)
    # What each read alone the plain model would have read in one batch, or not at all.
    for how in (find_exact(engine), find_exact(other), ROUNDING):
        engine.account.note_exact(how)
    # Where a token stands after the join is another question.
    engine.dense_tokens = 0 if min(engine.dense_tokens, other.dense_tokens) < n_tokens else engine.dense_tokens
    engine.store.max_error = max(engine.store.max_error, other.store.max_error)
    for layer in other.layers:
        other.clear(layer)


def join_banks(engine: Engine, other: Engine) -> None:
    """Let both go on with what their sequences have read; one that has chosen nothing yet begins anew."""
    for each in (engine, other):
        bank = each.parts.bank
        if not bank.sequences:
            bank.sequences = [Sequence()] * each.store.batch(each.layers[0])
    engine.parts.bank.join(other.parts.bank)


def describe(engine: Engine) -> tuple[Any, ...]:
    """Return what two engines must have in common."""
    selector, limits = engine.selector, engine.store.limits._replace(reserve_tokens=0)
    setting = engine.setup.setting
    return type(selector), selector.config, selector.cap, setting.profile, setting.levers, engine.layers, limits


def join_real(engine: Engine, other: Engine, n_tokens: int) -> Bool[Tensor, "B S"] | None:
    """Return which tokens of the joined batch are real; None where all are."""
    parts: list[Tensor] = []
    padded = False
    for each in (engine, other):
        seen, n_sequences = each.store.seen(each.layers[0]), each.store.batch(each.layers[0])
        real = each.padding.of_tokens(seen, ever=True)
        padded = padded or real is not None or seen < n_tokens
        if real is None:
            real = torch.ones(1, seen, dtype=torch.bool, device=each.store.device)
        parts.append(torch.nn.functional.pad(real.expand(n_sequences, -1), (n_tokens - seen, 0), value=False))
    return torch.cat(parts) if padded else None
