"""Plain code that evicts: a whole cache, a mask of what is left of it, and one loop per layer, in float64."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def places(store: Any, layer: int) -> Tensor:
    """Return which tokens the rows of a layer are, [B, Hkv, S]."""
    data = store.pool[layer].view()
    rows = torch.arange(data.shape[2]).expand(*data.shape[:2], -1)
    return store.locate(layer, rows)


def attend_plainly(model: Any, prompt: Any) -> list[Tensor]:
    """Return every layer's attention weights of a plain model, mean over the query group: [B, Hkv, T, S], float64.

    Every sequence is read alone; zeros where it is padded.
    """
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    n_kv = getattr(twin.config, "num_key_value_heads", None) or twin.config.num_attention_heads
    alone = []
    for ids, mask in zip(prompt["input_ids"], prompt["attention_mask"].bool(), strict=True):
        found = twin(input_ids=ids[mask][None], output_attentions=True).attentions
        n_pads = int((~mask).sum())
        grouped = (weights[0].unflatten(0, (n_kv, -1)).mean(1) for weights in found)
        alone.append([torch.nn.functional.pad(weights, (n_pads, 0, n_pads, 0)) for weights in grouped])
    return [torch.stack(layer) for layer in zip(*alone, strict=True)]


def count(fraction: float, n: int) -> int:
    """Return the records that may be kept of n."""
    return int(fraction * n + 1e-9)


def count_recent(fraction: float, n: int) -> int:
    """Return the newest records that stay: half."""
    return max(1, count(fraction, n) // 2)


def keep_best(sums: Tensor, alive: Tensor, n_keep: int, n_recent: int) -> Tensor:
    """Return which of the alive records stay, all [S]: the newest, and those with the greatest sums."""
    at = alive.nonzero()[:, 0]
    old, new = at[: len(at) - n_recent], at[len(at) - n_recent :]
    best = old[sums[old].argsort(descending=True)[: n_keep - n_recent]]
    kept = torch.zeros_like(alive)
    kept[best] = kept[new] = True
    return kept


class Hitters:
    """H2O in plain code: sums and what is alive of every layer, [B, Hkv, S] each."""

    fraction: ClassVar[float] = 1.0
    sums: ClassVar[dict[int, Tensor]] = {}
    alive: ClassVar[dict[int, Tensor]] = {}

    @classmethod
    def start(cls, fraction: float) -> None:
        cls.fraction = fraction
        cls.sums.clear()
        cls.alive.clear()

    @classmethod
    def step(cls, layer: int, weights: Tensor) -> None:
        """Add the weights [B, Hkv, T, S] of new queries; evict where it is time."""
        n_new, n = weights.shape[2:]
        old = cls.sums.get(layer, weights.new_zeros(*weights.shape[:2], 0))
        sums = torch.nn.functional.pad(old, (0, n_new)) + weights.sum(2)
        cls.sums[layer] = sums
        now, then = count(cls.fraction, n), count(cls.fraction, n + 1)
        held = int(cls.alive[layer][0, 0].sum())
        if n_new > 1:
            n_keep = now - max(0, now + 1 - then)
        elif held + 1 > then:
            n_keep = now - max(1, now // 16)
        else:
            return
        for b in range(sums.shape[0]):
            for h in range(sums.shape[1]):
                cls.alive[layer][b, h] = keep_best(
                    sums[b, h], cls.alive[layer][b, h], n_keep, count_recent(cls.fraction, n)
                )


def attend_and_evict(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attend to what is alive, in a cache that holds everything."""
    layer, n_new, n = module.layer_idx, query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    alive = Hitters.alive.get(layer, torch.ones(*key.shape[:2], 0, dtype=torch.bool))
    Hitters.alive[layer] = torch.nn.functional.pad(alive, (0, n - alive.shape[2]), value=True)
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ k.mT * scaling
    seen = Hitters.alive[layer].repeat_interleave(groups, 1)[:, :, None]
    order = torch.arange(n) <= torch.arange(n - n_new, n)[:, None]
    weights = logits.masked_fill(~(seen & order), -torch.inf).softmax(-1)
    out = (weights @ v).transpose(1, 2)
    Hitters.step(layer, weights.unflatten(1, (-1, groups)).mean(2))
    return out, None


AttentionInterface.register("evict_for_tests", attend_and_evict)
AttentionMaskInterface.register("evict_for_tests", sdpa_mask)
