"""Measure a model once: run it over calibration prompts and sum what its queries and keys look like.

In: a model, tokenised prompts. Out: a `Profile`. Runs the model's own attention; keeps one Gram matrix pair per
KV head and layer, nothing per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from farkv._axes import Tensor
from farkv.errors import InputError
from farkv.hf.handle import Handle
from farkv.hf.identity import identify_model
from farkv.methods import Full
from farkv.methods.contract import Kernel, Step
from farkv.per_model.profile import Profile, make_profile
from farkv.per_model.skew import Gram, measure_gram
from farkv.store.tiers import StoreLimits


@torch.no_grad()
def profile(
    model: PreTrainedModel,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure the skews of every full-attention layer.

    Args:
        model: on its device, not attached.
        prompts: token ids, one sequence each; a few thousand tokens in all are enough. Calibrate on text that no
            test uses.
        on_prompt: is told how many prompts are done, of how many.

    Raises:
        InputError: there is no prompt of at least two tokens.
        UnsupportedModelError: the model cannot be managed.

    Cost: one prefill per prompt, and 2 (Hq + Hkv) D^2 operations per token and layer.
    """
    rows = [torch.as_tensor(p, dtype=torch.long).reshape(1, -1) for p in prompts]
    rows = [r for r in rows if r.shape[1] > 1]
    if not rows:
        raise InputError("profile: expected at least one prompt of two or more tokens, got none")
    grams: dict[int, Gram] = {}
    with Handle(model, Full(), StoreLimits(), None) as handle:
        for done, row in enumerate(rows):
            cache = handle.new_cache()
            watch(cache.layers, grams)
            handle.decoder(input_ids=row.to(handle.device), past_key_values=cache, use_cache=True)
            on_prompt(done + 1, len(rows))
    return make_profile({i: g for i, g in sorted(grams.items())}, identify_model(model))


def watch(layers: list[Any], grams: dict[int, Gram]) -> None:
    """Make every managed layer add its attention's queries and keys to `grams`."""
    for layer in layers:
        if not hasattr(layer, "recipe"):
            continue
        attend = layer.attend

        def attend_and_measure(step: Step, kernel: Kernel, *, layer: Any = layer, attend: Any = attend) -> object:
            gram = measure_gram(step.query.q, step.k, None).sum_batch()
            old = grams.get(layer.layer)
            grams[layer.layer] = gram if old is None else old.add(gram)
            return attend(step, kernel)

        layer.attend = attend_and_measure
