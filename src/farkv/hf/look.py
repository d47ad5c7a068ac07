"""Look whether a model can be managed: by its code, then by a few tokens through it, before and after it is attached.

In: a handle that is being made. Out: nothing, or a refusal. A model that changes keys or values after it gave them to
the cache, attends by code of its own, or does something else under another attention's name would answer wrongly.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from farkv._axes import Tensor
from farkv.engine.step import Engine
from farkv.errors import CacheStateError, UnsupportedModelError
from farkv.hf.dense_cache import DenseCache
from farkv.hf.hooks import find_unread
from farkv.hf.layer import FarLayer
from farkv.math.step import AttentionFunction, Step

log = logging.getLogger("farkv")

# A prompt, and one token after it.
PASSES = (6, 1)
# Where sums are formed in any order, two runs of one model differ.
DEVICE_ERROR = 2.0**-5
# Attention whose code asks for its own name, but only to choose between forms of the same numbers.
HARMLESS = {"GPT2Attention", "DecisionTransformerGPT2Attention"}
# Models that were found to work, by class, configuration and attention: it is their code that was looked at.
_known: set[tuple[type, str, str]] = set()


class LookLayer(FarLayer):
    """Keeps keys and values as an ordinary layer does, and lets attention ask for them as one of ours does."""

    def __init__(self, layer: int, engine: Engine):
        super().__init__(layer, engine)
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hold the new tokens, and hand them back unchanged."""
        new = key_states, value_states
        old = self.held or tuple(x[:, :, :0] for x in new)
        self.held = torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)
        return self.hand(*new)

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return 0 if self.held is None else self.held[0].shape[2]

    def attend(self, step: Step, attention: AttentionFunction) -> object:
        """Attend to all of them."""
        assert self.held is not None
        return attention(step.query.q, *self.held, step.mask)


class Look:
    """A few tokens through a model that is being attached: once before, twice after; once per kind of model."""

    def __init__(self, handle: Any):
        model = handle.model
        check_code(handle.attention.values())
        self.kind = (type(model), handle.base, repr(model.config))
        self.plain: list[Tensor] | None = None
        if self.kind not in _known and handle.managed:
            self.plain = run_short(handle.decoder, DynamicCache(config=model.config), handle.device)

    def compare(self, handle: Any) -> None:
        """Look again, now that the model is attached: with an ordinary cache, and with layers as ours are.

        Raises:
            UnsupportedModelError: something comes out otherwise.
        """
        if self.plain is None:
            return
        ordinary = run_short(handle.decoder, DynamicCache(config=handle.model.config), handle.device)
        check_same(handle.decoder, self.plain, ordinary, "an ordinary cache")
        cache = handle.make_cache(0, 0)
        for i in handle.managed:
            cache.layers[i] = LookLayer(i, cache.engine)
        # Its passes are none of the engine's: a stand-in, as for verified steps.
        ours = DenseCache(cache.layers)
        found = run_short(handle.decoder, ours, handle.device)
        if unread := find_unread(ours.layers):
            raise UnsupportedModelError(f"{type(handle.decoder).__name__}: {unread}")
        check_same(handle.decoder, self.plain, found, "a cache of ours")
        _known.add(self.kind)


def check_code(attention: Iterable[nn.Module]) -> None:
    """Raise UnsupportedModelError where what attention reads depends on its implementation's name."""
    for kind in {type(module) for module in attention}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is None or "_attn_implementation" not in code.co_names or kind.__name__ in HARMLESS:
            continue
        words = {word for const in code.co_consts for word in (const if isinstance(const, tuple) else (const,))}
        if words & {"eager", "sdpa"}:
            raise UnsupportedModelError(
                f"{kind.__name__}: its code asks for the attention implementation's name and masks other tokens under "
                "another (a trained indexer, for example); it cannot be managed"
            )


@torch.no_grad()
def run_short(decoder: nn.Module, cache: Any, device: torch.device) -> list[Tensor] | None:
    """Return what a decoder makes of a few tokens, read and then decoded; None where ids alone are not enough."""
    modes = {module: module.training for module in decoder.modules()}
    decoder.eval()
    try:
        first, made = 1, []
        for n in PASSES:
            ids = torch.arange(first, first + n, device=device)[None]
            out: Any = decoder(input_ids=ids, past_key_values=cache)
            made.append(out[0] if isinstance(out, tuple) else out.last_hidden_state)
            first += n
        return made
    except CacheStateError as error:
        raise UnsupportedModelError(f"{type(decoder).__name__}: {error}") from error
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
        log.warning("%s: could not be looked at by a few tokens (%s)", type(decoder).__name__, error)
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_same(decoder: nn.Module, plain: list[Tensor], found: list[Tensor] | None, what: str) -> None:
    """Raise UnsupportedModelError unless a few tokens gave the same numbers as before.

    Two deliberate syncs, once per kind of model.
    """
    if found is None:
        raise UnsupportedModelError(f"{type(decoder).__name__}: worked before it was attached, and fails with {what}")
    for one, other in zip(plain, found, strict=True):
        off, size = (one - other).abs().nan_to_num().max(), one.abs().nan_to_num().max()
        if bool(off > (0 if one.device.type == "cpu" else DEVICE_ERROR) * size):
            raise UnsupportedModelError(
                f"{type(decoder).__name__}: with {what} a few tokens come out otherwise than before it was attached "
                f"(by {float(off):.3g}); it cannot be managed"
            )
