"""How much of the true attention weight a step's choice holds: asked on verified steps, never on others."""

from __future__ import annotations

import torch

from farkv.engine.records import LayerRecords
from farkv.math.attention import measure_mass
from farkv.math.score import score_keys
from farkv.math.step import Step
from farkv.store.records import Read


def measure_found(records: LayerRecords, step: Step, read: Read | None) -> tuple[float, float]:
    """Return the mean and the least mass over sequences and KV heads.

    Weights are over every token, evicted ones too: the store remembers them while steps are verified.

    Args:
        read: what was chosen; None where all that is stored was read.
    """
    store, layer, n_rows = records.store, records.layer, records.length
    if read is None and not store.evicted[layer]:
        return 1.0, 1.0
    blocks = [store.all_keys(layer)] if layer in store.shadow else records.key_blocks(0, n_rows)
    parts = [score_keys(step.query.q.to(keys.device), keys, step.query.logits) for keys in blocks]
    scores = torch.cat(parts, -1)
    rows = torch.arange(n_rows, device=scores.device).expand(*step.k.shape[:2], -1)
    positions = store.locate(layer, (rows if read is None else read.positions).to(scores.device))
    real = None if step.plain_mask is None else step.plain_mask[:, 0, -1]
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None].to(scores.device), -torch.inf)
    valid = None if read is None or read.valid is None else read.valid.to(scores.device)
    mass = measure_mass(scores.softmax(-1)[:, :, :, None], positions, valid)
    # A deliberate sync: verified steps are not timed.
    return float(mass.mean()), float(mass.min())
