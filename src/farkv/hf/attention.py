"""The attention function that Hugging Face calls while a model is attached.

In: the arguments of the attention interface, plus the cache layer that the door's hook adds. Out: what the model's
own attention returns for the records that the engine reads. Without one of our caches it is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from farkv._axes import Float, Tensor
from farkv.errors import CacheStateError
from farkv.hf import _compat
from farkv.hf.latents import LatentAttention, LatentForm, Made, check_made
from farkv.hf.layer import FarLayer
from farkv.math.logits import Logits
from farkv.math.step import Query, Step

# Hugging Face sniffs names for "sdpa", "flash", "flex_attention", "paged|" and "/": this one has none of them.
NAME = "farkv"


class QueryProbed(Exception):
    """Carries a query out of a block that is run only up to its attention call."""

    def __init__(self, query: Query):
        super().__init__("query probed")
        self.query = query


probing: ContextVar[bool] = ContextVar("farkv_probing", default=False)
is_probing = probing.get


def far_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    far_layer: FarLayer | None = None,
    **kwargs: Any,
) -> Any:
    """Attend: dispatch to the engine of `far_layer`, or to the model's own attention where there is none.

    Args:
        query: post-RoPE, [B, Hq, T, D].
        key, value: [B, Hkv, T, D]: of the new tokens alone where the layer is ours.
        attention_mask: bool [B, 1, T, S] over the whole context, or None.
        far_layer: our cache layer, added by the hook.
    """
    scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap")
    if softcap is not None and base_of(module) == "sdpa":
        # sdpa has no softcap: a model that ran on it before gets none.
        softcap = None
    latents: LatentForm | None = getattr(module, "farkv_latents", None)
    if not _compat.is_compiling() and is_probing():
        scoring = query if latents is None else latents.absorb(module, query)
        raise QueryProbed(Query(scoring, Logits(scale, softcap)))
    if far_layer is None:
        return choose_base(module)(module, query, key, value, attention_mask, scaling=scale, dropout=dropout, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise CacheStateError("position_bias: attention with a bias per position cannot be read sparsely")
    # The dict is this call's own.
    kwargs["scaling"], kwargs["dropout"] = scale, dropout
    own = OwnAttention(module, kwargs)
    step = Step(Query(query, Logits(scale, softcap)), key, value, read_mask(attention_mask))
    if latents is None:
        far_layer.check_handed(key, value)
        out = far_layer.attend(step, own)
    else:
        out = far_layer.attend(*read_latents(latents, far_layer, step, own))
    return refuse_gradients(out) if query.requires_grad and torch.is_grad_enabled() else out


def read_latents(form: LatentForm, layer: FarLayer, step: Step, own: OwnAttention) -> tuple[Step, LatentAttention]:
    """Return a call of latent attention as attention with one KV head, whose keys are the records.

    Raises:
        CacheStateError: attention is called with something else than the latents that the cache got expand to.
    """
    handed = layer.take_handed()
    if handed is None:
        raise layer.refuse("the cache got none")
    records, _ = form.pack(*handed)
    made = Made(step.query.q, step.k, step.v, records)
    absorbed = form.absorb(own.module, made.q)
    if not layer.is_checked and not _compat.is_compiling():
        if found := check_made(form, own.module, made, absorbed):
            raise layer.refuse(found)
        layer.is_checked = True
    query = step.query._replace(q=absorbed)
    step = step._replace(query=query, k=records, v=records[..., : form.rank], in_keys=True)
    return step, LatentAttention(form, own.module, own, made)


def read_mask(mask: Tensor | None) -> Tensor | None:
    """Return which tokens are seen, where a mask of numbers says no more than that; else the mask as it is.

    A deliberate sync, for masks of numbers alone: users make them, not Hugging Face.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    seen, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min / 2
    return seen if bool((seen | hidden).all()) else mask


class NoGradient(torch.autograd.Function):
    """The identity, which no gradient passes: records are stored without the graph that made them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the values."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refuse.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(
            "gradients: a farkv cache stores keys and values without their graph, so none reach what came before; "
            "compute losses with an ordinary cache, or wrap the call in torch.no_grad()"
        )


def refuse_gradients(out: Any) -> Any:
    """Let nobody believe that gradients flowed through a cache of ours."""
    if isinstance(out, tuple):
        return NoGradient.apply(out[0]), *out[1:]
    return NoGradient.apply(out)


class OwnAttention:
    """The attention that one call of a module would run: farkv's `AttentionFunction`."""

    def __init__(self, module: nn.Module, options: dict[str, Any]):
        self.module, self.options = module, options

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        """Attend to the given records."""
        return choose_base(self.module)(self.module, q, k, v, mask, **self.options)

    def wrap(self, out: Float[Tensor, "B Hq T Dv"]) -> tuple[Tensor, None]:
        """Return the output as Hugging Face's attention functions do; weights there are none."""
        return out.transpose(1, 2).contiguous(), None

    @property
    def sinks(self) -> Float[Tensor, " Hq"] | None:
        """Return the model's attention sinks.

        Raises:
            CacheStateError: they differ from query to query.
        """
        if base_of(self.module) == "sdpa":
            # As with softcap: sdpa has no sinks, so a model that ran on it before has none.
            return None
        sinks = self.options.get("s_aux", self.options.get("sinks"))
        if sinks is not None and sinks.dim() != 1:
            raise CacheStateError(
                f"attention sinks of shape {list(sinks.shape)}: only one logit per query head can be read in blocks; "
                "give the layers enough near memory to be read whole"
            )
        return sinks


def choose_base(module: nn.Module) -> Callable[..., Any]:
    """Return the attention that the model ran on before it was attached; sdpa does with softcap what it did then."""
    return _compat.sdpa_attention_forward if base_of(module) == "sdpa" else run_eager


def base_of(module: nn.Module) -> str:
    """Return the name of that attention: sdpa or eager."""
    return getattr(module, "farkv_base", "sdpa")


def run_eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Run the model file's plain attention with the additive mask that it expects."""
    eager = _compat.get_eager_attention(module)
    if eager is None:
        raise CacheStateError(f"{type(module).__name__}: its model file has no eager attention to fall back on")
    n_new, n_keys = q.shape[2], k.shape[2]
    if mask is None and n_new > 1:
        # None means causal to sdpa; eager wants it spelled out.
        mask = torch.ones(n_new, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_new)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return eager(module, q, k, v, mask, **kwargs)


_compat.register(NAME, far_attention)
