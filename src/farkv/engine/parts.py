"""The parts of one engine, each made once, in `engine.build`."""

from __future__ import annotations

from typing import NamedTuple

from farkv.engine.admit import Admission
from farkv.engine.attend import Attention
from farkv.engine.bank import Bank
from farkv.engine.budget import Budgets
from farkv.engine.choose import Chooser
from farkv.engine.evict import Eviction
from farkv.engine.mode import Mode
from farkv.engine.padding import Padding
from farkv.engine.records import LayerRecords
from farkv.methods.base import Evictor, Selector
from farkv.store.tiers import Store


class Parts(NamedTuple):
    """What an engine is put together from."""

    store: Store
    padding: Padding
    records: dict[int, LayerRecords]
    selector: Selector
    evictor: Evictor | None
    budgets: Budgets
    chooser: Chooser
    attention: Attention
    eviction: Eviction
    admission: Admission
    mode: Mode
    bank: Bank
