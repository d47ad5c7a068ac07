"""How much of the true attention weight a step's choice holds: asked on verified steps, never on others."""

from __future__ import annotations

import torch

from farkv._axes import Bool, Tensor
from farkv.methods.contract import Step
from farkv.per_token.attend import measure_mass, weigh_keys
from farkv.store.records import Read
from farkv.store.tiers import Tiers


def measure_found(
    store: Tiers, layer: int, step: Step, read: Read | None, real: Bool[Tensor, "B S"] | None
) -> tuple[float, float]:
    """Return the mean and the least mass over sequences and KV heads.

    Weights are over every token, evicted ones too: the store remembers them while steps are verified.

    Args:
        read: what was chosen; None where all that is stored was read.
        real: False on padding.
    """
    keys = store.all_keys(layer)
    n_rows = store.length(layer)
    if read is None and n_rows == keys.shape[2]:
        return 1.0, 1.0
    rows = torch.arange(n_rows, device=keys.device).expand(*step.k.shape[:2], -1)
    positions = store.locate(layer, (rows if read is None else read.positions).to(keys.device))
    visible = None if real is None else real[:, None].to(keys.device)
    query = step.query
    weights = weigh_keys(query.q.to(keys.device), keys, visible, query.scaling, query.softcap)
    valid = None if read is None or read.valid is None else read.valid.to(keys.device)
    mass = measure_mass(weights, positions, valid)
    # A deliberate sync: verified steps are not timed.
    return float(mass.mean()), float(mass.min())
