"""Record what a cache read at every decode step, and replay it in a dense implementation of our own.

The replay shares no line with farkv: the plain Hugging Face model on its own DynamicCache, with an attention written
out here that sees every key and hides by -inf what was not recorded as read. It runs in any dtype; its own error
between float32 and float64 is the tolerance that the tests allow.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tests.models import plain_cache

NAME = "replay_for_tests"


@dataclass
class Pass:
    """One forward pass: its inputs, the beams chosen before it, what each layer read, the logits."""

    inputs: dict[str, Any]
    reorder: list[Tensor]
    reads: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    # What is added to the logits of what was read, by its place among the positions.
    odds: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class Tape:
    """Records a cache; use as a context around the forward passes."""

    def __init__(self, model: PreTrainedModel, cache: Any):
        self.model, self.cache = model, cache
        self.passes: list[Pass] = []
        self._reorder: list[Tensor] = []

    def __enter__(self) -> Tape:
        engine = self.cache.engine
        select = engine.select

        def record_select(layer: int, sequences: Tensor) -> None:
            if layer == engine.layers[0]:
                self._reorder.append(sequences.clone())
            select(layer, sequences)

        chooser = engine.parts.chooser
        choose = chooser.choose

        def record_choice(records: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = choose(records, *args, **kwargs)
            if chosen.odds is not None:
                self.passes[-1].odds[records.layer] = chosen.odds.clone()
            return chosen

        self._choose, chooser.choose = choose, record_choice
        engine.select, self.cache.account.trace = record_select, self
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.cache.engine.parts.chooser.choose = self._choose
        del self.cache.engine.select
        self.cache.account.trace = None

    def note(self, layer: int, positions: Tensor, valid: Tensor | None, tokens: int) -> None:
        """Record what a decode step reads of a layer, as the cache tells a trace."""
        self.passes[-1].reads[layer] = positions.clone(), None if valid is None else valid.clone()

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {n: kwargs[n].clone() for n in names if kwargs.get(n) is not None}
        self.passes.append(Pass(inputs, self._reorder))
        self._reorder = []

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        self.passes[-1].logits = out.logits[:, -1].clone()

    def decode(self) -> list[Pass]:
        """Return the passes that read a choice."""
        return [p for p in self.passes if p.reads]


class Replay:
    """The dense twin's state: which keys each layer may see in the running pass."""

    reads: ClassVar[dict[int, tuple[Tensor, Tensor | None]]] = {}
    odds: ClassVar[dict[int, Tensor]] = {}


def lay_odds(odds: Tensor, positions: Tensor, n_keys: int) -> Tensor:
    """Put the odds of recorded positions where these are in the context, [B, Hkv, S]; of the newest there are none."""
    return torch.zeros(*positions.shape[:2], n_keys).scatter_add_(-1, positions[..., : odds.shape[-1]], odds)


def allow(positions: Tensor, valid: Tensor | None, n_keys: int) -> Tensor:
    """Turn recorded positions into a mask over the context, [B, Hkv, S]."""
    allowed = torch.zeros(*positions.shape[:2], n_keys, dtype=torch.int)
    keep = torch.ones_like(positions) if valid is None else valid.long()
    allowed.scatter_add_(-1, positions, keep.int())
    assert int(allowed.max()) <= 1, "a record was read twice"
    return allowed > 0


def replay_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention by the book, in the dtype that comes in: every key, -inf where it was not read."""
    n_new, n_keys = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    if module.layer_idx in Replay.reads:
        # What was not read is not there: in 0 times NaN it would be.
        unread = ~allow(*Replay.reads[module.layer_idx], n_keys)[..., None]
        k, v = k.masked_fill(unread, 0.0), v.masked_fill(unread, 0.0)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
    if module.layer_idx in Replay.odds:
        more = lay_odds(Replay.odds[module.layer_idx], Replay.reads[module.layer_idx][0], n_keys)
        logits = logits + more.to(logits).repeat_interleave(groups, 1)[:, :, None]
    seen = torch.ones(n_new, n_keys, dtype=torch.bool).tril(n_keys - n_new) if mask is None else mask
    seen = seen.expand(*logits.shape)
    if module.layer_idx in Replay.reads:
        allowed = allow(*Replay.reads[module.layer_idx], n_keys)
        seen = seen & allowed.repeat_interleave(groups, 1)[:, :, None]
    # A row of padding sees nothing; what it computes is never read.
    logits = logits.masked_fill(~seen & seen.any(-1, True), -torch.inf)
    if kwargs.get("s_aux") is not None:
        sinks = kwargs["s_aux"].to(logits).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, replay_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def replay(model: PreTrainedModel, passes: list[Pass], dtype: torch.dtype, *, whole: bool = False) -> list[Tensor]:
    """Run the recorded passes densely in `dtype` and return each pass's last logits; `whole` ignores the choice."""
    twin = copy.deepcopy(model).to(dtype)
    twin.set_attn_implementation(NAME)
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # the grouped kernel knows no float64
    cache, out = plain_cache(twin), []
    try:
        for p in passes:
            for beams in p.reorder:
                cache.reorder_cache(beams)
            Replay.reads, Replay.odds = ({}, {}) if whole else (p.reads, p.odds)
            out.append(twin(**p.inputs, past_key_values=cache, use_cache=True).logits[:, -1])
    finally:
        Replay.reads, Replay.odds = {}, {}
    return out


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of two lists of logits."""
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def check_replay(model: PreTrainedModel, tape: Tape) -> None:
    """Assert that farkv computed what the dense twin computes from the same choice, and that the choice mattered."""
    assert tape.decode(), "nothing was read sparsely"
    ours = [p.logits for p in tape.passes]
    exact = replay(model, tape.passes, torch.float64)
    noise = worst(replay(model, tape.passes, torch.float32), exact)
    assert 0 < noise < 1e-3
    difference = worst(ours, exact)
    assert difference <= 4 * noise, f"differs by {difference:g}, the reference's own float32 error is {noise:g}"
    effect = worst(replay(model, tape.passes, torch.float64, whole=True), exact)
    assert effect > 100 * noise, f"the choice changes logits by {effect:g} only: the test proves nothing"
