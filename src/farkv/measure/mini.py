"""The mini-inference: one pass over a prompt that only looks, stores nothing and ends at the last managed layer.

In: an attached model, token ids. Out: a `Sample`, the Gram matrices and gain curves of every layer. Attention is the
model's own; there is no LM head, and the last layer's attention, MLP and the final norm never run.

Source: XKV §3.1, as released: the same model, no KV cache, an early exit. `Light` runs less of it; that variant is
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
from farkv.errors import ConfigError
from farkv.hf.handle import Handle
from farkv.hf.layer import FarLayer
from farkv.math.importance import Scorer, measure_spread, observe_queries, score_records, sort_gains
from farkv.math.skew import Gram, measure_gram
from farkv.math.step import AttentionFunction, Step

# Light: tokens of one run. Long enough that most attention between neighbours stays inside.
RUN = 64


class Light(NamedTuple):
    """How much of the model and of the prompt is run.

    `tokens` is the share of the prompt's tokens: runs of 64 from all over the prompt, and always its end. Of the
    blocks every `layers`-th is run, and always the first and the last. On the demo model fewer tokens cost little, but
    with fewer blocks the curves lead to no better plan than an equal split (benchmarks/results/xkv_light.jsonl).
    """

    tokens: float = 0.5
    layers: int = 1


class Look(NamedTuple):
    """What is measured: curves by this scorer, window and pooling, and (or) the Gram matrices of the skew."""

    scorer: Scorer
    window: int
    pool: int
    curves: bool
    grams: bool


class Sample(NamedTuple):
    """What one prompt left, by layer, on the CPU; the curves are on the grid, `token_bytes` is K and V of one token."""

    grams: dict[int, Gram]
    keep: dict[int, Tensor]
    spread: dict[int, Tensor]
    token_bytes: dict[int, int]


class PassEnded(Exception):
    """Ends a pass whose rest nobody needs."""


class MiniLayer(FarLayer):
    """Counts tokens, looks at queries, keys and values as they pass, and stores none of them."""

    def __init__(self, layer: int, engine: Engine, look: Look, sample: Sample, *, ends: bool):
        super().__init__(layer, engine)
        self.look, self.sample, self.ends = look, sample, ends
        self.n_seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens and hand them back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.n_seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return self.n_seen

    def attend(self, step: Step, attention: AttentionFunction) -> object:
        """Look, then attend to the whole prompt; the last layer ends the pass instead."""
        width = step.k.shape[1] * (step.k.shape[-1] + step.v.shape[-1])
        self.sample.token_bytes[self.layer] = width * step.k.element_size()
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
        look, form = self.look, step.query.logits
        observed = observe_queries(step.query.q, look.window, look.scorer, None)
        scores = score_records(look.scorer, observed, step.k, step.v, None, form, pool=look.pool)
        spread = measure_spread(observed, step.k, None, form)
        self.sample.keep[self.layer] = to_grid(sort_gains(scores)[0]).to("cpu")
        self.sample.spread[self.layer] = to_grid(spread[0]).to("cpu")


@torch.no_grad()
def run_mini(handle: Handle, ids: Int[Tensor, " T"], look: Look, layers: list[int]) -> Sample:
    """Run one prompt up to the last of `layers` and return what they showed.

    Args:
        ids: the prompt, in one pass.
        layers: the managed layers that are run, ascending; one at least.

    Cost: the prefill of all layers but the last one's attention and MLP; one layer's K, V and scores. Per layer w
    queries against all keys, three times, and a sort of the tokens per KV head.
    """
    cache = handle.new_cache()
    sample = Sample({}, {}, {}, {})
    for i in layers:
        cache.layers[i] = MiniLayer(i, cache.engine, look, sample, ends=i == layers[-1])
    with suppress(PassEnded):
        handle.decoder(input_ids=ids[None].to(handle.device), past_key_values=cache, use_cache=True)
    return sample


@contextmanager
def thin_blocks(handle: Handle, every: int) -> Iterator[list[int]]:
    """Leave the decoder only every `every`-th block, the first and the last always, and restore it at the end.

    Yields the layers that are left.

    Raises:
        ConfigError: not all layers are full attention, so what a block reads depends on blocks that would be left out.
    """
    n = len(handle.blocks)
    if every == 1:
        yield list(handle.managed)
        return
    if len(handle.managed) < n:
        raise ConfigError(
            f"light: a model with layers of other kinds ({', '.join(sorted(set(handle.layer_types)))}) cannot run "
            "without some of them; give layers=1, or leave light out"
        )
    chosen = sorted({*range(0, n, every), n - 1})
    name = next(name for name, child in handle.decoder.named_children() if child is handle.blocks)
    setattr(handle.decoder, name, nn.ModuleList([handle.blocks[i] for i in chosen]))
    try:
        yield chosen
    finally:
        setattr(handle.decoder, name, handle.blocks)


def draw_runs(n_tokens: int, share: float, seed: int) -> Int[Tensor, " T"]:
    """Choose which tokens of a prompt are run: whole runs, one from each of as many equal stretches, and the last.

    Returns:
        ascending positions, about `share` of them; at least the last run.
    """
    n_runs = -(-n_tokens // RUN)
    others, wanted = n_runs - 1, max(1, round(share * n_runs)) - 1
    rng = random.Random(seed)
    # Counted from the prompt's end, so that only its first run can be shorter.
    chosen = [0] + [1 + rng.randrange(j * others // wanted, (j + 1) * others // wanted) for j in range(wanted)]
    ends = [n_tokens - RUN * run for run in sorted(chosen, reverse=True)]
    return torch.cat([torch.arange(max(end - RUN, 0), end) for end in ends])
