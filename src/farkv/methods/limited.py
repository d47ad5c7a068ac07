"""What a recipe may take: its store, how many records it reads, and the bytes of a pass at its widest moment.

In: place, levers, a method's own fraction. Out: budgets per layer, or a refusal before anything is stored.
"""

from __future__ import annotations

from farkv._axes import Tensor
from farkv.config import Source
from farkv.errors import CapacityError
from farkv.methods.contract import Budget, Place
from farkv.methods.hold import Holder
from farkv.methods.keep import Keeper
from farkv.methods.spill import MARK_BYTES, Spiller
from farkv.methods.watch import Watcher
from farkv.store.admission import admit
from farkv.store.records import Needs
from farkv.store.sizes import LayerShape, NearNeed, count_cap, count_forced
from farkv.store.spare import Pass, admit_hot
from farkv.store.tiers import BLOCK_TOKENS, Tiers

# The smallest block of a dense read that comes block by block.
LEAST_BLOCK = 64


class Limited:
    """The limits of one recipe."""

    query_source: Source | None = None
    # Records live in near memory: what is kept is read whole.
    at_home = False
    # Marks of records are sums that grow by little at a time.
    exact_marks = False
    wants_one_pass = False
    # Of one layer's records, once there are any.
    shape: LayerShape | None = None

    def __init__(self, place: Place, *, fraction: float, sinks: int, window: int, top_up: float = 0.0):
        self.fraction, self.sinks, self.window, self.share_late = fraction, sinks, window, top_up
        levers, limits = place.levers, place.limits
        spills = limits.evict != "refuse" and limits.disk is None and limits.saved is None and limits.host is not None
        needs = Needs(window, self.at_home, levers.keep or spills, levers.near is not None, place.fast.kernels)
        needs = needs._replace(exact_marks=self.exact_marks)
        self.store = Tiers(place.layers, limits, place.device, needs)
        scored = levers.xkv is not None and (levers.keep or levers.near is not None)
        self.watcher = Watcher(levers.xkv) if scored and levers.xkv else None
        self.keeper = Keeper(self.watcher, levers.allowed, self.store, window) if self.watcher and levers.keep else None
        self.holder = Holder(self.watcher, levers.near, self.store) if self.watcher and levers.near else None
        self.spiller = Spiller(self.store, sinks, window) if spills else None
        self.fetch_shares = levers.fetch
        self.account = place.account
        self.layers = place.layers
        self.least = 1
        # Up to here everything is read, because choosing would take longer; 0 where a cap was asked for.
        self.dense_tokens = 0
        self.verifying = False
        self._admitted: tuple[object, ...] = ()
        self.prompt_tokens = 0
        # Tokens of an announced prompt that are read at once; 0: nothing was announced.
        self.chunk_tokens = 0

    def index_token_bytes(self, shape: LayerShape) -> int:
        """Bytes that one token adds to a layer's index, all KV heads and sequences."""
        return 0

    def index_bytes(self, shape: LayerShape, tokens: int) -> int:
        """Bytes of one layer's index of a context of `tokens`."""
        return self.index_token_bytes(shape) * tokens

    def reads_all(self, layer: int) -> bool:
        """Say whether this layer is left dense by design."""
        return False

    # --- how many -------------------------------------------------------------------------------------------

    def share_of(self, layer: int) -> float:
        """Return the share of the context that a layer may read: the plan's, or the method's own."""
        return self.fraction if self.fetch_shares is None else self.fetch_shares[layer]

    def count_cap(self, tokens: int, layer: int, pads: int = 0) -> int:
        """Return how many records of every KV head a layer may read of a context of `tokens`, and `pads` besides."""
        least = tokens if tokens <= self.dense_tokens else self.least
        cap = count_cap(self.share_of(layer), tokens, least if self.fetch_shares is None else 1)
        evicted = self.store.evicted[layer]
        if evicted:
            # Of an evicted layer there are fewer rows than tokens; padding went first.
            rows = self.store.length(layer) + tokens + pads - self.store.seen(layer)
            cap = max(1, min(cap, rows - max(0, pads - evicted)))
        return cap

    def split(self, tokens: int, layer: int, pads: int = 0) -> Budget:
        """Split a layer's cap for a context of `tokens`, the newest included, and `pads` of padding besides."""
        share = self.share_of(layer)
        cap = self.count_cap(tokens, layer, pads)
        sinks, window = count_forced(cap, self.sinks, self.window, share)
        middle = cap - window - 1
        late = int(self.share_late * (middle - sinks)) if share < 1 else 0
        return Budget(sinks, middle - late, late, window + 1)

    # --- bytes ----------------------------------------------------------------------------------------------

    def admit(self, shape: LayerShape, n_new: int, chunk: int = 0) -> None:
        """Refuse tokens that a limit cannot hold, before any layer is touched.

        Args:
            chunk: tokens that may be read at once, where `n_new` are announced and not yet there; what fits is found.
        """
        if not chunk:
            self.admit_pass(shape, n_new, 0)
            return
        self.chunk_tokens = chunk
        while True:
            try:
                self.admit_pass(shape, n_new, self.chunk_tokens)
            except CapacityError:
                # Only what is read in blocks needs less memory when it is read in smaller passes.
                if self.chunk_tokens <= LEAST_BLOCK or not self.store.streams:
                    raise
                self.chunk_tokens //= 2
            else:
                return

    def admit_pass(self, shape: LayerShape, n_new: int, chunk: int) -> None:
        """Refuse `n_new` tokens that a limit cannot hold, `chunk` of them at once where they are announced."""
        first, store = self.layers[0], self.store
        tokens = max(store.seen(first) + n_new, store.limits.reserve_tokens)
        n_rows = max(store.length(first) + n_new, store.limits.reserve_tokens)
        asked = (shape, tokens, n_rows, n_new, chunk, self.verifying)
        if not self._must_admit(asked):
            return
        at_once = min(chunk, n_new) if chunk else n_new
        rows = dict.fromkeys(self.layers, n_rows)
        besides = 0
        if self.keeper is not None:
            self.keeper.prompt_tokens = self.prompt_tokens
            rows = self.keeper.widest(tokens, n_new)
            besides = self.keeper.count_besides(shape, tokens, n_new, rows)
        if self.spiller is not None:
            beside = self.near_need(shape, tokens, (n_new, at_once)).total // tokens if store.near.parent else 0
            # An announced prompt is read in passes that fit.
            rows = self.spiller.widest(shape, tokens, 1 if chunk else at_once, beside)
        if store.kept and self.verifying:
            store.remember_all(tokens)
            # One layer more while what is remembered grows.
            n_layers = len(self.layers) + (0 if store.limits.reserve_tokens >= tokens else 1)
            besides += n_layers * tokens * shape.token_bytes
        n_rows = tokens if self.spiller is None else max(rows.values())
        need = self.near_need(shape, n_rows, (n_new, at_once), context=tokens)
        admit(store, shape, rows, need, n_new=at_once, besides=besides)
        fetched = {i: n for i, n in rows.items() if not self.reads_all(i)}
        decodes = n_new == 1 and not chunk and store.length(first) > 0
        # Where the context was announced, the limits above are those of its end.
        admit_hot(store, Pass(shape, fetched, need, store.limits.reserve_tokens >= tokens, decodes))
        self._admitted = asked

    def _must_admit(self, asked: tuple[object, ...]) -> bool:
        """Say whether a limit has a word in this pass: not where there is none, nor at step after announced step."""
        store, limits = self.store, self.store.limits
        if store.apart or self.keeper is not None or self.spiller is not None or self.holder is not None:
            return True
        return (store.far or limits.host is not None or limits.near is not None) and asked != self._admitted

    def near_need(self, shape: LayerShape, tokens: int, new: tuple[int, int], *, context: int = 0) -> NearNeed:
        """Return the near bytes at the widest moments of a pass and of the steps after it.

        A dense read has the whole layer near where that fits, else two blocks of it in turn.

        Args:
            tokens: rows at the widest.
            new: tokens of the pass, and how many of them are read at once.
            context: tokens at the widest, where some of them are no rows any more.
        """
        store = self.store
        # A coded record stands beside what it is decoded to.
        coded = store.stored_bytes(shape) * shape.batch * shape.kv_heads if store.limits.quant else 0
        token_bytes = shape.token_bytes + coded
        need = self.near_need_of(shape, tokens, new[0], tokens * token_bytes, context=context)
        store.streams = self.must_stream(need)
        if not store.streams:
            return need
        # Where host memory is near memory too, blocks are no larger than the passes.
        block = min(BLOCK_TOKENS, max(LEAST_BLOCK, new[1])) if store.near.parent is not None else BLOCK_TOKENS
        own = new[1] * shape.token_bytes if new[0] > 1 else 0
        if store.near.limit is not None:
            room = store.near.limit - self.near_need_of(shape, tokens, 0, 0, context=context).total - own
            # A prompt whose passes can still be chosen gets blocks as large as they are: time goes with both.
            least = max(LEAST_BLOCK, min(block, new[1] // 2)) if new[1] < new[0] else LEAST_BLOCK
            block = max(least, min(block, room // (2 * token_bytes)))
        store.block_tokens = block
        blocks = 2 * min(block, tokens) * token_bytes
        need = self.near_need_of(shape, tokens, new[0], blocks, context=context)
        return need._replace(prefill=need.prefill + own)

    def near_need_of(self, shape: LayerShape, tokens: int, n_new: int, dense: int, *, context: int = 0) -> NearNeed:
        """Return the near bytes where a dense read of one layer takes `dense`."""
        store, heads = self.store, shape.batch * shape.kv_heads
        stored = store.stored_bytes(shape) * heads
        budgets = [self.split(max(tokens, context), i) for i in self.layers]
        # A share of all tokens, as long as there are so many rows.
        rows = min(tokens, max(b.early + b.late + b.tail for b in budgets))
        sparse = [i for i in self.layers if not self.reads_all(i)]
        index = self.index_bytes(shape, tokens)
        some_dense = self.verifying or len(sparse) < len(self.layers)
        marks = 0 if self.spiller is None else len(self.layers) * tokens * heads * MARK_BYTES
        return NearNeed(
            # An index that grows stands beside its old self for a moment, one layer at a time.
            index=index * len(sparse) + (0 if store.limits.reserve_tokens >= tokens else index),
            window=len(self.layers) * 2 * (store.window + 1) * stored,
            prefill=dense if n_new > 1 else 0,
            # Two buffers; and what one is decoded to.
            decode=(rows * (2 * stored + (shape.token_bytes if store.limits.quant else 0)) if sparse else 0)
            + (dense if some_dense else 0),
            held=marks + (0 if self.holder is None else self.holder.count_bytes(shape, tokens)),
        )

    def must_stream(self, need: NearNeed) -> bool:
        """Say whether dense reads come block by block: records are coded or paged, or a layer is too much."""
        store = self.store
        if not store.far or store.shadow:
            return False
        if store.paged or store.limits.quant is not None:
            return True
        return store.near.limit is not None and need.total > store.near.limit

    def fit_chunk(self, n_tokens: int) -> int:
        """Return how many tokens of a prompt to read at once, at most `n_tokens`: what the limits have room for."""
        n_tokens = min(n_tokens, self.chunk_tokens) if self.chunk_tokens else n_tokens
        if self.spiller is None or not self.spiller.capacity:
            return n_tokens
        capacity, pinned = self.spiller.capacity, self.spiller.sinks + self.spiller.recent
        return min(n_tokens, max(1, min(capacity // 4, capacity - pinned)))

    # --- the books ------------------------------------------------------------------------------------------

    def count_read(self, layer: int, n_records: int | Tensor, k: Tensor) -> None:
        """Count one decode step's records of a layer."""
        held = k.shape[0] * k.shape[1] * self.store.seen(layer)
        self.account.layer(layer).add_read(n_records, held)

    def count_index(self, layer: int, n_bytes: float) -> None:
        """Count index bytes that were scored."""
        self.account.layer(layer).index_bytes += n_bytes
