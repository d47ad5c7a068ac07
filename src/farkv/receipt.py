"""What the user gets of one run: a frozen `Receipt` whose `to_dict()` has stable keys.

`Account` (account.py) counts during the run, and `hf/receipt.py` makes the receipt of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from farkv.account import BIT, EXACT, INEXACT, ROUNDING, VERIFIED, Account, LayerCount
from farkv.drafts import DraftFigures
from farkv.receipt_text import format_html, format_receipt

# What counts and what is told of it are imported from one place.
__all__ = [
    "BIT",
    "EXACT",
    "INEXACT",
    "ROUNDING",
    "VERIFIED",
    "Account",
    "KVBytes",
    "LayerCount",
    "LayerRow",
    "Limits",
    "Quality",
    "Quant",
    "Receipt",
    "Rss",
    "Times",
    "Weights",
]  # fmt: skip


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
class Rss:
    """Bytes: the most that the process had so far, None where the system does not say; and the model's weights."""

    peak: int | None
    weights: int


@dataclass(frozen=True)
class Times:
    """Seconds of host time: inside the model's forward passes; and by the clock since the first of them began.

    first_token_s: to the end of the pass that made the first token of an answer; None: there is no answer.
    total_s: to the end of the last pass.
    """

    prefill_s: float
    decode_s: float
    tokens_per_s: float
    first_token_s: float | None
    total_s: float


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
    device: str
    threads: int
    method: str
    fraction_asked: float | None
    answer: str
    stop_reason: str | None
    context_tokens: int
    session_tokens: int
    generated_tokens: int
    rss: Rss
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
    drafts: DraftFigures | None
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
