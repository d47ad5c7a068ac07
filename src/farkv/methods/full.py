"""Full attention through the far store: everything is kept and everything is read."""

from __future__ import annotations

from farkv.config import Full
from farkv.methods.contract import Place
from farkv.methods.sparse import SparseRecipe


class FullRecipe(SparseRecipe):
    """Reads every record of every layer at every step."""

    def __init__(self, place: Place, config: Full):
        super().__init__(place, fraction=config.fraction, sinks=0, window=0)

    def reads_all(self, layer: int) -> bool:
        """Every layer is dense."""
        return True
