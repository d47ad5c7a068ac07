"""The measured account of one run: `Account` counts during the run, `Receipt` is what the user gets.

In: counts from the engine, byte peaks from the ledgers, times from `hf`. Out: a frozen `Receipt` whose `to_dict()` has
stable keys. Knows nothing of models or tensor contents.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from farkv.receipt_text import format_html, format_receipt
from farkv.trace import ReadTrace

# How near a run is to the plain model: every pass was the model's own attention over all records as the model made
# them; or over all of them, but in blocks, by a kernel or in another order of sums; or something was left out or coded.
EXACT = BIT, ROUNDING, INEXACT = ("bit", "rounding", "no")


@dataclass(frozen=True)
class KVBytes:
    """Peak bytes per tier; `total` is the size of a full cache of this context in the model's own heads and dtype."""

    total: int
    near_peak: int
    host_peak: int
    disk_peak: int
    index_peak: int


@dataclass(frozen=True)
class Limits:
    """The limits that were set, in bytes; None: unlimited."""

    near: int | None
    host: int | None
    disk: int | None = None


@dataclass(frozen=True)
class Quant:
    """Storage formats of the tiers; None: records are stored in the model's dtype."""

    host: str | None = None
    disk: str | None = None
    max_error: float | None = None


@dataclass(frozen=True)
class Weights:
    """The dtype that the model computes in, and what its weights were made from; None: they are as they were stored."""

    dtype: str
    source: str | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of host time inside the model's forward passes."""

    prefill_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Quality:
    """Verified decode steps compared with full attention over the same records."""

    steps: int
    top1_agreement: float
    kl_mean: float
    mass_mean: float
    mass_min: float


@dataclass(frozen=True)
class LayerRow:
    """One layer's figures; `why` is the reason that an unmanaged layer is left to Hugging Face."""

    layer: int
    managed: bool
    why: str | None
    read_fraction: float
    kept_fraction: float
    mass_mean: float | None


@dataclass(frozen=True)
class Receipt:
    """Bytes read, held and moved, time taken, and, if verified, the quality."""

    model: str
    weights: Weights
    method: str
    answer: str
    context_tokens: int
    generated_tokens: int
    kv_bytes: KVBytes
    limits: Limits
    read_fraction: float
    index_fraction: float
    resident_fraction: float
    kept_fraction: float
    managed_read_fraction: float
    managed_resident_fraction: float
    managed_kept_fraction: float
    least_read_fraction: float
    peak_read_fraction: float
    exact: str
    notes: tuple[str, ...]
    fetched_bytes_per_token: float
    disk_bytes_per_token: float
    evicted_records: int
    kernel: str
    fallbacks: dict[str, int]
    quant: Quant
    time: Times
    quality: Quality | None
    layers: tuple[LayerRow, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        return format_receipt(self)

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return format_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types with the stable keys of `--json`."""
        row = dataclasses.asdict(self)
        row["layers"], row["notes"] = list(row["layers"]), list(row["notes"])
        return row


@dataclass
class LayerCount:
    """Decode-step sums of one layer, in records (a record: one token of one KV head)."""

    read: float = 0.0
    held: float = 0.0
    # Counts that are computed on the device: summed there, read once for the receipt.
    device_read: Tensor | None = None
    index_bytes: float = 0.0
    mass_sum: float = 0.0
    mass_min: float = 1.0
    mass_steps: int = 0

    def add_read(self, read: float | Tensor, held: float) -> None:
        """Add one step: `read` of `held` records; a tensor stays on its device."""
        self.held += held
        if isinstance(read, Tensor):
            self.device_read = read if self.device_read is None else self.device_read + read
        else:
            self.read += read

    def total_read(self) -> float:
        """Return the number of records read. Cost: one device sync."""
        return self.read + (0.0 if self.device_read is None else float(self.device_read))

    def add_mass(self, mean: float, least: float) -> None:
        """Add the attention mass that one verified step found; NaN is none: there was no attention weight."""
        if not math.isfinite(mean):
            mean = least = 0.0
        self.mass_sum += mean
        self.mass_min = min(self.mass_min, least)
        self.mass_steps += 1

    def mass_mean(self) -> float | None:
        """Return the mean mass over verified steps; None if there were none."""
        return self.mass_sum / self.mass_steps if self.mass_steps else None


@dataclass
class Account:
    """All counters of a run; mutable."""

    layers: dict[int, LayerCount] = field(default_factory=dict)
    record_bytes: dict[int, int] = field(default_factory=dict)
    context_tokens: int = 0
    decode_steps: int = 0
    timed_steps: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    fetched_bytes: int = 0
    disk_bytes: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    # Names of the fast kernels that ran at decode steps.
    kernels: set[str] = field(default_factory=set)
    agreements: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    decoding: bool = False
    # Whether the answer was as long as it may be, and not at its end.
    is_cut: bool = False
    # False while a step is repeated for verification: the bytes it moves are not part of the run.
    counts_bytes: bool = True
    # The largest share of the records that one decode step has read, and what all steps before had read and held.
    peak_read: float = 0.0
    summed: tuple[float, float] = (0.0, 0.0)
    # Records the positions that decode steps read; None: not traced.
    trace: ReadTrace | None = None
    # The worst of `EXACT` of all passes so far.
    exact: str = BIT

    def note_exact(self, how: str) -> None:
        """Note how near a pass came to the plain model: what a later one reads was made by it."""
        self.exact = max(self.exact, how, key=EXACT.index)

    def layer(self, layer: int) -> LayerCount:
        """Return the counts of one layer."""
        count = self.layers.get(layer)
        if count is None:
            count = self.layers[layer] = LayerCount()
        return count

    def count_pass(self, seconds: float, *, measures: bool) -> None:
        """Count a forward pass; a verified step, which `measures`, is not timed."""
        if not self.decoding:
            self.prefill_s += seconds
            return
        self.decode_steps += 1
        self._note_peak()
        if not measures:
            self.timed_steps += 1
            self.decode_s += seconds

    def _note_peak(self) -> None:
        """Note what this step has read, if no count of it has stayed on a device."""
        if any(count.device_read is not None for count in self.layers.values()):
            return
        read = sum(count.read * self.record_bytes.get(i, 1) for i, count in self.layers.items())
        held = sum(count.held * self.record_bytes.get(i, 1) for i, count in self.layers.items())
        was_read, was_held = self.summed
        self.summed = read, held
        if held > was_held:
            self.peak_read = max(self.peak_read, (read - was_read) / (held - was_held))

    def add_fallback(self, name: str) -> None:
        """Count one use of a slower or different path than the one requested."""
        self.fallbacks[name] = self.fallbacks.get(name, 0) + 1

    def count_fetch(self, n_bytes: int) -> None:
        """Count bytes that crossed the link; decode steps only."""
        if self.decoding and self.counts_bytes:
            self.fetched_bytes += n_bytes

    def count_disk(self, n_bytes: int) -> None:
        """Count bytes read from disk; decode steps only."""
        if self.decoding and self.counts_bytes:
            self.disk_bytes += n_bytes

    def read_fraction(self, layers: list[int] | None = None) -> float:
        """Return the bytes of the selected records over those of all records, over all decode steps.

        Args:
            layers: count these alone; None: all.
        """
        counts = {i: c for i, c in self.layers.items() if layers is None or i in layers}
        read = sum(c.total_read() * self.record_bytes.get(i, 1) for i, c in counts.items())
        held = sum(c.held * self.record_bytes.get(i, 1) for i, c in counts.items())
        return read / held if held else 0.0

    def index_fraction(self) -> float:
        """Return the index bytes scored over the bytes of all records, over all layers and decode steps."""
        scored = sum(c.index_bytes for c in self.layers.values())
        held = sum(c.held * self.record_bytes.get(i, 1) for i, c in self.layers.items())
        return scored / held if held else 0.0

    def quality(self) -> Quality | None:
        """Return the comparison with full attention; None if nothing was verified."""
        if not self.kl:
            return None
        counts = [c for c in self.layers.values() if c.mass_steps]
        steps = sum(c.mass_steps for c in counts)
        return Quality(
            steps=len(self.kl),
            top1_agreement=sum(self.agreements) / len(self.agreements),
            kl_mean=sum(self.kl) / len(self.kl),
            mass_mean=sum(c.mass_sum for c in counts) / steps if steps else 1.0,
            mass_min=min((c.mass_min for c in counts), default=1.0),
        )
