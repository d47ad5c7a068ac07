"""Layer i's query from an earlier hidden state, for any architecture, before layer i runs.

In: a block's arguments and a hidden state. Out: the post-RoPE query that layer i would form of it. The block is run
only up to its attention call, so fused projections, norms, biases, partial rotary and scaling are all the model's
own.  Cost: the norm and the q, k, v projections of one token; where an adapter found the same, the q projection alone.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from farkv._axes import Tensor
from farkv.hf import _compat
from farkv.hf.adapters import Adapter, find_adapter
from farkv.hf.attention import QueryProbed, probing
from farkv.math.step import Query


class Rope(threading.local):
    """The rotary tables of the forward pass that is running in this thread, by layer type."""

    def __init__(self) -> None:
        self.tables: dict[Any, Any] = {}

    def note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Forward hook of a rotary embedding. Gemma 3 rotates local and global layers differently."""
        self.tables[kwargs.get("layer_type", args[2] if len(args) > 2 else None)] = out

    def get(self, layer_type: str) -> Any:
        """Return the tables of a layer type, or those of all layers."""
        return self.tables.get(layer_type, self.tables.get(None))


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a block's or attention's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": hidden}


class Queries:
    """The estimated queries of a model: by an adapter where one was found to equal the probe, else by the probe."""

    def __init__(self, attention: dict[int, nn.Module]):
        self._attention = attention
        # None: the layer has no adapter.
        self._adapters: dict[int, Adapter | None] = {}
        # How many layers those are.
        self.n_generic = 0

    def estimate(
        self, layer: int, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rope: Any
    ) -> Query | None:
        """Return layer i's query, None if it makes none; arguments as for `probe_query`.

        The first estimate of a layer is made in both ways, and so is the first after its modules changed.
        """
        known = self._adapters.get(layer)
        tables = kwargs.get("position_embeddings") if rope is None else rope
        if known is not None and known.still_holds(part):
            return known.estimate(hidden_of(args, kwargs), tables)
        query = probe_query(part, args, kwargs, rope)
        if query is not None and (known is not None or layer not in self._adapters):
            attention = self._attention[layer]
            self._adapters[layer] = find_adapter(part, attention, hidden_of(args, kwargs), tables, query)
            self.n_generic = sum(adapter is None for adapter in self._adapters.values())
        return query


def probe_query(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rope: Any) -> Query | None:
    """Run a block or attention module up to its attention call and take the query; None if it makes none.

    Args:
        module: block i (the hidden state is normed by it) or attention i (already normed).
        args, kwargs: those of an earlier block of the same pass, hidden states replaced.
        rope: the rotary tables of layer i, None where the model has none.
    """
    args = tuple(None if isinstance(a, _compat.Cache) else a for a in args)
    kwargs = {
        k: None if isinstance(v, _compat.Cache) or k == "attention_mask" else v
        for k, v in kwargs.items()
        if k != "far_layer"
    }
    if "position_embeddings" in kwargs and rope is not None:
        kwargs["position_embeddings"] = rope
    token = probing.set(True)
    try:
        module.forward(*args, **kwargs)
    except QueryProbed as probed:
        return probed.query
    finally:
        probing.reset(token)
    return None


def add_attention(block: nn.Module, hidden: Tensor, attention: Tensor) -> Tensor:
    """Return h + attn as the block would form it: a norm of the attention's output and residual factors included."""
    norm: Any = find_output_norm(block)
    if norm is not None:
        attention = norm(attention)
    return hidden + attention * getattr(block, "residual_multiplier", 1.0)


def find_output_norm(block: nn.Module) -> nn.Module | None:
    """Return the norm that a block puts behind its attention, before the residual is added; None where there is none.

    `post_attention_layernorm` is that norm in a block that norms its MLP's output too (Gemma 2 and 3, OLMo 2 and 3,
    EXAONE 4), and the MLP's input norm in any other.
    """
    norm: Any = getattr(block, "post_self_attn_layernorm", None)
    if norm is not None:
        return norm
    if hasattr(block, "post_feedforward_layernorm") or hasattr(block, "pre_feedforward_layernorm"):
        return getattr(block, "post_attention_layernorm", None)
    return None
