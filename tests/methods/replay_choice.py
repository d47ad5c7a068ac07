"""What a method chose, seen from outside: queries and budgets as they went in, records as they were read.

In: a model and a method. Out: per decode step and layer the true query, the stored keys, which tokens are real and
which were read. The rule of the frame (sinks, window, newest, cap) is written out here a second time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import farkv
from tests.hf.tape import Tape, check_replay
from tests.models import generate


class Choice(NamedTuple):
    """One sequence and KV head at one step of one layer, in float64."""

    scaling: float
    q: Tensor
    keys: Tensor
    real: list[int]
    read: set[int]
    where: tuple[int, int, int, int]


def record(model: Any, method: Any, prompt: dict[str, Tensor], near: str | None, **options: Any) -> list[Choice]:
    """Generate, check attention densely, and return every choice."""
    with farkv.attach(model, method, near=near, kernel="plain") as far:
        cache = far.new_cache()
        chooser, queries = cache.engine.parts.chooser, []
        choose = chooser.choose

        def keep(records: Any, query: Any, *args: Any) -> Any:
            queries.append((records.layer, query, records.keys(0, records.length).clone()))
            return choose(records, query, *args)

        chooser.choose = keep
        with Tape(model, cache) as tape:
            generate(model, prompt, cache, n=5, **options)
        del chooser.choose
    check_replay(model, tape)
    reads = [(layer, read) for p in tape.decode() for layer, read in p.reads.items()]
    assert len(reads) == len(queries) > 0
    found: list[Choice] = []
    for (layer, query, keys), (at, (positions, valid)) in zip(queries, reads, strict=True):
        assert layer == at
        found += list_choices(prompt, (layer, query, keys), positions, valid)
    return found


def list_choices(prompt: Any, asked: Any, positions: Tensor, valid: Tensor | None) -> list[Choice]:
    layer, query, keys = asked
    batch, heads, n, dim = keys.shape
    grouped = query.q.double().reshape(batch, heads, -1, dim)
    mask = prompt["attention_mask"]
    out = []
    for b in range(batch):
        real = [t for t in range(n) if t >= mask.shape[1] or mask[b, t]]
        for h in range(heads):
            row = positions[b, h] if valid is None else positions[b, h][valid[b, h]]
            read = row.tolist()
            assert len(read) == len(set(read))
            out.append(
                Choice(query.logits.scaling, grouped[b, h], keys[b, h].double(), real, set(read), (layer, b, h, n))
            )
    return out


def divide(real: list[int], cap: int) -> tuple[set[int], list[int]]:
    """Return what is read whatever its score, and what is scored: sinks are, window and newest token are not.

    Sinks and window are at most a quarter of the cap.
    """
    sinks = min(4, cap // 4 // 2)
    window = min(16, cap // 4 - sinks)
    scored, tail = real[: -window - 1], real[-window - 1 :]
    return {*real[:sinks], *tail}, scored


def pool(logits: Tensor) -> Tensor:
    """Return the log of the mean weight that the query group gives."""
    return logits.softmax(-1).mean(0).log()
