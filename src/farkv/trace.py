"""A trace of reads: which parts of the context attention read at which decode steps, summed in buckets per layer.

In: the positions that attention read, once per layer and decode step. Out: the mean fraction of each bucket's records
that a step and head read, as plain lists. Knows nothing of methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from farkv._axes import Bool, Float, Int, Tensor


@dataclass
class LayerTrace:
    """One layer's sums, [steps, positions]: records read and records present. They stay on the layer's device."""

    read: Float[Tensor, "steps buckets"]
    present: Float[Tensor, "steps buckets"]
    steps: int = 0


class ReadTrace:
    """Counts the records read, in buckets of decode steps and positions, for one prompt.

    Args:
        tokens: prompt length.
        steps: expected decode steps; later ones are added to the last bucket.
        step_buckets, position_buckets: maximum number of buckets; their sizes differ by at most one.

    Cost: two arrays of step_buckets * position_buckets floats per layer; `note` adds its positions without a sync.
    """

    def __init__(self, tokens: int, steps: int, *, step_buckets: int = 16, position_buckets: int = 64):
        self.step_edges = cut_evenly(max(1, steps), step_buckets)
        self.position_edges = cut_evenly(max(1, tokens + steps), position_buckets)
        self.layers: dict[int, LayerTrace] = {}

    def note(
        self, layer: int, positions: Int[Tensor, "B Hkv K"], valid: Bool[Tensor, "B Hkv K"] | None, tokens: int
    ) -> None:
        """Add one decode step of a layer.

        Args:
            positions: token positions in the context whose records were read.
            valid: which of them count; None: all.
            tokens: context length at this step.
        """
        device = positions.device
        edges = torch.tensor(self.position_edges, device=device)
        if layer not in self.layers:
            sums = torch.zeros(2, len(self.step_edges) - 1, len(edges) - 1, dtype=torch.float64, device=device)
            self.layers[layer] = LayerTrace(sums[0], sums[1])
        of_layer = self.layers[layer]
        row = sum(edge <= of_layer.steps for edge in self.step_edges[1:-1])
        of_layer.steps += 1
        # Positions past the last edge are added to the last bucket.
        at = torch.bucketize(positions.reshape(-1), edges[1:-1], right=True)
        counts = torch.ones_like(at) if valid is None else valid.reshape(-1)
        of_layer.read[row].index_add_(0, at, counts.double())
        ends = edges[1:].clamp(max=tokens)
        ends[-1] = max(tokens, self.position_edges[-2])
        sizes = (ends - edges[:-1]).clamp(min=0)
        of_layer.present[row] += sizes * (positions.shape[0] * positions.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """Return {"layers", "step_edges", "position_edges", "read": [layer][step][position]}; empty buckets are 0."""
        layers = sorted(self.layers)
        return {
            "layers": layers,
            "step_edges": list(self.step_edges),
            "position_edges": list(self.position_edges),
            "read": [(self.layers[i].read / self.layers[i].present.clamp(min=1)).tolist() for i in layers],
        }


def cut_evenly(n: int, most: int) -> list[int]:
    """Return the edges of at most `most` buckets over 0 .. n, none of them empty."""
    n_buckets = min(n, most)
    return [i * n // n_buckets for i in range(n_buckets + 1)]
