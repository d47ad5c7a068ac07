"""Measure the loss of limiting a single layer: decode some tokens, then decode them again with that layer limited.

In: a model, prompts. Out: `Losses`, the KL per layer and share. Nothing is evicted: the attention mask hides records,
so one prefill per prompt serves all layers and shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.calibrate.losses import SHARES, Losses, LossKind
from farkv.engine.step import Engine
from farkv.errors import CacheStateError
from farkv.hf.ask import feed
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.layer import FarLayer
from farkv.math.attention import weigh_keys
from farkv.math.importance import Observed, observe_queries, score_records
from farkv.math.keep import choose_kept
from farkv.math.step import AttentionFunction, Step

# Decode steps that are compared per prompt.
STEPS = 16
WINDOW = 8
# Shorter prompts have too few records to leave out.
LEAST_TOKENS = 64


class Limit(NamedTuple):
    """How a layer is limited while its loss is measured."""

    kind: LossKind
    share: float


class HidingAttention:
    """The model's own attention function, masked to the records that `allow` returns."""

    def __init__(self, attention: AttentionFunction, allow: Callable[[Tensor, Tensor], Bool[Tensor, "B Hkv S"]]):
        self.attention, self.allow = attention, allow

    @property
    def sinks(self) -> Tensor | None:
        """Return the model's own sink logits."""
        return self.attention.sinks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> object:
        """Attend to the allowed records."""
        seen = self.allow(k, v).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        return self.attention(q, k, v, seen if mask is None else seen & mask)

    def wrap(self, out: Tensor) -> object:
        """Raise CacheStateError: an output that a kernel computed has read the hidden records too."""
        raise CacheStateError(
            "losses: a limited layer needs one masked attention call over all its records; measure without a near limit"
        )


class LimitedLayer(FarLayer):
    """A layer with full attention that can be limited at decode steps."""

    def __init__(self, layer: int, engine: Engine):
        super().__init__(layer, engine)
        self.limit: Limit | None = None
        self.observed: Observed | None = None
        # Prompt length, set after prefill, and the scores of the prompt's records.
        self.prompt_tokens = 0
        self.scores: Tensor | None = None

    def attend(self, step: Step, attention: AttentionFunction) -> object:
        """Attend with the records outside the limit masked; during prefill only observe the queries."""
        if step.query.q.shape[2] > 1:
            self.observed = observe_queries(step.query.q, WINDOW, "window", self.observed)
            return super().attend(step, attention)
        limit = self.limit
        if limit is None:
            return super().attend(step, attention)
        allow = self.keep if limit.kind == "keep" else self.fetch
        return super().attend(step, HidingAttention(attention, lambda k, v: allow(step, k, v, limit.share)))

    def keep(self, step: Step, k: Tensor, v: Tensor, share: float) -> Bool[Tensor, "B Hkv S"]:
        """Allow a fixed selection: the prompt's best records by its last queries, and all later tokens."""
        assert self.observed is not None
        n = self.prompt_tokens
        if self.scores is None:
            logits = step.query.logits
            self.scores = score_records("window", self.observed, k[:, :, :n], v[:, :, :n], None, logits)
        positions, _ = choose_kept(self.scores, n, max(WINDOW, int(share * n)), WINDOW)
        seen = torch.ones(*k.shape[:3], dtype=torch.bool, device=k.device)
        seen[:, :, :n] = False
        return seen.scatter_(-1, positions, value=True)

    def fetch(self, step: Step, k: Tensor, v: Tensor, share: float) -> Bool[Tensor, "B Hkv S"]:
        """Allow the step's heaviest records and the newest one."""
        weights = weigh_keys(step.query.q, k, None, step.query.logits)[:, :, :, 0].mean(2)
        weights[..., -1] = torch.inf
        best = weights.topk(max(1, int(share * k.shape[2])), -1).indices
        return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, best, value=True)


@torch.no_grad()
def measure_losses(
    handle: Handle, prompts: list[Int[Tensor, " T"]], on_prompt: Callable[[int, int], None] = lambda done, total: None
) -> Losses:
    """Measure every managed layer's loss at every share, averaged over prompts.

        loss[l, k] = mean over steps of KL(full model || layer l sees a share s_k)

    Args:
        handle: attached with `Full()`.
        prompts: a few, of more than 64 tokens each; each is continued greedily, and those steps are compared.

    Cost: per prompt one prefill and (2 L K + 1) STEPS decode steps.
    Source: none; XKV argues with retention alone (docs/papers/xkv.md, "Does retention predict the loss?").
    """
    total = torch.zeros(2, len(handle.managed), len(SHARES), dtype=torch.float64)
    for done, ids in enumerate(prompts):
        total += measure_prompt(handle, ids)
        on_prompt(done + 1, len(prompts))
    keep, fetch = (total / len(prompts)).float()
    return Losses(keep, fetch, SHARES, tuple(handle.managed), len(prompts))


def measure_prompt(handle: Handle, ids: Int[Tensor, " T"]) -> Tensor:
    """Return the KL of one prompt, float64 [2 kinds, L, shares]."""
    cache = handle.new_cache(tokens=ids.shape[0] + STEPS)
    for i in handle.managed:
        cache.layers[i] = LimitedLayer(i, cache.engine)
    handle.decoder(input_ids=ids[None, :-1].to(handle.device), past_key_values=cache, use_cache=True)
    layers: list[Any] = [cache.layers[i] for i in handle.managed]
    for layer in layers:
        layer.prompt_tokens = ids.shape[0] - 1
    tokens, reference = decode_greedily(handle, cache, int(ids[-1]))
    found = torch.zeros(2, len(layers), len(SHARES), dtype=torch.float64)
    kinds: tuple[LossKind, LossKind] = ("keep", "fetch")
    for a, kind in enumerate(kinds):
        for b, layer in enumerate(layers):
            for c, share in enumerate(SHARES):
                layer.limit = Limit(kind, share)
                logs = decode_again(handle, cache, tokens)
                layer.limit = None
                found[a, b, c] = (reference.exp() * (reference - logs)).sum(-1).mean().clamp_min(0)
    return found


def decode_greedily(handle: Handle, cache: FarCache, token: int) -> tuple[list[int], Tensor]:
    """Decode STEPS tokens, crop them again, and return them with the log-probabilities after each."""
    tokens, logs = [token], []
    for _ in range(STEPS):
        logits = feed(handle, cache, tokens[-1:])
        assert logits is not None
        logs.append(logits.double().log_softmax(-1).cpu())
        tokens.append(int(logits.argmax(-1)))
    cache.crop(-STEPS)
    return tokens[:STEPS], torch.cat(logs)


def decode_again(handle: Handle, cache: FarCache, tokens: list[int]) -> Tensor:
    """Feed the same tokens, crop them again, and return the log-probabilities after each."""
    logs = []
    for token in tokens:
        logits = feed(handle, cache, [token])
        assert logits is not None
        logs.append(logits.double().log_softmax(-1).cpu())
    cache.crop(-STEPS)
    return torch.cat(logs)
