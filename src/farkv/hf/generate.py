"""`model.generate` of an attached model: without a cache it is lent one of ours; with one, the prompt must go on from
the text that it holds, and the answer is counted.

In: the arguments of a call. Out: the same call, or a refusal. A decoder is shown the new tokens alone, so nobody but
`generate` sees that the others are not those that were read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel

from farkv._axes import Tensor
from farkv.errors import CacheStateError, ConfigError
from farkv.hf.cache import FarCache
from farkv.hf.identity import ModelIdentity
from farkv.hf.stopped import Asked, note_answer, note_interrupt
from farkv.session.load import describe_difference

log = logging.getLogger("farkv")


Lend = Callable[[], AbstractContextManager[FarCache]]


def wrap_generate(model: PreTrainedModel, lend: Lend | None, identity: ModelIdentity) -> None:
    """Let `generate` check the text first; `unwrap_generate` undoes it, one of the user's own included.

    Args:
        lend: gives a call without a cache one of ours; None: such a call is left alone.
        identity: of the model, by which it is seen that it is no longer the one that a cache has read by.
    """
    plain: Any = getattr(model, "generate", None)
    if plain is None:
        # A model without a head writes nothing.
        return

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, FarCache):
            check_identity(cache, identity)
            return run(model, plain, args, kwargs)
        if cache is not None or lend is None or not wants_cache(Asked(model, kwargs, 0)):
            return plain(*args, **kwargs)
        with lend() as ours:
            return run(model, plain, args, {**kwargs, "past_key_values": ours})

    generate.own = vars(model).get("generate")  # type: ignore[attr-defined]
    model.generate = generate  # type: ignore[method-assign]


def run(model: PreTrainedModel, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Generate with a cache of ours; count the answer, and note why it is no longer."""
    cache: FarCache = kwargs["past_key_values"]
    ids = find_prompt(args, kwargs)
    check_text(cache, ids)
    asked, account = Asked(model, kwargs, count_prompt(cache, ids, kwargs)), cache.account
    if asked.find("use_cache") is False:
        raise ConfigError(
            "generate(use_cache=False): it reads the whole prompt anew for every token, and with past_key_values each "
            "time behind what was read; leave one of them out"
        )
    account.prompt_tokens = asked.prompt_tokens
    try:
        out = plain(*args, **kwargs)
    except KeyboardInterrupt:
        note_interrupt(account, asked, cache.get_seq_length())
        raise
    finally:
        account.prompt_tokens = None
    note_answer(account, asked, out)
    return out


def check_identity(cache: FarCache, identity: ModelIdentity) -> None:
    """Raise CacheStateError where the model is no longer what it was when a cache that holds something was made.

    Cost: once per call; where no weight was written to, a look at the numbers of their versions and at the settings.
    """
    if not cache.identity or cache.get_seq_length() == 0:
        return
    now = identity.get()
    if now != cache.identity:
        said, _ = describe_difference(now, cache.identity)
        raise CacheStateError(
            f"this cache: its tokens were read before the model was changed, which is {said}; make a new cache, and "
            "read the text again"
        )


def wants_cache(asked: Asked) -> bool:
    """Say whether a call without a cache may be given one; one that asks for none is left alone, and that is said.

    Raises:
        ConfigError: it asks for a cache of another kind.
    """
    if asked.find("use_cache") is False:
        log.warning("generate(use_cache=False): there is no cache, so nothing is managed, and no receipt tells of it")
        return False
    kind = asked.find("cache_implementation")
    if kind is not None:
        raise ConfigError(
            f"generate(cache_implementation={kind!r}): this model is attached, and its caches are ours; leave it out, "
            "or attach(..., every_generate=False), which manages only calls with past_key_values=far.new_cache()"
        )
    return True


def unwrap_generate(model: PreTrainedModel) -> None:
    """Give a model its own `generate` back."""
    wrapped = vars(model).pop("generate", None)
    if (own := getattr(wrapped, "own", None)) is not None:
        model.generate = own  # type: ignore[method-assign]


def find_prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the token ids that `generate` is called with, None where it is called with embeddings or nothing."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None


def count_prompt(cache: FarCache, ids: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Return the tokens of the prompt, those that the cache holds included."""
    if ids is not None:
        return ids.shape[1]
    embeds, held = kwargs.get("inputs_embeds"), cache.get_seq_length()
    # A model begins with a token of its own where it is called with nothing.
    n = 1 if embeds is None else embeds.shape[1]
    return n if n > held else held + n


def check_text(cache: FarCache, ids: Tensor | None) -> None:
    """Raise CacheStateError where a cache holds tokens that a prompt does not begin with.

    A deliberate sync, once per call.
    """
    held = cache.token_ids
    if ids is None or len(held) == 0 or len(held) != cache.get_seq_length():
        # Of what came as embeddings nothing is known.
        return
    n = min(len(held), ids.shape[1])
    same = (ids[0, :n].to("cpu") == held[:n]).long().cumprod(0).sum()
    if same < len(held):
        raise CacheStateError(
            f"this cache: it holds {len(held)} tokens, and the prompt of {ids.shape[1]} begins with {int(same)} of "
            "them; expected a prompt that goes on from them: make a new cache for another text, or crop this one"
        )
