"""InfiniGen: speculate one layer ahead which records attention will need, fetch only those.

The steps, in the paper's order (docs/papers/infinigen.md has equation, function and deviation):
  once per model     skew: a basis in which few columns decide the scores     (`math.skew`, in the profile)
  once per prompt    index: partial keys of every token                       (`methods.indexed`, the coders below)
  every layer, step  speculate: score layer i's index with an estimated query (`engine.step`)
                     select: threshold and cap                                (`engine.choose`, `math.select`)
                     fetch: only the chosen records cross the link            (`store.tiers`)
                     attend, and top up what the true query finds missing     (`engine.step`)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from farkv._axes import Tensor
from farkv.config import SOURCES, Source, check_counts, check_flag, check_fraction, check_name, is_number, show_value
from farkv.errors import ConfigError
from farkv.math.score import pool_group, pool_group_by_best
from farkv.math.select import select_mass, select_mean_count, select_within
from farkv.methods.base import LEAST_RECORDS, Cap, Place
from farkv.methods.coder import Coder
from farkv.methods.indexed import IndexRule
from farkv.methods.paper_coder import PaperCoder
from farkv.methods.table_coder import StepCoder, TableCoder

# Index bytes scored per step over the KV bytes, in one pass over the index.
INDEX_SHARE = 1 / 32
# How far reads may vary: what lets them vary more than this is a mistake.
MOST_BURST = 64


@dataclass(frozen=True, kw_only=True)
class InfiniGen:
    """Attend to the records that a query estimated one layer ahead finds in a small index.

    Args:
        fraction: hard cap on the read fraction over all layers; 1.0 reads everything and equals the plain model.
            Left out, it is 0.1 (the paper's: 0.2) but never fewer than 64 records: a short text is read whole.
        paper: the published algorithm; it decides what the following are where they are left out.
        source: the hidden state the query is estimated from: `post_attn`, LN_i(h + attn_{i-1}), is ours;
            `residual`, LN_i(h_{i-1}); `attn`, layer i-1's attention input, is the paper's; `query`: nothing is
            estimated or fetched ahead, the layer's own query chooses.
        index_share: index bytes over the KV bytes, in one pass over the index (ours: 1/32).
        columns: index columns R per KV head, in even steps instead of learned tables (the paper's: 0.3 of the head
            dimension, in the model's dtype).
        index_bits: bits of a column in even steps, 4 or 8.
        alpha: read only records within `alpha` logits of the best one (the paper's: 4).
        top_p: read only the records that hold this share of the estimated attention weight.
        sinks: first tokens that are always read (ours: 4, the paper's: 0).
        window: recent tokens that are always read; with sinks at most a quarter of the cap (ours: 16, the paper's: 0).
        top_up: share of the cap that is chosen late, by the layer's true query (ours: 0.25, the paper's: 0).
        sampled: draw records by their estimated weight, each weighed by how likely it was to be drawn, for heads that
            gain by it on the prompt, of models with 16 or more (ours: True, the paper's: False); where the layer's own
            query chooses, on a CPU.
        burst: how many times its share a layer's heads may read in one step, where attention is flat, if the mean over
            layers and steps stays within `fraction`; 1, also where it is left out: all read the same. Where the layer's
            own query chooses, on a CPU.
    """

    fraction: float | None = None
    paper: bool = False
    source: Source | None = None
    columns: int | None = None
    index_bits: int | None = None
    index_share: float | None = None
    alpha: float | None = None
    top_p: float | None = None
    sinks: int | None = None
    window: int | None = None
    top_up: float | None = None
    sampled: bool | None = None
    burst: float | None = None

    def __post_init__(self) -> None:
        check_flag(paper=self.paper)
        cap = self.cap
        check_fraction(cap.fraction)
        if self.source is not None:
            check_name("source", self.source, SOURCES)
        check_counts(sinks=cap.sinks, window=cap.window)
        if self.columns is not None:
            check_counts(1, columns=self.columns)
        self._check_index()
        if self.alpha is not None and not (is_number(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha: expected a positive number of logits, got {show_value(self.alpha)}")
        if self.top_p is not None and (self.paper or self.alpha is not None):
            raise ConfigError("alpha and top_p: give one of them, got both")
        if self.top_p is not None:
            check_fraction(self.top_p, "top_p")
        self._check_sampled()
        self._check_burst()
        if not is_number(cap.top_up) or not 0 <= cap.top_up < 1:
            raise ConfigError(f"top_up: expected a share in [0, 1), got {show_value(self.top_up)}")

    def _check_index(self) -> None:
        bits = self.index_bits
        if bits is not None and (self.paper or type(bits) is not int or bits not in (4, 8)):
            raise ConfigError(f"index_bits: expected 4 or 8, and none with paper=True; got {show_value(bits)}")
        if self.index_share is not None:
            check_fraction(self.index_share, "index_share")
            if self.paper or self.columns is not None:
                raise ConfigError("index_share: expected none with paper=True or columns=; give one of them")

    def _check_sampled(self) -> None:
        if self.sampled is None:
            return
        check_flag(sampled=self.sampled)
        varies = self.burst is not None and self.burst > 1
        if self.sampled and (self.paper or varies or self.alpha is not None or self.top_p is not None):
            raise ConfigError("sampled: expected none with paper=True, alpha, top_p or burst; give one of them")

    def _check_burst(self) -> None:
        burst = self.burst
        if burst is None:
            return
        if not is_number(burst) or not 1 <= burst <= MOST_BURST:
            raise ConfigError(f"burst: expected a multiple in 1 .. {MOST_BURST}, got {show_value(burst)}")
        if burst > 1 and (self.paper or self.alpha is not None or self.top_p is not None):
            raise ConfigError("burst: expected none above 1 with paper=True, alpha or top_p; give one of them")

    # --- after defaults are filled in ---------------------------------------------------------------------------

    @property
    def cap(self) -> Cap:
        """How much is read."""
        fraction, sinks, window, top_up = (0.2, 0, 0, 0.0) if self.paper else (0.1, 4, 16, 0.25)
        return Cap(
            fraction if self.fraction is None else self.fraction,
            sinks if self.sinks is None else self.sinks,
            window if self.window is None else self.window,
            top_up if self.top_up is None else self.top_up,
            LEAST_RECORDS if self.fraction is None else 1,
            burst=1.0 if self.burst is None else float(self.burst),
        )

    @property
    def index_rule(self) -> IndexRule:
        """How the index is made and used."""
        alpha = 4.0 if self.paper and self.alpha is None else self.alpha
        rule: Any = None
        if alpha is not None:
            rule = partial(select_by_alpha, alpha=alpha, mean=self.paper)
        elif self.top_p is not None:
            rule = partial(select_by_mass, top_p=self.top_p)
        return IndexRule(
            self.cap,
            self.make_coder,
            source=self.source or ("attn" if self.paper else "post_attn"),
            always_ahead=self.paper,
            rule=rule,
            pool=pool_group if alpha is None else pool_group_by_best,
            dense_first=self.paper,
            sampled=not self.paper if self.sampled is None else self.sampled,
        )

    def make_coder(self, place: Place) -> Coder:
        """Return what makes the index in a place."""
        # A light profile has curves alone: the skew is then the prompt's.
        profile = place.profile if place.profile is not None and place.profile.has_skew else None
        if self.paper:
            return PaperCoder(self.columns, profile, place.on_fallback)
        share = INDEX_SHARE if self.index_share is None else self.index_share
        if self.columns is None and self.index_bits is None:
            return TableCoder(share, place.device, place.on_fallback)
        return StepCoder(self.columns, self.index_bits or 4, share, place.device, place.on_fallback)

    def share_beside_dense(self, n_layers: int) -> float:
        """Return the fraction left to other layers where the first of `n_layers` reads everything.

        Raises:
            ConfigError: the dense layer alone passes the cap.
        """
        fraction = self.cap.fraction
        if fraction >= 1:
            return 1.0
        share = (fraction * n_layers - 1) / max(1, n_layers - 1)
        if share <= 0:
            raise ConfigError(
                f"fraction: paper=True reads 1 of {n_layers} layers whole, so the cap must be above "
                f"{1 / n_layers:.3f}, got {fraction}; raise it, or use paper=False"
            )
        return share


def select_by_alpha(scores: Tensor, cap: int, own: Tensor | None, *, alpha: float, mean: bool) -> Any:
    """Choose what is within `alpha` logits of the best; with `mean` the layer's mean count of it, as published."""
    return (select_mean_count if mean else select_within)(scores, cap, alpha, own)


def select_by_mass(scores: Tensor, cap: int, own: Tensor | None, *, top_p: float) -> Any:
    """Choose the fewest that hold `top_p` of the estimated attention weight."""
    return select_mass(scores, cap, top_p, own)
