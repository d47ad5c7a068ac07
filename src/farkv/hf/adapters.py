"""Layer i's query by as few operations as its structure allows: norm, query projection, query norm, rotary embedding.

In: a hidden state and the rotary tables. Out: the query that `probe_query` finds, without the projections of key and
value. What a module looks like is read from its attributes and from the words of its code, never from its name; an
adapter is used only where its result was compared with the probe's. Projections and norms are called as modules, so
what was wrapped around them later (LoRA, hooks, other weights) takes part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from farkv._axes import Float, Tensor
from farkv.hf import _compat
from farkv.math.logits import Logits
from farkv.math.step import Query

NORMS = ("input_layernorm", "self_attn_layer_norm", "operator_norm", "attention_layernorm")
QUERY_NORMS = ("q_norm", "q_layernorm")
# What the code of an attention may mention and still form its query of the hidden state and the tables alone. Another
# word may be a clamp, a scale that grows with the position, or anything else that one comparison does not show.
WORDS = frozenset(
    """
    ALL_ATTENTION_FUNCTIONS apply_rotary_pos_emb attention_dropout _attn_implementation attn_logit_softcapping
    attn_sub_norm cat chunk config contiguous dense dropout eager_attention_forward functional get_interface getattr
    head_dim head_size is_sliding k_layernorm k_norm k_proj layer_idx nn num_attention_heads num_heads
    num_key_value_heads o_proj out_proj p q_layernorm q_norm q_proj qk_layernorm qkv_proj query_key_value reshape
    residual_dropout rotary_ndims scaling shape sigmoid sinks size sliding_window torch training transpose update
    use_qk_norm use_rope v_proj view
    """.split()
)


class QueryForm(NamedTuple):
    """How one layer makes its query.

    norm, query_norm: names of modules, None where there is none.  by_head: the query's norm runs over each head alone.
    scaled: the query carries the scale that logits get elsewhere.
    """

    norm: str | None
    project: Callable[[nn.Module, Tensor, Any], Tensor]
    query_norm: str | None
    by_head: bool
    scaled: bool
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    n_heads: int
    dim: int
    logits: Logits


class Adapter(NamedTuple):
    """A form and its modules; `part` is the block, or the attention if the hidden state is normed already."""

    part: nn.Module
    attention: nn.Module
    form: QueryForm
    seen: tuple[object, ...]

    def estimate(self, hidden: Float[Tensor, "B T E"], rope: Any) -> Query:
        """Return the query that this layer forms of a hidden state.

        Cost: the norm and the query projection of one token.
        """
        form, attention = self.form, self.attention
        x: Tensor = hidden if form.norm is None else getattr(self.part, form.norm)(hidden)
        q = form.project(attention, x, form)
        if form.query_norm is not None and not form.by_head:
            q = getattr(attention, form.query_norm)(q)
        # What lies behind a head's query (a gate) is left out.
        q = q.view(*q.shape[:-1], form.n_heads, -1)[..., : form.dim]
        if form.query_norm is not None and form.by_head:
            q = getattr(attention, form.query_norm)(q)
        if form.scaled:
            scaling: Any = attention.scaling
            q = q * scaling
        q = q.transpose(1, 2)
        return Query(q if form.rotate is None else form.rotate(q, *rope), form.logits)

    def still_holds(self, part: nn.Module) -> bool:
        """Return whether it belongs to this module, and the module is unchanged since the comparison."""
        return part is self.part and self.seen == describe(part, self.attention)


def describe(part: nn.Module, attention: nn.Module) -> tuple[object, ...]:
    """Return what would make an adapter wrong if it changed: other code, hooks around attention, another scale."""
    own, outer = vars(attention), vars(part)
    return own.get("forward"), len(own["_forward_pre_hooks"]), own.get("scaling"), outer.get("forward")


def find_adapter(part: nn.Module, attention: nn.Module, hidden: Tensor, rope: Any, probed: Query) -> Adapter | None:
    """Return an adapter that finds the probed query, None where there is none.

    A deliberate sync with the device: once per layer of an attached model.
    """
    if not mentions_only(attention, WORDS):
        return None
    for form in list_forms(part, attention, probed):
        adapter = Adapter(part, attention, form, describe(part, attention))
        try:
            q = adapter.estimate(hidden, rope).q
        except (RuntimeError, TypeError, AttributeError, ValueError):
            # Another structure than the names promise: shapes do not fit.
            continue
        if is_same(q, probed.q, hidden.shape[-1], is_split=form.project is not project_alone):
            return adapter
    return None


def mentions_only(attention: nn.Module, words: frozenset[str]) -> bool:
    """Say whether the code of an attention's forward is at hand and mentions no other names than these."""
    code = getattr(inspect.unwrap(type(attention).forward), "__code__", None)
    return code is not None and "forward" not in vars(attention) and words.issuperset(code.co_names)


def list_forms(part: nn.Module, attention: nn.Module, probed: Query) -> Iterator[QueryForm]:
    """Yield the forms that the attributes of a layer allow."""
    n_heads, dim = probed.q.shape[1], probed.q.shape[3]
    query_norm = next((name for name in QUERY_NORMS if hasattr(attention, name)), None)
    weight = getattr(getattr(attention, query_norm), "weight", None) if query_norm is not None else None
    norms = [name for name in NORMS if part is not attention and hasattr(part, name)]
    rotations = (rotate_pairs, rotate_by_half_tables, _compat.find_rotation(attention), None)
    for name, project in PROJECTIONS.items():
        if not hasattr(attention, name):
            continue
        for norm in (*norms, None):
            for rotate in rotations:
                yield QueryForm(
                    norm,
                    project,
                    query_norm,
                    weight is None or weight.shape[-1] == dim,
                    probed.logits.scaling == 1.0 and hasattr(attention, "scaling"),
                    rotate,
                    n_heads,
                    dim,
                    probed.logits,
                )


def is_same(got: Tensor, expected: Tensor, n_inputs: int, *, is_split: bool) -> bool:
    """Say whether two queries are equal; of a part of a projection, but for the order in which it was summed."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not is_split:
        return torch.equal(got, expected)
    # Half precision is summed in single, so a sum of n products errs by about sqrt(n) of its epsilons.
    eps = torch.finfo(got.dtype).eps
    bound = 4 * eps + 4 * n_inputs**0.5 * min(eps, torch.finfo(torch.float32).eps)
    return bool((got - expected).abs().max() <= bound * expected.abs().max())


# --- projections: [B, T, E] -> [B, T, Hq * (D + what lies behind each head)] ----------------------------------------


def project_alone(attention: nn.Module, x: Tensor, form: QueryForm) -> Tensor:
    """Run a projection that makes queries."""
    return attention.q_proj(x)  # type: ignore[operator]


def project_first_rows(attention: nn.Module, x: Tensor, form: QueryForm) -> Tensor:
    """Run the first rows of a projection that makes queries, then keys, then values."""
    fused: Any = attention.qkv_proj
    n = form.n_heads * form.dim
    if not is_plain(fused):
        return fused(x)[..., :n]
    return linear(x, fused.weight[:n], None if fused.bias is None else fused.bias[:n])


def project_first_of_each(attention: nn.Module, x: Tensor, form: QueryForm) -> Tensor:
    """Run the query rows of a projection that makes query, key and value head by head."""
    fused: Any = attention.query_key_value
    if x.device.type != "cpu" or not is_plain(fused):
        # As many small products as there are heads would cost a GPU more than one large one.
        return fused(x)
    n, size = form.dim, fused.out_features // form.n_heads
    starts = range(0, fused.out_features, size)
    bias = fused.bias
    parts = [linear(x, fused.weight[i : i + n], None if bias is None else bias[i : i + n]) for i in starts]
    return torch.cat(parts, -1)


PROJECTIONS = {
    "q_proj": project_alone,
    "qkv_proj": project_first_rows,
    "query_key_value": project_first_of_each,
}


def is_plain(module: nn.Module) -> bool:
    """Say whether a module is a bare linear map, so that some of its rows are some of its outputs."""
    own = vars(module)
    return type(module) is nn.Linear and not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"])


# --- rotary embeddings ----------------------------------------------------------------------------------------------


def rotate_pairs(q: Float[Tensor, "B Hq T D"], cos: Float[Tensor, "b T R"], sin: Float[Tensor, "b T R"]) -> Tensor:
    """Turn dimension j with j + R/2: q * cos + (-q_second, q_first) * sin, on the first R of D dimensions."""
    n = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = q if n == q.shape[-1] else q[..., :n]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return turned if n == q.shape[-1] else torch.cat((turned, q[..., n:]), -1)


def rotate_by_half_tables(
    q: Float[Tensor, "B Hq T D"], cos: Float[Tensor, "b T r"], sin: Float[Tensor, "b T r"]
) -> Tensor:
    """Turn all pairs by tables that hold each angle once."""
    return rotate_pairs(q, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
