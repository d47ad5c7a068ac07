"""`generate` by sparse drafts: what it may be asked for, and its decoding method.

In: the arguments of a call. Out: what `generate` returns.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from farkv._axes import Int, Tensor
from farkv.account import STOP_STRING
from farkv.config import read_count
from farkv.errors import CacheStateError, ConfigError
from farkv.hf import _compat
from farkv.hf.cache import FarCache
from farkv.hf.exact import Generation, Passes
from farkv.hf.exact_rows import Row
from farkv.hf.prompt import CHUNK_TOKENS
from farkv.hf.state import MOST_SHARED, SlidingLayer, holds_states
from farkv.math.accept import Noise
from farkv.math.draft_length import DraftLength


class Decoder:
    """`generate`'s decoding method, by sparse drafts.

    Args:
        draft_tokens: tokens drafted at a time; None: as they pay.
        chunk_tokens: of the prompt, read at once.
    """

    def __init__(self, cache: FarCache, streamer: Any, draft_tokens: int | None, chunk_tokens: int):
        self.cache, self.streamer, self.draft_tokens, self.chunk_tokens = cache, streamer, draft_tokens, chunk_tokens

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "B N"],
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **arguments: Any,
    ) -> Any:
        """Return what `generate` returns."""
        check_asked(generation_config, input_ids)
        check_layers(self.cache, self.draft_tokens)
        cut_drafts(self.cache, input_ids)
        options: Any = generation_config
        seed = int(torch.randint(1 << 62, ())) if options.do_sample else None
        rows = [Row(ids[None], Noise(seed, i), stopping_criteria, logits_processor) for i, ids in enumerate(input_ids)]
        if options.return_dict_in_generate and options.output_scores:
            rows[0].scores = []
        play = Generation(
            Passes(model, self.cache, arguments),
            rows,
            DraftLength(fixed=self.draft_tokens),
            max_length=options.max_length,
            pad=_compat.find_padding(generation_config),
        )
        play.run(self.streamer, options.prefill_chunk_size or self.chunk_tokens)
        ids: Any = play.collect(max(row.n_decided for row in rows))
        if not options.return_dict_in_generate:
            return ids
        # Its fields are annotated as types of tensors that torch does not make any more.
        scores: Any = None if rows[0].scores is None else tuple(s[None] for s in rows[0].scores)
        return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, past_key_values=self.cache)


def check_asked(config: Any, input_ids: Int[Tensor, "B N"]) -> None:
    """Raise ConfigError where `generate` is asked for what sparse drafts cannot give."""
    refused = {
        "num_beams": config.num_beams not in (None, 1),
        "guidance_scale": config.guidance_scale not in (None, 1),
        "penalty_alpha": bool(config.penalty_alpha),
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "output_logits": bool(config.output_logits),
        "output_scores": bool(config.output_scores) and input_ids.shape[0] > 1,
    }
    if names := ", ".join(name for name, is_asked in refused.items() if is_asked):
        raise ConfigError(f"exact: cannot be combined with {names} (a batch of {input_ids.shape[0]}); drop one of them")


def cut_drafts(cache: FarCache, input_ids: Int[Tensor, "B N"]) -> None:
    """Let a cache forget what sparse steps made, and one token at least: full attention reads that again."""
    held, n_tokens = cache.get_seq_length(), input_ids.shape[1]
    keep = min(held, cache.engine.dense_tokens, n_tokens - 1)
    if keep < 0 or held > n_tokens:
        raise CacheStateError(f"exact: the cache holds {held} tokens, the prompt is of {n_tokens}; give the whole text")
    cache.step_back(held - keep)


def check_layers(cache: FarCache, draft_tokens: int | None) -> None:
    """Raise ConfigError where layers that are left to Hugging Face cannot forget drafted tokens."""
    for layer in cache.layers:
        if holds_states(layer):
            raise ConfigError(
                f"exact: a {type(layer).__name__} of this model cannot forget drafted tokens; generate without exact"
            )
        if isinstance(layer, SlidingLayer) and (draft_tokens or 0) > MOST_SHARED:
            raise ConfigError(
                f"draft_tokens: windows of this model forget {MOST_SHARED} tokens at most, got {draft_tokens}"
            )


def generate_far(
    handle: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, exact: bool, draft_tokens: int | None
) -> Any:
    """Call an attached model's `generate` on a far cache, a new one where none is given.

    Raises:
        ConfigError: an argument cannot be combined with it.
    """
    if kwargs.get("past_key_values") is None:
        kwargs = {**kwargs, "past_key_values": handle.new_cache()}
    if not exact:
        if draft_tokens is not None:
            raise ConfigError("draft_tokens: drafts are of exact generation; add exact=True")
        return handle.model.generate(*args, **kwargs)
    if draft_tokens is not None:
        draft_tokens = read_count("draft_tokens", draft_tokens)
    check_call(handle, kwargs)
    cache, asked = kwargs["past_key_values"], take_stop_strings(kwargs)
    decoder = Decoder(cache, kwargs.get("streamer"), draft_tokens, CHUNK_TOKENS)
    out = handle.model.generate(*args, custom_generate=decoder, **asked)
    if asked is not kwargs and cache.account.stop_reason is None:
        # Nobody but this call knows of the strings.
        cache.account.stop_reason = STOP_STRING
    return out


def check_call(handle: Any, kwargs: dict[str, Any]) -> None:
    """Raise ConfigError where a call's arguments, or how the model is attached, leave no place for drafts."""
    cache, limits = kwargs["past_key_values"], handle.setting.limits
    if not isinstance(cache, FarCache):
        raise ConfigError(f"exact: expected past_key_values of new_cache(), got {type(cache).__name__}")
    for name in ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "prefix_allowed_tokens_fn"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"exact: cannot be combined with {name}; drop one of them")
    if handle.roles.evicts is not None or (limits.evict != "refuse" and limits.disk is None):
        raise ConfigError(
            f"exact: drafts are verified by reading all, and this {type(handle.method).__name__} or its pool evicts; "
            "use a method that keeps all records, without evict"
        )
    if cache.verify_steps:
        raise ConfigError("exact: every token is full attention's, so none is verified besides; make the cache without")


def take_stop_strings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Make stop strings a criterion: `generate` loses the tokenizer on the way to a decoding method of others."""
    config = kwargs.get("generation_config")
    strings = kwargs.get("stop_strings") or getattr(config, "stop_strings", None)
    if not strings:
        return kwargs
    tokenizer = kwargs.get("tokenizer")
    if tokenizer is None:
        raise ConfigError("exact: stop_strings need the tokenizer; give tokenizer=...")
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer, strings))
    return {**kwargs, "stopping_criteria": criteria, "stop_strings": None}
