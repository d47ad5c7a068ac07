"""The far memory of one cache: every layer's records in host memory, or on disk with a page cache in host memory.

In: new keys and values, and which records stay. Out: rows by position. Knows bytes and positions, does no scoring.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.far.eviction import make_policy
from farkv.store.far.kept import EXACT_ROW_BYTES, ROW_BYTES, Kept
from farkv.store.far.page_cache import PageCache
from farkv.store.far.page_file import PageFile
from farkv.store.far.page_rows import PagedRows
from farkv.store.far.pages import NumberedPages, PageForm, count_page_tokens
from farkv.store.far.quantize import Codec, encoded_bytes
from farkv.store.far.rows import Rows
from farkv.store.follow import Follower
from farkv.store.ledger import Ledger
from farkv.store.placement import Placement, counts_near, place_records
from farkv.store.records import Keep, Needs, StoreLimits
from farkv.store.shared import Shared
from farkv.store.sizes import LayerShape


class FarStore:
    """Records of all managed layers of one cache, wherever they are stored."""

    def __init__(self, layers: list[int], limits: StoreLimits, device: torch.device, needs: Needs):
        self.limits, self.device, self.needs = limits, device, needs
        self.placement = place_records(limits, device, lives_near=needs.lives_near)
        # Read several times per layer and step: plain attributes, not properties.
        self.is_far, self.travels = self.placement.is_far, self.placement.travels
        # Records can be read in place: they are neither on disk pages nor coded.
        self.reads_in_place = self.placement is not Placement.DISK and limits.quant is None
        self.shared = limits.shared or Shared()
        self.host = self.shared.open_ledger("host", limits.host)
        # Where near memory is not a tier of its own, the index, and copies made for reading, take host memory too.
        self.shares_host = not counts_near(limits, device)
        self.near = (
            Ledger("near", None, self.host) if self.shares_host else self.shared.open_ledger("near", limits.near)
        )
        self.index = Ledger("index", None, self.near)
        # The ledger of the records: near for a method that keeps them in near memory, host for all others.
        self.home = self.near if self.placement is Placement.NEAR else self.host
        pin, reserve = device.type == "cuda" and self.is_far, limits.reserve_tokens
        place = torch.device("cpu") if pin else device
        self.order = {layer: i for i, layer in enumerate(layers)}
        self.page_cache: PageCache | None = None
        self.pool: dict[int, Rows | PagedRows] = {
            layer: Rows(self.home, device=place, pin=pin, reserve=reserve, mover=needs.mover) for layer in layers
        }
        exact = needs.exact_scores
        self.kept = {layer: Kept(self.home, place, exact=exact) for layer in layers} if needs.evicts else {}
        self._followers: dict[int, list[Follower]] = {layer: [] for layer in layers}
        # Bytes of one record's place and score, where the method evicts.
        self.metadata_bytes = 0 if not needs.evicts else EXACT_ROW_BYTES if exact else ROW_BYTES
        self.evicted = dict.fromkeys(layers, 0)
        # What moves rows in place, while it does. Where that was stopped half way, nobody knows which row is whose.
        self.moving = ""
        # All records as the model made them, to compare with while steps of what evicts or codes are verified.
        self.shadow: dict[int, Rows] = {}
        self.shapes: dict[int, LayerShape] = {}
        self.codecs: dict[int, Codec] = {}
        self.max_error = 0.0
        # Called with the bytes of every read from disk.
        self.on_disk: Callable[[int], None] = lambda n_bytes: None

    # --- where and what -------------------------------------------------------------------------------------

    def follow(self, layer: int, follower: Follower) -> None:
        """Notify `follower` from now on of every change of this layer's records."""
        self._followers[layer].append(follower)

    def following(self, layer: int) -> list[Follower]:
        """Return the followers of a layer's records."""
        return self._followers[layer]

    def length(self, layer: int) -> int:
        """Return the rows stored of a layer."""
        return self.pool[layer].length

    def seen(self, layer: int) -> int:
        """Return the tokens that a layer has seen, evicted ones included."""
        return self.pool[layer].length + self.evicted[layer]

    def heads(self, layer: int) -> tuple[int, int]:
        """Return the number of sequences and of KV heads; zeros before anything is stored."""
        return self.pool[layer].heads

    def shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer's records, for the present number of sequences."""
        batch, heads = self.heads(layer)
        known = self.shapes[layer]
        return known._replace(batch=batch, kv_heads=heads) if heads else known

    def batch(self, layer: int) -> int:
        """Return the number of sequences."""
        return self.heads(layer)[0]

    def stored_bytes(self, shape: LayerShape) -> int:
        """Return the bytes of one record as it is stored, coded or not."""
        if self.limits.quant is None:
            return shape.record_bytes
        return encoded_bytes(self.limits.quant, shape.k_dim, shape.v_dim)

    def reserve(self, rows: dict[int, int]) -> None:
        """Set the rows of every layer's first allocation."""
        for layer, n in rows.items():
            self.pool[layer].reserve = n
            if layer in self.kept:
                self.kept[layer].places.reserve = self.kept[layer].scores.reserve = n

    # --- pages ----------------------------------------------------------------------------------------------

    def page_form(self, shape: LayerShape, dtype: torch.dtype, tokens: int = 0) -> PageForm:
        """Return the form of a page: of so many `tokens`; 0: sized for the context, or that of the saved text."""
        record_bytes, saved = self.stored_bytes(shape), self.limits.saved
        context = max(self.limits.reserve_tokens, *(rows.length for rows in self.pool.values()))
        tokens = tokens or (count_page_tokens(record_bytes, context) if saved is None else saved.page_tokens)
        if self.limits.quant is not None:
            return PageForm(tokens, record_bytes, torch.uint8)
        return PageForm(tokens, shape.k_dim + shape.v_dim, dtype)

    def open_pages(self, shape: LayerShape, dtype: torch.dtype) -> None:
        """Set up page copies and page tables, once the records' shape is known.

        Raises:
            StoreError: the disk's folder gives no file.
        """
        if self.placement is not Placement.DISK or self.page_cache is not None:
            return
        form = self.page_form(shape, dtype)
        saved = self.limits.saved
        file: PageFile | None = None if self.limits.disk is None else self.limits.disk.open_file(form.n_bytes)
        pages = NumberedPages(form, file, saved.reader if saved else None, saved.n_pages if saved else 0)
        pages.on_read = self.on_disk
        pages.use(self.needs.mover)
        # Evicting page copies loses nothing: without a policy from the user, the least recently used goes.
        policy = make_policy("lru" if self.limits.evict == "refuse" else self.limits.evict)
        self.page_cache = PageCache(self.host, policy, pages, self.needs.mover)
        self.pool = {layer: PagedRows(self.host, self.page_cache) for layer in self.pool}

    def find_resident(self, layer: int) -> tuple[Bool[Tensor, "B Hkv P"], int]:
        """Return which full pages of a layer have a copy in host memory, or will, and the tokens of a page."""
        rows = self.pool[layer]
        assert isinstance(rows, PagedRows)
        return rows.resident().to(self.device), rows.pages.form.tokens

    @property
    def disk_bytes(self) -> int:
        """Bytes written to disk."""
        disk = None if self.page_cache is None else self.page_cache.pages.file
        return 0 if disk is None else disk.n_pages * disk.page_bytes

    # --- records in -----------------------------------------------------------------------------------------

    def describe(self, layer: int, shape: LayerShape, dtype: torch.dtype) -> None:
        """Set the shape and dtype of a layer's records."""
        self.shapes[layer] = shape
        if self.limits.quant is not None and layer not in self.codecs:
            self.codecs[layer] = Codec(self.limits.quant, shape.k_dim, shape.v_dim, dtype)

    def encode(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return new records as they are stored, in parts that stand side by side in a row."""
        if layer not in self.shapes:
            self.describe(layer, LayerShape.of(k, v), k.dtype)
        # No gradients through records: they would keep every pass's graph in memory.
        k, v = k.detach(), v.detach()
        if self.limits.quant is None:
            return k, v
        codec = self.codecs[layer]
        rows = codec.encode(k, v)
        # A deliberate sync on a GPU: the receipt reports the largest error.
        self.max_error = max(self.max_error, codec.measure_error(k, v, rows))
        return (rows,)

    def decode(self, layer: int, rows: Tensor) -> Tensor:
        """Return stored rows as records in the model's dtype, [..., Dk + Dv]."""
        codec = self.codecs.get(layer)
        return rows if codec is None else codec.decode(rows)

    def add(self, layer: int, k: Tensor, v: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Add the new tokens' records, `parts`, to a layer."""
        if layer in self.shadow and self.shadow[layer].length == self.seen(layer):
            # Else a dense pass has brought the token, and what it made of it counts.
            self.shadow[layer].append(k, v)
        if layer in self.kept:
            self.kept[layer].append(k, self.seen(layer))
        self.pool[layer].append(*parts)

    def pass_by(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Count new tokens whose records `put` will store, once it is known which stay."""
        self.describe(layer, LayerShape.of(k, v), k.dtype)
        if layer in self.shadow:
            self.shadow[layer].append(k, v)
        self.evicted[layer] += k.shape[2]

    def put(self, layer: int, k: Tensor, v: Tensor, kept: Keep) -> None:
        """Store the records that stay of the tokens counted by `pass_by`; k and v are those of all of them."""
        assert self.pool[layer].length == 0
        positions = kept.positions
        at = positions[..., None].to(k.device)
        # One part at a time: only what stays is copied.
        self.pool[layer].append(*(t.gather(2, at.expand(-1, -1, -1, t.shape[-1])) for t in (k, v)))
        self.kept[layer].put(positions, kept.scores, kept.gapless)
        self.evicted[layer] -= positions.shape[-1]

    def evict(self, layer: int, kept: Keep) -> None:
        """Evict every record of a layer but those at the kept positions, and free the memory."""
        before = self.length(layer)
        rows = self.pool[layer]
        assert isinstance(rows, Rows)
        self.moving = f"an eviction from layer {layer}"
        for follower in self.following(layer):
            follower.keep(kept.positions)
        at = kept.positions.to(rows.device)
        rows.keep(at)
        self.kept[layer].keep(at, kept.scores.to(at.device), kept.gapless)
        self.evicted[layer] += before - self.length(layer)
        self.moving = ""

    def remember_all(self, tokens: int) -> None:
        """Also keep every record from now on as the model made it, to verify against, under the same limit.

        Args:
            tokens: rows of the first allocation.
        """
        if not self.shadow:
            self.shadow = {
                layer: Rows(self.home, device=rows.device, reserve=tokens) for layer, rows in self.pool.items()
            }

    # --- records out ----------------------------------------------------------------------------------------

    def locate(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> Int[Tensor, "B Hkv K"]:
        """Return the token numbers, counted from the start of the context, of the rows at `positions`."""
        if not self.evicted[layer]:
            return positions
        return self.kept[layer].places.view()[..., 0].to(positions.device).gather(-1, positions).long()

    def get_rows(self, layer: int) -> Tensor:
        """Return a layer's pool, [B, Hkv, capacity, W], as it is stored; only where it is not paged."""
        rows = self.pool[layer]
        assert isinstance(rows, Rows)
        return rows.get()

    def rows(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Return records of a layer, [B, Hkv, n, Dk + Dv], in the pool's memory; a view unless coded or on disk."""
        stop = self.length(layer) if stop is None else stop
        return self.decode(layer, self.pool[layer].read(start, stop))

    def records(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all K and V of a layer in the pool's memory."""
        rows, k_dim = self.rows(layer), self.shapes[layer].k_dim
        return rows[..., :k_dim], rows[..., k_dim:]

    def keys(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Return keys, [B, Hkv, n, Dk], in the pool's memory; a view unless coded or on disk."""
        return self.rows(layer, start, stop)[..., : self.shapes[layer].k_dim]

    def all_keys(self, layer: int) -> Tensor:
        """Return the keys of every token, evicted ones included where steps are verified."""
        if layer in self.shadow:
            return self.shadow[layer].view()[..., : self.shapes[layer].k_dim]
        return self.keys(layer)

    # --- the batch ------------------------------------------------------------------------------------------

    def select(self, layer: int, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        self.moving = f"a reordering of layer {layer}"
        for each in (self.pool[layer], self.kept.get(layer), self.shadow.get(layer), *self.following(layer)):
            if each is not None:
                each.select(sequences)
        self.moving = ""

    def clear(self, layer: int) -> None:
        """Free a layer."""
        for each in (self.pool[layer], self.kept.get(layer), self.shadow.get(layer), *self.following(layer)):
            if each is not None:
                each.clear()
        self.evicted[layer] = 0
        self.moving = ""
