"""How much of the true attention weight a step's choice holds: asked on verified steps, never on others."""

from __future__ import annotations

import torch

from farkv._axes import Bool, Float32, Tensor
from farkv.math.attention import measure_mass
from farkv.math.score import score_keys
from farkv.methods.contract import Query, Step
from farkv.store.records import Read
from farkv.store.tiers import BLOCK_TOKENS, Tiers


def score_stored(
    store: Tiers, layer: int, query: Query, n_rows: int, *, whole: bool = False
) -> Float32[Tensor, "B Hkv G S"]:
    """Return the true logits of a query over a layer's first `n_rows` keys, where they are stored.

    Keys that cannot be read in place are read a block at a time.

    Args:
        whole: over every token instead, evicted ones too, where they are remembered.
    """
    if whole and layer in store.shadow:
        blocks = [store.all_keys(layer)]
    else:
        n = BLOCK_TOKENS if store.apart else max(1, n_rows)
        blocks = (store.keys(layer, start, min(start + n, n_rows)) for start in range(0, n_rows, n))
    scores = [score_keys(query.q.to(keys.device), keys, query.scaling, query.softcap) for keys in blocks]
    return torch.cat(scores, -1) if len(scores) > 1 else scores[0]


def measure_found(
    store: Tiers, layer: int, step: Step, read: Read | None, real: Bool[Tensor, "B S"] | None
) -> tuple[float, float]:
    """Return the mean and the least mass over sequences and KV heads.

    Weights are over every token, evicted ones too: the store remembers them while steps are verified.

    Args:
        read: what was chosen; None where all that is stored was read.
        real: False on padding.
    """
    n_rows = store.length(layer)
    if read is None and not store.evicted[layer]:
        return 1.0, 1.0
    scores = score_stored(store, layer, step.query, n_rows, whole=True)
    rows = torch.arange(n_rows, device=scores.device).expand(*step.k.shape[:2], -1)
    positions = store.locate(layer, (rows if read is None else read.positions).to(scores.device))
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None].to(scores.device), -torch.inf)
    valid = None if read is None or read.valid is None else read.valid.to(scores.device)
    mass = measure_mass(scores.softmax(-1)[:, :, :, None], positions, valid)
    # A deliberate sync: verified steps are not timed.
    return float(mass.mean()), float(mass.min())
