"""Plain code that evicts: a whole cache, a mask of what is left of it, and one loop per layer, in float64."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.hf.tape import replay_attention


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


class Seen:
    """The plain model's own post-RoPE queries and keys, by layer."""

    rows: ClassVar[dict[int, tuple[Tensor, Tensor, float]]] = {}


def see_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    Seen.rows[module.layer_idx] = (q, k, scaling)
    return replay_attention(module, q, k, v, mask, scaling, **kwargs)


AttentionInterface.register("see_for_tests", see_attention)
AttentionMaskInterface.register("see_for_tests", sdpa_mask)


def score_plainly(model: Any, prompt: Any, window: int = 8, pool: int = 7) -> dict[int, np.ndarray]:
    """SnapKV's scores of every layer, [B, Hkv, T - window], in float64 numpy, one loop per number: -1 on padding."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("see_for_tests")
    twin(**prompt)
    real = prompt["attention_mask"].bool().numpy()
    scores = {}
    for layer, (queries, keys, scaling) in Seen.rows.items():
        q, k = queries.numpy(), keys.numpy()
        (batch, n_heads, n), n_kv = q.shape[:3], k.shape[1]
        sums = np.zeros((batch, n_kv, n - window))
        for b in range(batch):
            for head in range(n_heads):
                kv = head // (n_heads // n_kv)
                for i in range(n - window, n):
                    logits = k[b, kv, : i + 1] @ q[b, head, i] * scaling
                    logits[~real[b, : i + 1]] = -np.inf
                    weights = np.exp(logits - logits.max())
                    sums[b, kv] += (weights / weights.sum())[: n - window] / (n_heads // n_kv)
            for kv in range(n_kv):
                wide = np.pad(sums[b, kv], pool // 2)
                sums[b, kv] = [wide[j : j + pool].sum() / pool for j in range(n - window)]
                sums[b, kv, ~real[b, : n - window]] = -1
        scores[layer] = sums
    Seen.rows.clear()
    return scores


def curve_plainly(scores: np.ndarray) -> np.ndarray:
    """XKV's importance distribution: rank by rank over the heads, of every sequence; their mean."""
    ranked = -np.sort(-np.maximum(scores, 0), -1).sum(1)
    return (ranked / ranked.sum(-1, keepdims=True)).mean(0)


# A stored score is a bfloat16: those of two records that change places are within two of its steps.
CLOSE = 2.0**-6


def assert_best_are_kept(
    kept: Tensor, scores: np.ndarray, n_tokens: int, close: float = CLOSE, recent: int = 8
) -> None:
    newest = list(range(n_tokens - recent, n_tokens))
    for row, score in zip(kept.flatten(0, 1).tolist(), scores.reshape(-1, scores.shape[-1]), strict=True):
        assert row == sorted(set(row)), "ascending, and none twice"
        assert row[-recent:] == newest
        old = row[:-recent]
        left = np.setdiff1d(np.arange(n_tokens - recent), old)
        if len(old) and len(left):
            least = score[old].min()
            assert score[left].max() <= least + close * abs(least), "a better record was dropped"
            # Not merely any set that ties: where scores are apart it is the very same one.
            assert len(set(np.argsort(-score)[: len(old)]) - set(old)) <= 1 + len(old) // 8
