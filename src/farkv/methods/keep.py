"""The keep lever: what each layer keeps of the prompt, and of what is decoded after it.

The steps, in XKV's order (docs/papers/xkv.md has equation, function and deviation):
  every pass       watch: the last queries of every layer                       (`methods.watch`)
  end of prompt    score every record by them                                   (`math.importance`)
                   allocate: how many each layer keeps, unless a plan says so   (`math.allocate`)
                   evict: the best of every head stay, memory is freed          (`math.keep`, `store.tiers`)
  every few steps  score and evict again, so that decoding stays within the budget (not in the paper)
"""

from __future__ import annotations

from typing import Any

from farkv._axes import Bool, Tensor
from farkv.math.allocate import allocate
from farkv.math.importance import PADDING, sort_gains
from farkv.math.keep import choose_kept, join_marks
from farkv.math.select import force_sinks
from farkv.methods.watch import Watcher
from farkv.store.records import Keep
from farkv.store.sizes import Allowed, LayerShape, count_cap, share_out
from farkv.store.tiers import Tiers

# Decoding evicts this share of a layer's records at once, so that it scores only now and then.
SLACK = 1 / 16
MOST_SLACK = 32


class Keeper:
    """What may be kept of one cache, and the scores that decide it."""

    def __init__(self, watcher: Watcher, allowed: dict[int, Allowed] | None, store: Tiers, window: int):
        self.watcher, self.config, self.store = watcher, watcher.config, store
        self.layers = list(store.order)
        self.widest_recent = max(self.config.window, window + 1)
        self.planned = allowed is not None
        self.allowed = allowed
        # One curve per layer, of the prompt that is being read.
        self.gains: dict[int, Any] = {}
        # Tokens of the prompt where it is read in chunks; 0: every pass of more than one token may be its end.
        self.prompt_tokens = 0
        # True where a prompt whose shares are planned is attended to before any of it is stored.
        self.passes_by = False
        self._counted: tuple[int, dict[int, int]] = (-1, {})

    def count_recent(self, tokens: int) -> int:
        """Return the newest records that always stay of a context of `tokens`."""
        return self.widest_recent

    @property
    def recent(self) -> int:
        """The newest records that stay now."""
        return self.count_recent(self.store.seen(self.layers[0]))

    @property
    def least(self) -> int:
        """Records that every layer keeps now, whatever its share."""
        return self.count_least(self.store.seen(self.layers[0]))

    def count_least(self, tokens: int) -> int:
        """Return the records that every layer keeps of a context of `tokens`, whatever its share."""
        forced = self.count_recent(tokens) + (self.config.sinks or 0)
        # A plan says what is kept; the default's floor is for prompts that are allocated on their own.
        return forced if self.planned else max(forced, self.config.least_records)

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
            # One more than the least: the newest token stands beside it while it is read.
            least = min(tokens, self.count_least(tokens) + (0 if self.config.paper else 1))
            self._counted = (tokens, dict(zip(self.layers, share_out(wanted, least, int(total + 1e-9)), strict=True)))
        return self._counted[1][layer]

    def widest(self, tokens: int, n_new: int) -> dict[int, int]:
        """Return the rows that every layer holds when a context of `tokens` is at its widest."""
        if self.keeps_at_once(n_new):
            return {i: self.count(i, tokens) for i in self.layers}
        if any(self.store.evicted.values()):
            return {i: self.store.length(i) + n_new for i in self.layers}
        return dict.fromkeys(self.layers, tokens)

    def count_besides(self, shape: LayerShape, tokens: int, n_new: int, rows: dict[int, int]) -> int:
        """Reserve what will be kept, where less than all is ever stored; else return the bytes an eviction needs.

        A layer that is evicted stands beside its old self for a moment.
        """
        row_bytes = shape.token_bytes + self.store.book_bytes * shape.batch * shape.kv_heads
        if max(rows.values()) < tokens:
            self.store.reserve(rows)
            # Beside a selector a layer's prompt is stored whole before what stays of it is known.
            return tokens * row_bytes if self.keeps_at_once(n_new) and not self.passes_by else 0
        return max(self.count(i, tokens) for i in self.layers) * row_bytes

    def keeps_at_once(self, n_new: int) -> bool:
        """Say whether this pass is a whole prompt of which a plan says how much each layer keeps."""
        fresh = self.store.seen(self.layers[0]) == 0
        return self.planned and fresh and n_new > 1 and n_new >= self.prompt_tokens

    def allocate(self) -> None:
        """Find the layers' shares from this prompt's own curves."""
        import numpy as np

        config, tokens = self.config, self.store.seen(self.layers[0])
        gains = np.stack([self.gains[i] for i in self.layers])
        self.gains, self._counted = {}, (-1, {})
        if gains.shape[1] == 0:
            self.allow_evenly()
            return
        n_layers, n_old = gains.shape
        if config.retention is not None:
            counts = allocate(gains, retention=config.retention, rule=config.rule)
            self.allowed = {i: Allowed(self.recent + 1, n / tokens) for i, n in zip(self.layers, counts, strict=True)}
        elif config.tokens is not None:
            counts = allocate(gains, tokens=min(config.tokens, n_layers * n_old), rule=config.rule)
            self.allowed = {i: Allowed(self.recent + int(n), 0.0) for i, n in zip(self.layers, counts, strict=True)}
        else:
            cap = count_cap(config.need_fraction, tokens, config.least_records)
            budget = max(0, cap * n_layers - self.recent * n_layers)
            counts = allocate(gains, tokens=min(budget, n_layers * n_old), rule=config.rule)
            shares = [(int(n) + self.recent) / tokens for n in counts]
            # What a short prompt keeps besides its share (the window, the least) is no share of a longer context.
            scale = min(1.0, config.need_fraction * n_layers / sum(shares))
            self.allowed = {i: Allowed(0, share * scale) for i, share in zip(self.layers, shares, strict=True)}

    def allow_evenly(self) -> None:
        """Give every layer the same: there was no prompt to tell them apart."""
        config = self.config
        if config.retention is not None:
            share = Allowed(0, 1.0)
        elif config.tokens is not None:
            share = Allowed(self.recent + config.tokens // len(self.layers), 0.0)
        else:
            share = Allowed(0, config.need_fraction)
        self.allowed = dict.fromkeys(self.layers, share)

    # --- which ----------------------------------------------------------------------------------------------

    def end_prompt(self, layer: int, visible: Bool[Tensor, "B h S"] | None) -> list[int]:
        """Score a layer when the prompt has gone through it; return the layers that can be evicted now."""
        if self.allowed is not None:
            self.mark(layer, visible)
            return [layer]
        self.mark(layer, visible, curve=True)
        if layer != self.layers[-1]:
            return []
        self.allocate()
        return self.layers

    def mark(self, layer: int, visible: Bool[Tensor, "B h S"] | None, *, curve: bool = False) -> None:
        """Score a layer's stored records, where they are, and note the scores as marks."""
        k, v = self.store.records(layer)
        seen = None if visible is None else visible.to(k.device)
        scores = self.watcher.score(layer, k, v, seen, self.recent)
        marks = self.store.kept[layer].marks.view()[..., 0]
        marks[..., : scores.shape[-1]] = join_marks(scores.to(marks.device), marks)
        if curve:
            n_old = max(0, k.shape[2] - self.recent)
            # A deliberate copy to the host: one curve per layer and prompt.
            self.gains[layer] = sort_gains(scores[..., :n_old]).mean(0).cpu().numpy()

    def choose(self, layer: int, scores: Tensor, n_rows: int, visible: Bool[Tensor, "B h S"] | None, room: int) -> Keep:
        """Choose what stays of `n_rows` records: sinks, the newest, the best by score; `room` fewer than may."""
        n_keep = max(self.count(layer, self.store.seen(layer)) - room, min(n_rows, self.least))
        n_old = n_rows - min(self.recent, n_rows)
        seen = None if visible is None else visible[..., :n_old]
        scores = force_sinks(scores[..., :n_old].clone(), min(self.config.sinks or 0, n_old), seen)
        if seen is not None:
            # A mark is never below 0: without this, padding would tie with real records of no weight.
            scores.masked_fill_(~seen, PADDING)
        positions, marks = choose_kept(scores, n_rows, n_keep, self.recent)
        return Keep(positions, marks, min(self.recent, n_rows))

    def choose_stored(self, layer: int, visible: Bool[Tensor, "B h S"] | None, room: int = 0) -> Keep | None:
        """Choose by the marks of stored records; None where all may stay."""
        n_rows = self.store.length(layer)
        if n_rows <= max(self.count(layer, self.store.seen(layer)) - room, self.least):
            return None
        marks = self.store.kept[layer].marks.view()[..., 0].float()
        return self.choose(layer, marks.to(self.store.device), n_rows, visible, room)

    def is_over(self, layer: int) -> bool:
        """Say whether the next decoded token would take the layer over what it may keep."""
        if self.config.paper:
            return False
        if self.allowed is None:
            self.allow_evenly()
        next_count = self.count(layer, self.store.seen(layer) + 1)
        return self.store.length(layer) + 1 > max(next_count, self.least + 1)

    def room(self, layer: int) -> int:
        """Return how many records fewer than it may a layer keeps of a prompt, so that the next token is no excess."""
        if self.config.paper:
            return 0
        seen = self.store.seen(layer)
        return max(0, self.count(layer, seen) + 1 - self.count(layer, seen + 1))

    def slack(self, layer: int) -> int:
        """Return how many records decoding evicts at once."""
        return max(1, min(MOST_SLACK, int(SLACK * self.count(layer, self.store.seen(layer)))))

    def clear(self, layer: int) -> None:
        """Forget what was counted; without a plan, the shares too."""
        self._counted = (-1, {})
        if not self.planned:
            self.allowed = None
