"""XKV: every layer keeps its own share of a cache budget; the rest is evicted, and attention is dense over what stays.

The steps are those of `methods.keep`. Where a plan says how much each layer keeps, a layer is evicted as soon as it
was attended to: its prompt is never stored whole. Without one, all layers wait until the last is scored.
"""

from __future__ import annotations

from farkv._axes import Tensor
from farkv.config import XKV
from farkv.methods.contract import Kernel, Place, Step
from farkv.methods.sparse import SparseRecipe
from farkv.store.sizes import LayerShape


class XKVRecipe(SparseRecipe):
    """Keeps records near, as many per layer as it is allowed, and reads all of them."""

    at_home = True

    def __init__(self, place: Place, config: XKV):
        levers = place.levers._replace(xkv=config, keep=True)
        super().__init__(place._replace(levers=levers), fraction=1.0, sinks=0, window=0)
        assert self.keeper is not None
        self.wants_one_pass = self.keeper.passes_by = self.keeper.planned
        self.passing = False

    def reads_all(self, layer: int) -> bool:
        """Attention is dense over what is kept."""
        return True

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store new tokens, or let a whole prompt pass by: what stays of it is stored after attention."""
        keeper = self.keeper
        assert keeper is not None
        if layer == self.layers[0]:
            keeper.prompt_tokens = self.prompt_tokens
            # Said once for all layers, before the first of them has seen anything.
            self.passing = keeper.keeps_at_once(k.shape[2])
        if not self.passing:
            super().append(layer, k, v)
            return
        self.account.record_bytes[layer] = (k.shape[-1] + v.shape[-1]) * k.element_size()
        if layer == self.layers[0]:
            self.admit(LayerShape(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1], k.element_size()), k.shape[2])
        self.store.pass_by(layer, k, v)

    def attend(self, layer: int, step: Step, kernel: Kernel) -> object:
        """Attend to everything; then store what stays of a prompt that passes by."""
        if not self.passing or self.dense:
            return super().attend(layer, step, kernel)
        keeper = self.keeper
        assert keeper is not None
        self.padding.note(step.mask)
        n = step.k.shape[2]
        real = self.padding.of_tokens(n)
        watcher = self.watcher
        assert watcher is not None
        watcher.watch(layer, step.query, real)
        out = kernel(step.query.q, step.k, step.v, step.mask)
        visible = None if real is None else real[:, None]
        scores = watcher.score(layer, step.k, step.v, visible)
        self.store.put(layer, step.k, step.v, keeper.choose(layer, scores, n, visible, keeper.room(layer)))
        return out
