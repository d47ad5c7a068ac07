"""Latent attention (MLA): the cache holds one latent per token, of which keys and values of all heads are made later.

In: an attention module that gives the cache latents and rotated keys, and expands them before it attends. Out: records
of latents, the query that scores them, and an attention function that expands the records it is given.

With the expansion put into the query, latent attention is attention with one KV head:

    key = [latent | rotated key]    value = latent    query of a head = [q W_k | rotated query]    output = out W_v

so methods, index and dense reads in blocks work on latents as they work on keys. What fits is expanded by the module's
own code and read by the model's own attention and query: full reads are the plain model's, bit for bit.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from farkv._axes import Float, Tensor
from farkv.engine.setup import Latents, Setting
from farkv.errors import CacheStateError
from farkv.hf.adapters import is_plain
from farkv.math.step import AttentionFunction

# What an attached model's attention is marked by.
MARKS = frozenset({"farkv_base", "farkv_latents"})
# What an attention of this kind has: its own expansion, the map that it uses, and the sizes.
PARTS = ("expand_kv", "kv_b_proj")
SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_heads")
# What the code of such an attention may mention. Another word may be an indexer that masks tokens, or a key that
# changes after its latent was given to the cache.
WORDS = frozenset(
    """
    ALL_ATTENTION_FUNCTIONS _attn_implementation apply_rotary_emb apply_rotary_pos_emb apply_rotary_pos_emb_interleave
    attention_dropout cat config contiguous device dtype eager_attention_forward expand_kv float g_proj get_interface
    kv_a_layernorm kv_a_proj_with_mqa kv_lora_rank layer_idx o_proj q_a_layernorm q_a_proj q_b_proj q_lora_rank q_proj
    qk_head_dim qk_nope_head_dim qk_rope_head_dim reshape rope_interleave scaling shape sigmoid split to torch training
    transpose unsqueeze update view
    """.split()
)
# Scores by latents and by expanded keys may differ by this share of what the query's and key's lengths allow.
SCORE_ERROR = 2.0**-5


class LatentForm(NamedTuple):
    """The sizes of one layer's latent attention: of latent, of a head's key without and with rotation, of its value."""

    rank: int
    nope: int
    rope: int
    value: int
    n_heads: int

    @property
    def width(self) -> int:
        """Return the numbers of one record."""
        return self.rank + self.rope

    @property
    def expansion(self) -> int:
        """Return how many times the bytes of a record its keys and values take, rounded up."""
        return -(-self.n_heads * (self.nope + self.rope + self.value) // self.width)

    def pack(self, latent: Tensor, rotated: Tensor) -> tuple[Float[Tensor, "B 1 T W"], Float[Tensor, "B 1 T 0"]]:
        """Return what the cache is given as one key per token, and values of no width: they are part of the key.

        Raises:
            CacheStateError: these are no latents.
        """
        if (latent.shape[1], latent.shape[3], rotated.shape[3]) != (1, self.rank, self.rope):
            raise CacheStateError(
                f"latent attention: expected latents of {self.rank} numbers and keys of {self.rope} for the cache, got "
                f"{list(latent.shape)} and {list(rotated.shape)}: it cannot be managed, use an ordinary cache"
            )
        return torch.cat([latent, rotated], -1), latent[..., :0]

    def expand(self, module: nn.Module, k: Float[Tensor, "B h K W"]) -> tuple[Tensor, Tensor]:
        """Return keys and values of all heads, by the module's own code.

        Cost: 2 B K rank H (nope + value) operations; `expansion` times the records' bytes.
        """
        # A deliberate copy: the product of rows that lie apart may be summed in another order.
        latent, rotated = k[..., : self.rank].contiguous(), k[..., self.rank :]
        own: Any = module
        return own.expand_kv(latent, rotated)

    def absorb(self, module: nn.Module, q: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T W"]:
        """Return the query that scores records as the module's own query scores expanded keys.

        Cost: 2 B H T nope rank operations.
        """
        weights = self.find_weights(module, q)[:, : self.nope]
        return torch.cat([q[..., : self.nope] @ weights, q[..., self.nope :]], -1)

    def expand_output(self, module: nn.Module, out: Float[Tensor, "B H T R"]) -> Float[Tensor, "B H T Dv"]:
        """Return attention over values of attention over latents."""
        return out @ self.find_weights(module, out)[:, self.nope :].mT

    def find_weights(self, module: nn.Module, like: Tensor) -> Float[Tensor, "H N R"]:
        """Return the expansion of every head; of a map that is packed or wrapped, what it makes of the unit vectors.

        Cost: nothing for a plain map, else the map of `rank` rows.
        """
        up: Any = module.kv_b_proj
        if is_plain(up):
            return up.weight.view(self.n_heads, -1, self.rank)
        ones = torch.eye(self.rank, dtype=like.dtype, device=like.device)
        return up(ones).mT.reshape(self.n_heads, -1, self.rank)


def find_latents(module: nn.Module) -> LatentForm | None:
    """Return the form of a latent attention, by its parts and its code; None for any other."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    sizes = [getattr(module, name, None) for name in SIZES]
    if code is None or not {"expand_kv", "update"} <= set(code.co_names) <= WORDS:
        return None
    if not all(hasattr(module, name) for name in PARTS) or not all(isinstance(n, int) and n > 0 for n in sizes):
        return None
    own: Any = module
    form = LatentForm(*sizes)  # pyright: ignore[reportArgumentType]
    n_out = form.n_heads * (form.nope + form.value)
    up = own.kv_b_proj
    fits = getattr(up, "in_features", None) == form.rank and getattr(up, "out_features", None) == n_out
    return form if fits and getattr(up, "bias", None) is None else None


def note_latents(attention: dict[int, nn.Module], setting: Setting) -> tuple[dict[int, LatentForm], Setting]:
    """Return the forms of the layers that store latents, and a setting that says so."""
    forms = {i: form for i, module in attention.items() if (form := find_latents(module)) is not None}
    if not forms:
        return forms, setting
    latents = {i: Latents(form.rank, form.expansion) for i, form in forms.items()}
    # So often the model repeats what it reads.
    return forms, setting._replace(n_groups=max(form.expansion for form in forms.values()), latents=latents)


def mark(module: nn.Module, base: str, form: LatentForm | None) -> None:
    """Let an attention know what it ran on before it was attached, and the form of its latents."""
    module.farkv_base, module.farkv_latents = base, form  # type: ignore[assignment]


def unmark(module: nn.Module) -> None:
    """Let an attention forget what `mark` told it."""
    for name in MARKS & vars(module).keys():
        delattr(module, name)


class Made(NamedTuple):
    """What a module made of the new tokens of one call: its query, their keys and values, and their records."""

    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B H T D"]
    v: Float[Tensor, "B H T Dv"]
    records: Float[Tensor, "B 1 T W"]


class LatentAttention:
    """The model's own attention over records of latents: farkv's `AttentionFunction` of one call."""

    def __init__(self, form: LatentForm, module: nn.Module, own: AttentionFunction, made: Made):
        self.form, self.module, self.own, self.made = form, module, own, made

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> object:
        """Expand the records and attend to them with the module's own query; `q` only scores, `v` is part of `k`."""
        if k is self.made.records:
            # The new tokens alone: the module has expanded them already.
            return self.own(self.made.q, self.made.k, self.made.v, mask)
        return self.own(self.made.q, *self.form.expand(self.module, k), mask)

    def wrap(self, out: Float[Tensor, "B H T R"]) -> object:
        """Return what attention over latents comes to, in the model's form."""
        return self.own.wrap(self.form.expand_output(self.module, out))

    @property
    def sinks(self) -> Float[Tensor, " Hq"] | None:
        """Return the model's attention sinks."""
        return self.own.sinks


def check_made(form: LatentForm, module: nn.Module, made: Made, absorbed: Tensor) -> str:
    """Return how what attention is called with differs from what the records expand to; empty where it does not.

    The first token is expanded, and scored both ways. A deliberate sync, once per cache and layer.
    """
    shapes = [list(t.shape[1:]) for t in (made.q, made.k, made.v)]
    n_new, dim = made.records.shape[2], form.nope + form.rope
    if shapes != [[form.n_heads, n_new, dim], [form.n_heads, n_new, dim], [form.n_heads, n_new, form.value]]:
        return f"queries, keys and values of {shapes}"
    first = made.records[:, :, :1]
    for name, found, given in zip("kv", form.expand(module, first), (made.k, made.v), strict=True):
        off = (found - given[:, :, :1]).abs().nan_to_num().max()
        if bool(off > SCORE_ERROR * given[:, :, :1].abs().nan_to_num().max()):
            return f"{name} off by {float(off):.3g}"
    ours, theirs = ((q[:, :, :1] * k).sum(-1).float() for q, k in ((absorbed, first), (made.q, made.k[:, :, :1])))
    length = made.q[:, :, :1].float().norm(dim=-1) * made.k[:, :, :1].float().norm(dim=-1)
    off = ((ours - theirs).abs() - SCORE_ERROR * length).nan_to_num().max()
    return f"a score off by {float(off):.3g}" if bool(off > 0) else ""
