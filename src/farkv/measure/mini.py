"""The mini-inference: one forward pass over a prompt that observes attention, caches nothing and exits early.

In: an attached model, token ids. Out: a `PromptSample`: Gram matrices and gain curves of every layer. Attention is the
model's own; the LM head and the last layer's attention, MLP and final norm do not run.

Source: XKV §3.1, as released: the same model, no KV cache, an early exit. `Light` runs a part of it; that variant is
ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from farkv._axes import Int, Tensor
from farkv.calibrate.curves import to_grid
from farkv.engine.step import Engine
from farkv.errors import ConfigError, ProfileError
from farkv.hf.handle import Handle
from farkv.hf.layer import FarLayer
from farkv.math.importance import Scorer, measure_spread, observe_queries, score_records, sort_gains
from farkv.math.skew import Gram, measure_gram
from farkv.math.step import AttentionFunction, Step

# Tokens per run of a light pass. Long enough that most local attention stays within a run.
RUN = 64


class Light(NamedTuple):
    """How much of the model and of the prompt is run.

    `tokens` is the fraction of the prompt's tokens: runs of 64 spread over the prompt, always including its end. Every
    `layers`-th block is run, always including the first and the last. On the demo model fewer tokens lose little, but
    with fewer blocks the curves give no better plan than an equal split (benchmarks/results/xkv_light.jsonl).
    """

    tokens: float = 0.5
    layers: int = 1


class Look(NamedTuple):
    """What is measured: curves, with this scorer, window and pooling, and the Gram matrices for the skew."""

    scorer: Scorer
    window: int
    pool: int
    curves: bool
    grams: bool


class PromptSample(NamedTuple):
    """One prompt's measurements by layer, on the CPU; curves are on the grid, `token_bytes` is K and V of one token."""

    grams: dict[int, Gram]
    keep: dict[int, Tensor]
    spread: dict[int, Tensor]
    token_bytes: dict[int, int]


class PassEnded(Exception):
    """Raised to end a forward pass early."""


class MiniLayer(FarLayer):
    """Observes queries, keys and values as they pass, and counts tokens; stores none of them."""

    def __init__(self, layer: int, engine: Engine, look: Look, sample: PromptSample, *, ends: bool):
        super().__init__(layer, engine)
        self.look, self.sample, self.ends = look, sample, ends
        self.n_seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens and return them unchanged."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.n_seen += key_states.shape[2]
        return self.hand(key_states, value_states)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.n_seen

    def attend(self, step: Step, attention: AttentionFunction) -> object:
        """Measure, then attend to the whole prompt; the last layer ends the pass instead.

        Raises:
            ProfileError: there is something that is not finite: it would spoil the mean of all prompts.
        """
        if not all(bool(torch.isfinite(x).all()) for x in (step.query.q, step.k, step.v)):
            raise ProfileError(
                f"layer {self.layer}: expected finite queries, keys and values, the model computed NaN or infinity; "
                "look for NaN in the weights, or load it in a dtype of more range (bfloat16, float32)"
            )
        self.sample.token_bytes[self.layer] = step.new_bytes // (step.k.shape[0] * step.n_new)
        if self.look.grams:
            gram = measure_gram(step.query.q, step.k, None).sum_batch()
            self.sample.grams[self.layer] = Gram(
                *(t.to("cpu") for t in (gram.queries, gram.keys, gram.key_sum, gram.n_keys))
            )
        if self.look.curves and self.n_seen > self.look.window:
            self._measure_curves(step)
        if self.ends:
            raise PassEnded
        return attention(step.query.q, step.k, step.v, step.mask)

    def _measure_curves(self, step: Step) -> None:
        look, logits = self.look, step.query.logits
        observed = observe_queries(step.query.q, look.window, look.scorer, None)
        scores = score_records(look.scorer, observed, step.k, step.v, None, logits, pool=look.pool)
        spread = measure_spread(observed, step.k, None, logits)
        self.sample.keep[self.layer] = to_grid(sort_gains(scores)[0]).to("cpu")
        self.sample.spread[self.layer] = to_grid(spread[0]).to("cpu")


@torch.no_grad()
def run_mini(handle: Handle, ids: Int[Tensor, " T"], look: Look, layers: list[int]) -> PromptSample:
    """Run one prompt up to the last of `layers` and return the measurements.

    Args:
        ids: the prompt, run in one pass.
        layers: the managed layers that are run, ascending; at least one.

    Cost: a prefill without the last layer's attention and MLP; memory for one layer's K, V and scores. Per layer, w
    queries against all keys three times, and a sort of the tokens per KV head.
    """
    cache = handle.new_cache()
    sample = PromptSample({}, {}, {}, {})
    for i in layers:
        cache.layers[i] = MiniLayer(i, cache.engine, look, sample, ends=i == layers[-1])
    with suppress(PassEnded):
        handle.decoder(input_ids=ids[None].to(handle.device), past_key_values=cache, use_cache=True)
    return sample


@contextmanager
def thin_blocks(handle: Handle, every: int) -> Iterator[list[int]]:
    """Reduce the decoder to every `every`-th block plus the first and the last; restore it on exit.

    Yields the remaining layers.

    Raises:
        ConfigError: not all layers have full attention; such models cannot run with blocks removed.
    """
    n = len(handle.blocks)
    if every == 1:
        yield list(handle.managed)
        return
    if len(handle.managed) < n:
        raise ConfigError(
            f"light: expected full attention in all layers, got {', '.join(sorted(set(handle.layer_types)))}; "
            "blocks cannot be skipped: use layers=1, or drop light"
        )
    chosen = sorted({*range(0, n, every), n - 1})
    name = next(name for name, child in handle.decoder.named_children() if child is handle.blocks)
    setattr(handle.decoder, name, nn.ModuleList([handle.blocks[i] for i in chosen]))
    try:
        yield chosen
    finally:
        setattr(handle.decoder, name, handle.blocks)


def draw_runs(n_tokens: int, fraction: float, seed: int) -> Int[Tensor, " T"]:
    """Choose the tokens of a prompt that a light pass runs: the last run, and one from each of several equal intervals.

    Returns:
        ascending positions, about `fraction` of all; at least the last run.
    """
    n_runs = -(-n_tokens // RUN)
    others, wanted = n_runs - 1, max(1, round(fraction * n_runs)) - 1
    rng = random.Random(seed)
    # Runs are counted from the prompt's end, so that only its first run can be shorter.
    chosen = [0] + [1 + rng.randrange(j * others // wanted, (j + 1) * others // wanted) for j in range(wanted)]
    ends = [n_tokens - RUN * run for run in sorted(chosen, reverse=True)]
    return torch.cat([torch.arange(max(end - RUN, 0), end) for end in ends])
