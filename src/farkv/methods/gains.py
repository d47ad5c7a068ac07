"""Which heads of a layer gain by drawing their records: tried on the prompt itself, once per fit.

In: a layer's records, its index, a sample of the prompt's queries. Out: 1 for a head that gains, else 0. Every
sequence of a batch is tried as if it were alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv._axes import Bool, Float, Float32, Tensor
from farkv.math.sample import thin_columns
from farkv.math.sampling import Seen, find_gains
from farkv.methods.base import Cap, Records
from farkv.methods.coder import Coder
from farkv.methods.records import find_real
from farkv.store.near.index import LayerIndex, Projection


class Trial(NamedTuple):
    """What is tried: reading so much of the records, by an index of this kind, in so many layers."""

    cap: Cap
    coder: Coder
    n_layers: int


# Records and queries that both ways of reading are tried on, at most; queries are of the prompt's second half.
TRIED_KEYS, TRIED_QUERIES = 4096, 8
# Heads of all layers, at least: what draws add to one head's error averages out over the others. Three (Gemma 3 270M)
# are too few, 48 (Qwen 0.5B) are enough; in between nothing was measured.
LEAST_HEADS = 16
# Of what a step reads, what sinks and window take at most.
FORCED = 4


def try_heads(
    records: Records,
    queries: Float[Tensor, "B Hq M D"],
    index: LayerIndex,
    trial: Trial,
    due: list[int],
    n_rows: int,
) -> Float32[Tensor, "B Hkv 1 1"]:
    """Return which heads of the sequences `due` gain, 0 where there is too little to tell or the model has few.

    Args:
        queries: of these sequences, times the softmax scaling, zeros after each one's last.
        index: it has the codes of the prompt's rows.
        n_rows: the prompt's rows.

    Cost: 4,096 records read once; see `math.sampling.find_gains`.
    """
    columns, valid = thin_columns(n_rows, find_real(records, n_rows), TRIED_KEYS, queries.device)
    assert index.projection is not None
    if trial.n_layers * records.shape.kv_heads < LEAST_HEADS:
        return torch.zeros(len(due), records.shape.kv_heads, 1, 1, dtype=torch.float32)
    keys, values, codes = records.keys(0, n_rows), records.values(), index.codes()
    lengths, found = records.count_real(n_rows), []
    for i, b in enumerate(due):
        own = columns[0] if valid is None else columns[b][valid[b]]
        asked = queries[i : i + 1][:, :, : count_queries(queries[i])]
        n_keys, n_asked = len(own), asked.shape[2]
        if n_keys * trial.cap.fraction < 2 or n_asked < TRIED_QUERIES:
            found.append(torch.zeros(1, records.shape.kv_heads, dtype=torch.float32))
            continue
        at = torch.linspace(n_asked // 2, n_asked - 1, TRIED_QUERIES).long()
        asked = asked[:, :, at].unflatten(1, (records.shape.kv_heads, -1))
        mine = Projection._make(t[b : b + 1] if t.shape[0] > 1 else t for t in index.projection)
        own_keys, own_codes = keys[b : b + 1, :, own], codes[b : b + 1, :, own]
        projected = asked.float().flatten(2, 3) @ mine.query
        told = (projected @ trial.coder.decode(own_codes, mine).mT).unflatten(2, asked.shape[2:4])
        # Both samples are even: a query stands among the keys as it does among the queries.
        sees = torch.arange(n_keys, dtype=torch.float32) / n_keys <= at[:, None] / n_asked
        forced = find_forced(sees, trial)
        seen = Seen(asked, own_keys, values[b : b + 1, :, own], told, sees[None, None, None], forced[None, None, None])
        # A head at a time: all of them at once would take as much memory as their keys and values, several times.
        heads = (Seen._make(t if t.shape[1] == 1 else t[:, h : h + 1] for t in seen) for h in range(seen.keys.shape[1]))
        gains = [find_gains(head, trial.cap.fraction, lengths[b] / n_keys) for head in heads]
        found.append(torch.cat(gains, 1).float())
    return torch.cat(found)[..., None, None]


def find_forced(sees: Bool[Tensor, "M N"], trial: Trial) -> Bool[Tensor, "M N"]:
    """Return which of the records that a query sees are sinks or in its window, as the engine would have them."""
    n_seen = sees.sum(-1, keepdim=True)
    forced = (n_seen * trial.cap.fraction).long() // FORCED
    sinks = (forced // 2).clamp_max(trial.cap.sinks)
    window = (forced - sinks).clamp_max(trial.cap.window)
    at = torch.arange(sees.shape[1])
    return sees & ((at < sinks) | (at >= n_seen - window))


def count_queries(queries: Float[Tensor, "Hq M D"]) -> int:
    """Return how many queries there are before the zeros. A deliberate sync, once per fit and sequence."""
    return int((queries.abs().amax((0, 2)) > 0).sum())
