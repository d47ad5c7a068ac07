"""Caches that keep a part of what they are given: how they are made, and what they read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from torch import Tensor

import farkv
from farkv.calibrate.plan import Allocation, Plan
from farkv.hf.identity import identify_model
from farkv.methods import XKV, InfiniGen, Method
from tests.hf.tape import Tape
from tests.methods.evictors import places
from tests.models import forward, generate, make_prompt

TOKENS = 60
SINGLE = make_prompt(1, tokens=TOKENS)
PADDED = make_prompt(3, tokens=TOKENS, pad=20)
IDS = make_prompt(2, tokens=TOKENS)["input_ids"]
METHODS: dict[str, tuple[Method, ...]] = {
    "xkv": (XKV(fraction=0.3),),
    "tokens": (XKV(tokens=60),),
    "retention": (XKV(retention=0.6),),
    "paper": (XKV(tokens=60, paper=True),),
    "infinigen+keep": (InfiniGen(fraction=0.2), XKV(fraction=0.5)),
}


def make_shares(model: Any, base: int = 0, **levers: Any) -> Plan:
    """Return a plan for a model with these shares per lever."""
    rows = {
        name: Allocation(
            tuple(shares), base if name == "keep" else 0, "xkv", {"ratio": 0.3}, tuple(shares), tuple(shares)
        )
        for name, shares in levers.items()
    }
    with farkv.attach(model, profile=False) as far:
        managed = far.managed
    return Plan(identify_model(model), tuple(managed), rows)  # type: ignore[arg-type]


def steps(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    return [forward(model, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]


class KeptTape(Tape):
    """A tape that also sees dense reads, and notes tokens where the store knows rows."""

    def __enter__(self) -> KeptTape:
        super().__enter__()
        store = self.cache.engine.store
        read_all = store.read_all

        @contextmanager
        def record_all(layer: int, *, whole: bool = False) -> Any:
            with read_all(layer, whole=whole) as found:
                if not whole:
                    self.passes[-1].reads[layer] = (places(store, layer).clone(), None)
                yield found

        store.read_all = record_all
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del self.cache.engine.store.read_all


def record(model: Any, methods: tuple[Method, ...], prompt: Any, near: Any = None, **options: Any) -> KeptTape:
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        with KeptTape(model, cache) as tape:
            generate(model, prompt, cache, **{"n": 5, **options})
    assert all(cache.engine.store.evicted.values()), "nothing was evicted: the test proves nothing"
    return tape
