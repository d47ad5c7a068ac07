"""Prefill a text once, for every method that answers questions about it.

In: a model, a text's tokens. Out: every managed layer's queries, keys and values, pass by pass, and new caches filled
with exactly those tensors. Methods then differ only in what they do with them, and each still runs its own prefill work
(scoring, skewing, eviction, indexing), pass by pass, as if it had prefilled the text itself.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from farkv.hf.ask import cut_text
from farkv.hf.attach import attach
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.layer import FarLayer
from farkv.hf.prompt import CHUNK_TOKENS
from farkv.math.step import AttentionFunction, Step
from farkv.methods import Full


class Prefilled(NamedTuple):
    """The result of one prefill.

    passes: for every forward pass, each managed layer's step.  unmanaged: the layers left to Hugging Face, after the
    text.  question, unmanaged_after: the same of the pass over the question, if it was read with the text.
    """

    passes: list[dict[int, Step]]
    unmanaged: dict[int, Any]
    n_tokens: int
    question: dict[int, Step] | None = None
    unmanaged_after: dict[int, Any] | None = None
    n_question: int = 0


@torch.no_grad()
def prefill_once(
    model: Any, texts: list[list[int]], chunk: int = CHUNK_TOKENS, questions: list[list[int]] | None = None
) -> Prefilled:
    """Run texts of the same length with full attention, `chunk` tokens at a time, and record each layer's steps.

    Args:
        texts: tokens of every sequence of the batch.
        questions: tokens that some methods read with the text; their pass is recorded apart.

    Cost: the KV cache and the queries of all managed layers stay in the model's memory: 1 + Hq / (2 Hkv) times the
    cache's bytes.
    """
    passes: list[dict[int, Step]] = []
    with attach(model, Full()) as far:
        cache = far.new_cache()
        for layer in cache.layers:
            if isinstance(layer, FarLayer):
                _record(layer, passes)
        layers: list[Any] = cache.layers
        for part in torch.tensor(texts, device=far.device).split(cut_text(len(texts[0]), chunk), 1):
            passes.append({})
            far.decoder(input_ids=part, past_key_values=cache, use_cache=True)
        found = Prefilled(passes, {i: x for i, x in enumerate(layers) if not isinstance(x, FarLayer)}, len(texts[0]))
        if questions is None:
            return found
        found = found._replace(passes=list(passes), unmanaged=copy.deepcopy(found.unmanaged))
        passes.append({})
        far.decoder(input_ids=torch.tensor(questions, device=far.device), past_key_values=cache, use_cache=True)
        after = {i: layer for i, layer in enumerate(layers) if not isinstance(layer, FarLayer)}
    return found._replace(question=passes[-1], unmanaged_after=after, n_question=len(questions[0]))


def _record(layer: Any, passes: list[dict[int, Step]]) -> None:
    attend = layer.attend

    def keep(step: Step, attention: AttentionFunction) -> object:
        passes[-1][layer.layer] = step
        return attend(step, attention)

    layer.attend = keep


@torch.no_grad()
def fill_cache(
    far: Handle, prefilled: Prefilled, extra_tokens: int, verify: int = 0, *, with_question: bool = False
) -> FarCache:
    """Make a cache that holds a prefilled text, as if this method had prefilled it.

    Args:
        extra_tokens: room to reserve for questions and answers.
        with_question: the question belongs to the text: it is read before anything is evicted.
    """
    cache = far.new_cache(tokens=prefilled.n_tokens + extra_tokens, verify=verify)
    passes, unmanaged, n_tokens = prefilled.passes, prefilled.unmanaged, prefilled.n_tokens
    if with_question and prefilled.question is not None:
        assert prefilled.unmanaged_after is not None
        passes, unmanaged = [*passes, prefilled.question], prefilled.unmanaged_after
        n_tokens += prefilled.n_question
    cache.engine.announce_prompt(n_tokens, CHUNK_TOKENS)
    layers: list[Any] = cache.layers
    for steps in passes:
        for i, step in steps.items():
            layers[i].update(step.k, step.v)
            # The text's attention outputs are not needed: the pass was already run.
            cache.engine.attend(i, step, _attend_nothing)
        cache.engine.commit()
    for i, layer in unmanaged.items():
        layers[i] = copy.deepcopy(layer)
    return cache


class _Nothing:
    """An attention function whose output is not needed."""

    sinks = None

    def __call__(self, q: Any, k: Any, v: Any, mask: Any) -> object:
        return None

    def wrap(self, out: Any) -> object:
        return None


_attend_nothing = _Nothing()
