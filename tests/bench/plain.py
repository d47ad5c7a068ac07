"""A shape that takes no time, and the native interface in plain torch: what the benchmarks are tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from farkv.bench.shapes import ModelShape
from farkv.kernels.native import IndexView, Native, Rows
from farkv.kernels.ways import Drawn
from farkv.math.logits import Logits
from farkv.store.far.quantize import Codec

TINY = ModelShape("tiny", "llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=96)


def attend_all(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return attention in float64, [B, Hq, 1, Dv]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    return torch.softmax(scaling * q.double() @ k.mT, -1) @ v


class PlainNative(Native):
    """The interface, without a library behind it; reads 2 GB/s and gathers 1 GB/s."""

    def __init__(self) -> None:
        self.name = "native-plain"

    def select(
        self,
        q: Tensor,
        index: IndexView,
        logits: Logits,
        *,
        cap: int,
        n: int,
        sinks: int = 0,
        taken: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> Tensor:
        heads = index.codes.shape[:2]
        if drawn is not None:
            drawn.odds.zero_()
        return torch.rand(*heads, n).topk(cap, -1).indices.sort(-1).values

    def attend(
        self,
        q: Tensor,
        rows: Rows,
        logits: Logits,
        *,
        positions: Tensor | None,
        n: int,
        tail: int = 0,
        sinks: Tensor | None = None,
        odds: Tensor | None = None,
    ) -> Tensor:
        assert odds is None or not odds.any()
        data = rows.data[:, :, :n]
        if rows.form != "plain":
            data = Codec(rows.form, rows.k_dim, rows.v_dim, q.dtype).decode(data)
        if positions is not None:
            newest = torch.arange(n - tail, n).expand(*positions.shape[:2], -1)
            at = torch.cat([positions, newest], -1)[..., None].expand(-1, -1, -1, data.shape[-1])
            data = data.gather(2, at)
        k, v = data[..., : rows.k_dim], data[..., rows.k_dim :]
        return attend_all(q, k, v, logits.scaling).to(q.dtype)

    def gather(self, data: Tensor, heads: Tensor, positions: Tensor, out: Tensor) -> None:
        rows = data.flatten(0, 1)[heads.long(), positions.long()]
        out.copy_(rows.view(out.shape))

    def read_bandwidth(self, data: Tensor) -> float:
        return 2e9

    def gather_bandwidth(self, data: Tensor, positions: Tensor, row_bytes: int) -> float:
        assert torch.equal(positions, positions.unique())
        assert int(positions.max()) < data.numel() // row_bytes
        return 1e9

    def can_read(self, dtype: torch.dtype) -> bool:
        return True
