"""How many records each layer may keep: from a plan, or computed from the prompt that was just read.

In: a method's rule, a plan's shares, how long the context is. Out: counts per layer, and the bytes they ask for.
The shares themselves are `math.allocate`'s.
"""

from __future__ import annotations

from typing import Any

from farkv.engine.bytes_need import SharesNeed
from farkv.math.allocate import allocate
from farkv.methods.base import KeepRule
from farkv.store.sizes import Allowed, LayerShape, count_cap, share_out
from farkv.store.tiers import Store

# Decoding evicts this share of a layer's records at once, so that it scores only now and then.
SLACK = 1 / 16
MOST_SLACK = 32


class Shares:
    """What each layer of one cache may keep.

    Args:
        planned: what a plan allows; None: it is found from each prompt.
        passes_by: a prompt whose shares are planned is attended to before any of it is stored.
    """

    def __init__(self, rule: KeepRule, planned: dict[int, Allowed] | None, store: Store, *, passes_by: bool):
        self.rule, self.store = rule, store
        self.layers = list(store.order)
        self.is_planned = planned is not None
        self.allowed = planned
        self.passes_by = passes_by and self.is_planned
        # One curve per layer, of the prompt that is being read.
        self.gains: dict[int, Any] = {}
        self._counted: tuple[int, dict[int, int]] = (-1, {})

    # --- always kept ----------------------------------------------------------------------------------------

    def count_recent(self, tokens: int) -> int:
        """Return the newest records that always stay of a context of `tokens`."""
        rule = self.rule
        if rule.most_recent is None:
            return max(rule.window, self.store.window + 1)
        cap = count_cap(rule.fraction, tokens)
        # One record of the cap is the newest token itself.
        share = min(int(rule.most_recent * cap), cap - 1)
        return max(1, min(share, rule.window) if rule.window else share)

    def count_least(self, tokens: int) -> int:
        """Return the records that every layer keeps of a context of `tokens`, whatever its share."""
        forced = self.count_recent(tokens) + self.rule.sinks
        # A plan says what is kept; the default's floor is for prompts that are allocated on their own.
        return forced if self.is_planned else max(forced, self.rule.least)

    @property
    def recent(self) -> int:
        """The newest records that stay now."""
        return self.count_recent(self.store.seen(self.layers[0]))

    @property
    def least(self) -> int:
        """Records that every layer keeps now, whatever its share."""
        return self.count_least(self.store.seen(self.layers[0]))

    # --- how many -------------------------------------------------------------------------------------------

    def count(self, layer: int, tokens: int) -> int:
        """Return the records per KV head that a layer may keep of a context of `tokens`."""
        if self.allowed is None:
            return tokens
        if self._counted[0] != tokens:
            wanted = [self.allowed[i].count(tokens) for i in self.layers]
            # An absolute or retention budget is what the layers got; a fraction is a cap on all of them together.
            is_cap = all(a.base == 0 for a in self.allowed.values())
            total = sum(a.share for a in self.allowed.values()) * tokens if is_cap else sum(wanted)
            # Plus one for the newest token while it is being read.
            least = min(tokens, self.count_least(tokens) + (0 if self.rule.grows else 1))
            self._counted = (tokens, dict(zip(self.layers, share_out(wanted, least, int(total + 1e-9)), strict=True)))
        return self._counted[1][layer]

    def plan(self, shape: LayerShape, tokens: int, n_new: int, prompt_tokens: int) -> SharesNeed:
        """Return the rows that every layer holds when a context of `tokens` is at its widest, and bytes beside them.

        While a layer is evicted, its old and its new rows exist side by side.
        """
        row_bytes = shape.token_bytes + self.store.metadata_bytes * shape.batch * shape.kv_heads
        at_once = self.keeps_at_once(n_new, prompt_tokens)
        if at_once:
            rows = {i: self.count(i, tokens) for i in self.layers}
        elif any(self.store.evicted.values()):
            rows = {i: self.store.length(i) + n_new for i in self.layers}
        else:
            rows = dict.fromkeys(self.layers, tokens)
        if max(rows.values()) < tokens:
            # With a selector, a layer's whole prompt is stored before it is known which records stay.
            return SharesNeed(rows, tokens * row_bytes if at_once and not self.passes_by else 0)
        return SharesNeed(rows, max(self.count(i, tokens) for i in self.layers) * row_bytes)

    def keeps_at_once(self, n_new: int, prompt_tokens: int) -> bool:
        """Say whether this pass is a whole prompt of which a plan says how much each layer keeps."""
        fresh = self.store.seen(self.layers[0]) == 0
        return self.is_planned and fresh and n_new > 1 and n_new >= prompt_tokens

    def is_over(self, layer: int) -> bool:
        """Say whether the next decoded token would take the layer over what it may keep."""
        if self.rule.grows:
            return False
        if self.allowed is None:
            self.allow_evenly()
        next_count = self.count(layer, self.store.seen(layer) + 1)
        return self.store.length(layer) + 1 > max(next_count, self.least + 1)

    def count_room(self, layer: int) -> int:
        """Return how many records below its limit a layer keeps after a prompt, so that the next token fits."""
        if self.rule.grows:
            return 0
        seen = self.store.seen(layer)
        return max(0, self.count(layer, seen) + 1 - self.count(layer, seen + 1))

    def count_slack(self, layer: int) -> int:
        """Return how many records decoding evicts at once."""
        return max(1, min(MOST_SLACK, int(SLACK * self.count(layer, self.store.seen(layer)))))

    # --- from the prompt ------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Find the layers' shares from this prompt's own curves."""
        import numpy as np

        rule, tokens = self.rule, self.store.seen(self.layers[0])
        if not rule.by_prompt:
            self.allow_evenly()
            return
        gains = np.stack([self.gains[i] for i in self.layers])
        self.gains, self._counted = {}, (-1, {})
        if gains.shape[1] == 0:
            self.allow_evenly()
            return
        n_layers, n_old = gains.shape
        if rule.retention is not None:
            counts = allocate(gains, retention=rule.retention, rule=rule.share)
            self.allowed = {i: Allowed(self.recent + 1, n / tokens) for i, n in zip(self.layers, counts, strict=True)}
        elif rule.tokens is not None:
            counts = allocate(gains, tokens=min(rule.tokens, n_layers * n_old), rule=rule.share)
            self.allowed = {i: Allowed(self.recent + int(n), 0.0) for i, n in zip(self.layers, counts, strict=True)}
        else:
            cap = count_cap(rule.fraction, tokens, rule.least)
            budget = max(0, cap * n_layers - self.recent * n_layers)
            counts = allocate(gains, tokens=min(budget, n_layers * n_old), rule=rule.share)
            shares = [(int(n) + self.recent) / tokens for n in counts]
            # The minimum that a short prompt keeps must not become a share of a longer context.
            scale = min(1.0, rule.fraction * n_layers / sum(shares))
            self.allowed = {i: Allowed(0, share * scale) for i, share in zip(self.layers, shares, strict=True)}

    def allow_evenly(self) -> None:
        """Give every layer the same share: there is no prompt to measure."""
        rule = self.rule
        if rule.retention is not None:
            share = Allowed(0, 1.0)
        elif rule.tokens is not None:
            share = Allowed(self.recent + rule.tokens // len(self.layers), 0.0)
        else:
            share = Allowed(0, rule.fraction)
        self.allowed = dict.fromkeys(self.layers, share)

    def snapshot(self) -> tuple[Any, Any]:
        """Return what a pass changes, for `restore`."""
        return self.allowed, dict(self.gains)

    def restore(self, state: tuple[Any, Any]) -> None:
        """Restore what `snapshot` returned."""
        self._counted = (-1, {})
        self.allowed, self.gains = state[0], dict(state[1])

    def clear(self) -> None:
        """Forget what was counted; without a plan, the shares too."""
        self._counted = (-1, {})
        if not self.is_planned:
            self.allowed = None
