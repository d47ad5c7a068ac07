"""What a user may choose: one frozen config per method, and what is said around them.

In: keyword arguments or text. Out: checked values. Knows no tensors.
"""

from __future__ import annotations

from farkv.config.baselines import H2O, LowBit, Pages, PyramidKV, SnapKV
from farkv.config.methods import (
    KEPT_FRACTION,
    LEAST_RECORDS,
    LEVERS,
    RULES,
    SCORERS,
    SOURCES,
    XKV,
    Full,
    InfiniGen,
    Lever,
    Oracle,
    Random,
    Rule,
    Source,
    Window,
)
from farkv.config.options import (
    EVICT,
    KERNELS,
    QUANT,
    check_fraction,
    check_name,
    check_storage,
    format_bytes,
    parse_bytes,
    parse_disk,
)

__all__ = [
    "EVICT", "H2O", "KEPT_FRACTION", "KERNELS", "LEAST_RECORDS", "LEVERS", "QUANT", "RULES", "SCORERS", "SOURCES",
    "XKV", "Evictor", "Full", "InfiniGen", "Lever", "LowBit", "Method", "Oracle", "Pages", "PyramidKV", "Random",
    "Rule", "Selector", "SnapKV", "Source", "Window", "check_fraction", "check_name", "check_storage", "format_bytes",
    "parse_bytes", "parse_disk",
]  # fmt: skip

# What goes to `attach` alone; what keeps every record and chooses per step, also beside XKV.
Selector = Full | Window | Random | Oracle | InfiniGen | Pages | LowBit | SnapKV | PyramidKV | H2O
Method = Selector | XKV
# What evicts by scores of its own, and so goes to `attach` alone.
Evictor = SnapKV | PyramidKV | H2O
