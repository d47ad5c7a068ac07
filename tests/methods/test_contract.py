"""One suite that every method passes: every row of the table, and what a row's options make of it."""

from __future__ import annotations

from typing import Any

import pytest

from farkv.methods import XKV, Indexer, InfiniGen, LowBit, Pages
from farkv.methods.full import Full
from farkv.methods.table import METHODS
from tests.methods.contract import CASES, Methods

# Every row, at a budget that leaves something to choose.
ROWS: dict[str, Methods] = {
    name: (row.config() if row.config is Full else row.config(fraction=0.3),) for name, row in METHODS.items()
}
VARIANTS: dict[str, Methods] = {
    "paper": (InfiniGen(fraction=0.45, paper=True),),
    "alpha": (InfiniGen(fraction=0.3, alpha=2.0),),
    "top_p": (InfiniGen(fraction=0.3, top_p=0.5),),
    "attn": (InfiniGen(fraction=0.3, source="attn"),),
    "residual": (InfiniGen(fraction=0.3, source="residual"),),
    "no_top_up": (InfiniGen(fraction=0.3, top_up=0.0, sinks=0, window=0),),
    "eight_bits": (InfiniGen(fraction=0.3, index_bits=8),),
    "indexer_alone": (Indexer(),),
    "small_pages": (Pages(fraction=0.3, page=8),),
    "lowbit_4": (LowBit(fraction=0.3, bits=4),),
    "xkv_tokens": (XKV(tokens=60),),
    "xkv_retention": (XKV(retention=0.6),),
    "xkv_paper": (XKV(fraction=0.3, paper=True),),
    "infinigen+xkv": (InfiniGen(fraction=0.2), XKV(fraction=0.5)),
    "pages+xkv": (Pages(fraction=0.2, page=8), XKV(fraction=0.5)),
}
EVERY = {**ROWS, **VARIANTS}


@pytest.mark.parametrize(("check", "near"), CASES)
@pytest.mark.parametrize("methods", EVERY.values(), ids=EVERY)
def test_a_method(methods: Methods, check: Any, near: str | None) -> None:
    check(methods, near)
