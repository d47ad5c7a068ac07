"""Log-likelihoods that read the cache: a prompt read at once, and what follows it token by token.

In: an attached model, tokens. Out: the sum of log-probabilities, whether greedy decoding says the same, and what was
read for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch

from farkv._axes import Float, Tensor
from farkv.hf.ask import Listener, feed, prefill
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.receipt import Account

# Tokens whose logits are held at once, where a prompt's own tokens are scored.
SCORED_TOKENS = 256


class Scored(NamedTuple):
    """One continuation.

    logprob: sum over its tokens, in nats.  is_greedy: every token was the likeliest.  n_dense: tokens that were scored
    while the prompt was read, without the cache.
    """

    logprob: float
    is_greedy: bool
    account: Account
    n_dense: int = 0


def score_continuations(
    far: Handle, prompt: list[int], continuations: list[list[int]], *, copies: bool
) -> Iterator[Scored]:
    """Score what may follow a prompt.

    All but the prompt's last token are read at once; that one and the continuation's are decode steps, so each
    log-probability comes from an attention that reads the cache.

    Args:
        prompt: at least one token.
        continuations: of at least one token each.
        copies: the prompt is read once, and every continuation but the last goes on from a copy of the cache: exact for
            every method, also for those that evict while they decode, which cannot step back. False: it is read
            anew each time, and its bytes are in memory once.
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
    """Score a window of a longer text, of which the first `n_prefill` tokens are read at once.

    Tokens are scored once each: those that follow what was read at once by that reading's own logits, the others by
    decode steps.
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
    """Feed tokens one by one and score what follows each of them."""
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
    """Read a prompt densely and score the last of what follows its tokens."""
    logs, greedy = [], True
    # What evicts waits for the end of the prompt.
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
    """Return the log-probabilities of the goals, in float32, and whether each is its row's likeliest token."""
    at = torch.tensor(goals, device=logits.device)
    logs = logits.float().log_softmax(-1).gather(-1, at[:, None])[:, 0]
    return logs, bool((logits.argmax(-1) == at).all())
