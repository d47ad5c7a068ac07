"""The methods: one file each, a frozen config and what scores for it; `table` has a row for each."""

from __future__ import annotations

from farkv.methods.table import (
    H2O,
    METHODS,
    XKV,
    Full,
    Indexer,
    InfiniGen,
    LowBit,
    Method,
    Oracle,
    Pages,
    PyramidKV,
    Random,
    SnapKV,
    Window,
)

__all__ = [
    "H2O", "METHODS", "XKV", "Full", "Indexer", "InfiniGen", "LowBit", "Method", "Oracle", "Pages", "PyramidKV",
    "Random", "SnapKV", "Window",
]  # fmt: skip
