"""Log-likelihoods that read the cache: the prompt is prefilled, what follows is fed token by token.

In: an attached model, tokens. Out: the sum of log-probabilities, whether greedy decoding gives the same tokens, and
what was read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch

from farkv._axes import Float, Tensor
from farkv.account import Account
from farkv.hf.ask import Listener, feed, prefill
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle

# Tokens per chunk, and so logits in memory, where a prompt's own tokens are scored.
SCORED_TOKENS = 256


class Scored(NamedTuple):
    """One continuation.

    logprob: sum over its tokens, in nats.  is_greedy: every token was the most likely.  n_dense: tokens that were
    scored during prefill, without the cache.
    """

    logprob: float
    is_greedy: bool
    account: Account
    n_dense: int = 0


def score_continuations(
    far: Handle, prompt: list[int], continuations: list[list[int]], *, copies: bool
) -> Iterator[Scored]:
    """Score the continuations of a prompt.

    The prompt without its last token is prefilled; that token and the continuation's are decode steps, so every
    log-probability comes from attention that reads the cache.

    Args:
        prompt: at least one token.
        continuations: of at least one token each.
        copies: prefill once and continue from copies of the cache; exact for every method, including those that evict
            during decoding and cannot be cropped. False: prefill for each continuation, with one cache in memory.
    """
    longest, cache = max(map(len, continuations)), None
    for n, tokens in enumerate(continuations):
        if cache is None:
            cache = far.new_cache(tokens=len(prompt) + longest)
            prefill(far, cache, prompt[:-1], None, Listener())
        own = copy.deepcopy(cache) if copies and n + 1 < len(continuations) else cache
        if own is cache:
            cache = None
        yield score_steps(far, own, [prompt[-1], *tokens[:-1]], tokens)


def score_window(far: Handle, prompt: list[int], tokens: list[int], n_prefill: int) -> Scored:
    """Score a window of a longer text, of which the first `n_prefill` tokens are prefilled.

    Every token is scored once: within the prefill by its own logits, the others by decode steps.
    """
    given = [*prompt, *tokens[:-1]]
    cache = far.new_cache(tokens=len(given))
    n_prefill = min(n_prefill, len(given) - 1)
    if n_prefill < len(prompt):
        prefill(far, cache, prompt[:-1], None, Listener())
        return score_steps(far, cache, given[len(prompt) - 1 :], tokens)
    n_dense = n_prefill - len(prompt) + 1
    logs, greedy = read_scored(far, cache, given[:n_prefill], tokens[:n_dense])
    rest = score_steps(far, cache, given[n_prefill:], tokens[n_dense:])
    return Scored(logs + rest.logprob, greedy and rest.is_greedy, rest.account, n_dense)


def score_steps(far: Handle, cache: FarCache, given: list[int], tokens: list[int]) -> Scored:
    """Feed tokens one by one and score the token that follows each."""
    logs, greedy = [], True
    for token, goal in zip(given, tokens, strict=True):
        logits = feed(far, cache, [token])
        assert logits is not None
        one, same = _look_up(logits, [goal])
        logs.append(one)
        greedy = greedy and same
    return Scored(float(torch.cat(logs).sum()), greedy, cache.account)


@torch.no_grad()
def read_scored(far: Handle, cache: FarCache, tokens: list[int], goals: list[int]) -> tuple[float, bool]:
    """Prefill a prompt and score its last tokens, `goals`, by the logits of the tokens before them."""
    logs, greedy = [], True
    # Announced, so that eviction waits for the end of the prompt.
    chunk = cache.engine.announce_prompt(len(tokens), SCORED_TOKENS)
    first = len(tokens) - len(goals)
    for start in range(0, len(tokens), chunk):
        part = torch.tensor([tokens[start : start + chunk]], device=far.device)
        logits = far.model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
        skip = max(0, first - start)
        here = goals[max(0, start - first) : start + part.shape[1] - first] if skip < part.shape[1] else []
        if here:
            one, same = _look_up(logits[skip:], here)
            logs.append(one)
            greedy = greedy and same
    return float(torch.cat(logs).sum()), greedy


def _look_up(logits: Float[Tensor, "n V"], goals: list[int]) -> tuple[Tensor, bool]:
    """Return the goals' log-probabilities in float32, and whether each is the most likely token of its row."""
    at = torch.tensor(goals, device=logits.device)
    logs = logits.float().log_softmax(-1).gather(-1, at[:, None])[:, 0]
    return logs, bool((logits.argmax(-1) == at).all())
