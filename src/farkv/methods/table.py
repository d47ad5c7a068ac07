"""The table of methods: a name, a config, and what scores for it. A new method is one file and one row here."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from farkv.errors import ConfigError
from farkv.methods.base import Evictor, Selector
from farkv.methods.full import Full, FullSelector
from farkv.methods.h2o import H2O, HeavyHitters
from farkv.methods.indexed import IndexSelector
from farkv.methods.indexer import Indexer, IndexerSelector
from farkv.methods.infinigen import InfiniGen
from farkv.methods.lowbit import LowBit
from farkv.methods.oracle import Oracle, OracleSelector
from farkv.methods.pages import Pages, PagesSelector
from farkv.methods.random import Random, RandomSelector
from farkv.methods.snapkv import PyramidKV, SnapKV
from farkv.methods.window import Window, WindowSelector
from farkv.methods.xkv import XKV, QueryEvictor

FULL_ATTENTION = "full_attention"


@runtime_checkable
class Method(Protocol):
    """A method's config: a frozen dataclass. `fraction` caps the records that are read, or kept, over all layers."""

    @property
    def fraction(self) -> float | None:
        """Return the cap; None where it was left out."""
        ...


class Row(NamedTuple):
    """One method: its config's class, and its selector, or its evictor where it keeps only what it reads.

    reads_keys: its choice reads every key, so it is a bound and saves nothing.  layer_type: the layers that it manages,
    by what transformers calls them; others are left to the model.
    """

    config: type[Any]
    selector: type[Selector] | None = None
    evictor: type[Evictor] | None = None
    reads_keys: bool = False
    layer_type: str = FULL_ATTENTION


METHODS: dict[str, Row] = {
    "infinigen": Row(InfiniGen, IndexSelector),
    "xkv": Row(XKV, evictor=QueryEvictor),
    "full": Row(Full, FullSelector),
    "indexer": Row(Indexer, IndexerSelector, layer_type="indexed_attention"),
    "window": Row(Window, WindowSelector),
    "oracle": Row(Oracle, OracleSelector, reads_keys=True),
    "random": Row(Random, RandomSelector),
    "h2o": Row(H2O, evictor=HeavyHitters),
    "snapkv": Row(SnapKV, evictor=QueryEvictor),
    "pyramidkv": Row(PyramidKV, evictor=QueryEvictor),
    "pages": Row(Pages, PagesSelector),
    "lowbit": Row(LowBit, IndexSelector),
}


def find_row(method: Method) -> Row:
    """Return a config's row.

    Raises:
        ConfigError: it is in no row.
    """
    return METHODS[find_name(method)]


def find_name(method: Method) -> str:
    """Return a config's name in the table.

    Raises:
        ConfigError: it is in no row.
    """
    for name, row in METHODS.items():
        if row.config is type(method):
            return name
    got = repr(method) if isinstance(method, str) else type(method).__name__
    if isinstance(method, type):
        got = f"the class {method.__name__}"
    names = ", ".join(f"{row.config.__name__}()" for row in METHODS.values())
    raise ConfigError(
        f"method: expected one of {names}, all of them in farkv.methods, got {got}; write for "
        "example attach(model, farkv.InfiniGen(fraction=0.05))"
    )


def find_layer_type(selects: Method | None) -> str:
    """Return the type of the layers that a selector manages; without one, an evictor's."""
    return FULL_ATTENTION if selects is None else find_row(selects).layer_type


def evicts(method: Method) -> bool:
    """Say whether a method keeps only what it reads: what it evicts is gone."""
    return find_row(method).evictor is not None
