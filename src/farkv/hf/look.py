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
# What a model may raise that is not called as it expects, or meets what it does not know.
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError)
# Attention whose code asks for its own name, but only to choose between forms of the same numbers.
HARMLESS = {"GPT2Attention", "DecisionTransformerGPT2Attention"}
# Models that were found to work, by class, attention, layers and configuration: it is their code that was looked at.
_known: set[tuple[type, str, str]] = set()


class LookLayer(FarLayer):
    """Keeps keys and values as an ordinary layer does, and lets attention ask for them as one of ours does."""

    def __init__(self, layer: int, engine: Engine):
        super().__init__(layer, engine)
        self.held: tuple[Tensor, Tensor] | None = None
        # Of a model with an indexer of its own: all its keys; the positions, which such a model sets.
        self.indexer_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None
        self.n_seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens, and hand them back unchanged."""
        self.n_seen += key_states.shape[2]
        return self.hand(key_states, value_states)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Hold the new keys of the model's own indexer, and return all."""
        new, old = indexer_key_states, self.indexer_keys
        self.indexer_keys = new if old is None else torch.cat([old, new], 1)
        return self.indexer_keys

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return self.n_seen

    def attend(self, step: Step, attention: AttentionFunction) -> object:
        """Hold the new tokens' records, and attend to all of them."""
        new = step.k, step.stored_v
        old = self.held or tuple(x[:, :, :0] for x in new)
        self.held = torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)
        return attention(step.query.q, *self.held, step.mask)


class Look:
    """A few tokens through a model that is being attached: once before, twice after; once per kind of model."""

    def __init__(self, handle: Any):
        model = handle.model
        check_code(handle.attention.values())
        # Methods differ in the layers that they manage.
        self.kind = (type(model), handle.base, f"{handle.managed} {model.config!r}")
        self.plain: list[Tensor] | None = None
        # A list of blocks may be in a module that takes no ids; what is around it does.
        for module in () if self.kind in _known else dict.fromkeys((handle.decoder, model.base_model, model)):
            self.module, reason = module, ""
            try:
                self.plain = run_short(module, DynamicCache(config=model.config), handle.device)
                return
            except FAILURES as error:
                reason = f"{type(error).__name__}: {error}"
            if module is model:
                check_own_cache(model, handle.device, reason)
                log.warning("%s: could not be looked at by a few tokens (%s)", type(model).__name__, reason)

    def compare(self, handle: Any) -> None:
        """Look again, now that the model is attached: with an ordinary cache, and with layers as ours are.

        Raises:
            UnsupportedModelError: something comes out otherwise.
        """
        if self.plain is None:
            return
        self._check_same(DynamicCache(config=handle.model.config), handle.device, "an ordinary cache")
        if handle.managed:
            cache = handle.make_cache(0, 0)
            for i in handle.managed:
                cache.layers[i] = LookLayer(i, cache.engine)
            # Its passes are none of the engine's: a stand-in, as for verified steps.
            self._check_same(DenseCache(cache.layers), handle.device, "a cache of ours")
        _known.add(self.kind)

    def _check_same(self, cache: Any, device: torch.device, what: str) -> None:
        """Raise UnsupportedModelError unless a few tokens give the same numbers as before, and all was read."""
        name = type(self.module).__name__
        try:
            found = run_short(self.module, cache, device)
        except UnsupportedModelError:
            raise
        except FAILURES as error:
            worked = f"{name}: worked before it was attached, and fails with {what} ({type(error).__name__}: {error})"
            raise UnsupportedModelError(worked) from error
        if unread := find_unread(cache.layers):
            raise UnsupportedModelError(f"{name}: {unread}")
        assert self.plain is not None
        check_same(name, self.plain, found, what)


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


def check_own_cache(model: nn.Module, device: torch.device, reason: str) -> None:
    """Raise UnsupportedModelError where a model that cannot run with an ordinary cache runs with one of its own."""
    try:
        run_short(model, None, device, PASSES[:1])
    except FAILURES:
        return
    raise UnsupportedModelError(
        f"{type(model).__name__}: runs with a cache of its own kind alone, and not with an ordinary one ({reason}); it "
        "cannot be managed"
    )


@torch.no_grad()
def run_short(module: nn.Module, cache: Any, device: torch.device, passes: tuple[int, ...] = PASSES) -> list[Tensor]:
    """Return what a model makes of a few tokens, read and then decoded.

    Raises:
        UnsupportedModelError: attention is not called with what the cache was given.
    """
    modes = {module: module.training for module in module.modules()}
    module.eval()
    try:
        first, made = 1, []
        for n in passes:
            ids = torch.arange(first, first + n, device=device)[None]
            # Hidden states, or logits, come first.
            made.append(module(input_ids=ids, past_key_values=cache)[0])
            first += n
        return made
    except CacheStateError as error:
        raise UnsupportedModelError(f"{type(module).__name__}: {error}") from error
    finally:
        for each, mode in modes.items():
            each.training = mode


def check_same(name: str, plain: list[Tensor], found: list[Tensor], what: str) -> None:
    """Raise UnsupportedModelError unless a few tokens gave the same numbers as before.

    Two deliberate syncs, once per kind of model.
    """
    for one, other in zip(plain, found, strict=True):
        off, size = (one - other).abs().nan_to_num().max(), one.abs().nan_to_num().max()
        if bool(off > (0 if one.device.type == "cpu" else DEVICE_ERROR) * size):
            raise UnsupportedModelError(
                f"{name}: with {what} a few tokens come out otherwise than before it was attached "
                f"(by {float(off):.3g}); it cannot be managed"
            )
