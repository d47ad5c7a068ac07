"""The baselines: torch matmuls over a preallocated cache, and Hugging Face's cache and attention.

In: a case, a source of records. Out: runners. Baselines of one dtype share keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from farkv._axes import Tensor
from farkv.bench.case import Case, Traffic
from farkv.bench.fill import KVSource
from farkv.bench.torch_attention import Attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class KeyValues:
    """K and V of each layer with room for one more token, [B, Hkv, S + 1, D] each."""

    def __init__(self, case: Case, source: KVSource, dtype: torch.dtype):
        self.case, self.dtype, self.n_layers = case, dtype, case.slow_layers
        size = (case.batch, case.shape.kv_heads, case.context + 1, case.shape.head_dim)
        self.k = [torch.empty(size, dtype=dtype, device=case.device) for _ in range(self.n_layers)]
        self.v = [torch.empty_like(k) for k in self.k]
        for start, n in source.chunks(case.context):
            for layer in range(self.n_layers):
                k, v = source.draw_kv(layer, start, n, dtype)
                self.k[layer][:, :, start : start + n] = k
                self.v[layer][:, :, start : start + n] = v
        self.new = [source.draw_kv(layer, case.context, 1, dtype) for layer in range(self.n_layers)]
        self.queries = [source.draw_q(layer, case.context, 1, dtype) for layer in range(self.n_layers)]

    def old(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of the cached K and V, without the new token."""
        n = self.case.context
        return self.k[layer][:, :, :n], self.v[layer][:, :, :n]

    @property
    def traffic(self) -> Traffic:
        """Return the traffic of reading all records."""
        case = self.case
        return Traffic(1.0, case.shape.layer_bytes(case.context, case.batch, self.dtype.itemsize))


class MatmulRunner:
    """Three operations per layer, all KV heads at once: K qT, softmax, pT V.

    K is the left operand because torch's bfloat16 matmul on a CPU is fastest that way: with q on the left the second
    product takes up to twenty times as long.
    """

    least_tokens = 1

    def __init__(self, name: str, held: KeyValues):
        self.name, self.held, self.n_layers = name, held, held.n_layers

    def step(self, layer: int) -> None:
        """Write a token's K and V and attend to all records."""
        self.attend(layer)

    def attend(self, layer: int) -> Tensor:
        """Return one step's output, [B, Hq, 1, D]."""
        held, shape = self.held, self.held.case.shape
        k, v = held.k[layer], held.v[layer]
        k[:, :, -1:], v[:, :, -1:] = held.new[layer]
        batch, heads, n, dim = k.shape
        q = (held.queries[layer] * shape.scaling).view(batch * heads, -1, dim)
        logits = torch.bmm(k.view(-1, n, dim), q.mT)
        weights = torch.softmax(logits, 1, dtype=torch.float32).to(held.dtype)
        return torch.bmm(weights.mT, v.view(-1, n, dim)).view(batch, -1, 1, dim)

    def restore(self) -> None:
        """Do nothing: every step writes the same record."""

    @property
    def traffic(self) -> Traffic:
        """Return the traffic of reading all records."""
        return self.held.traffic


class HuggingFaceRunner:
    """A decode step as in Hugging Face: the cache's update, which is a torch.cat of everything, and attention."""

    least_tokens = 1

    def __init__(self, name: str, held: KeyValues, *, eager: bool = False):
        self.name, self.held, self.n_layers = name, held, held.n_layers
        self.attention = Attention(held.case.shape, eager=eager)
        self.cache = DynamicCache()
        for layer in range(self.n_layers):
            self.cache.update(*held.new[layer], layer)
            self._reset(layer)

    def _reset(self, layer: int) -> None:
        layers: list[Any] = self.cache.layers
        layers[layer].keys, layers[layer].values = self.held.old(layer)

    def step(self, layer: int) -> None:
        """Update the cache with a token's K and V and attend to all records."""
        # The copies are dropped at once, as a cache drops its old tensors; the originals are shared with other runners.
        self.attend(layer)
        self._reset(layer)

    def attend(self, layer: int) -> Tensor:
        """Return one step's output, [B, Hq, 1, D]."""
        k, v = self.cache.update(*self.held.new[layer], layer)
        return self.attention(self.held.queries[layer], k, v, None)

    def restore(self) -> None:
        """Do nothing: every step restores the cache itself."""

    @property
    def traffic(self) -> Traffic:
        """Return the traffic of reading all records, without the copy: the floor is that of a method without one."""
        return self.held.traffic
