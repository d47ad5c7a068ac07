"""The far memory of one cache: every layer's records in the host pool, or on disk with copies of them in the pool.

In: new keys and values, and which of them may go. Out: rows by position. Knows bytes and places, not scores.
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
from farkv.store.follow import Cropped, Follower
from farkv.store.ledger import Ledger
from farkv.store.placement import Placement, counts_near, place_records
from farkv.store.records import Keep, Needs, StoreLimits
from farkv.store.sizes import LayerShape


class FarStore:
    """Records of all managed layers of one cache, wherever they are kept."""

    def __init__(self, layers: list[int], limits: StoreLimits, device: torch.device, form: Needs):
        self.limits, self.device, self.needs = limits, device, form
        self.placement = place_records(limits, device, lives_near=form.lives_near)
        # Asked several times per layer and step: plain values, not properties.
        self.is_far, self.travels = self.placement.is_far, self.placement.travels
        # Records can be read where they are: they are neither on pages of a disk nor coded.
        self.reads_in_place = self.placement is not Placement.DISK and limits.quant is None
        self.host = Ledger("host", limits.host)
        # Where near memory is no tier of its own, copies made for reading take host memory besides the pool.
        shares_host = not self.reads_in_place and not counts_near(limits, device)
        self.near = Ledger("near", limits.near, self.host if shares_host else None)
        self.index = Ledger("index", None, self.near)
        # Where records live: near memory for a method that keeps them there, the host pool for all others.
        self.home = self.near if self.placement is Placement.NEAR else self.host
        pin, reserve = device.type == "cuda" and self.is_far, limits.reserve_tokens
        place = torch.device("cpu") if pin else device
        self.order = {layer: i for i, layer in enumerate(layers)}
        self.page_cache: PageCache | None = None
        self.pool: dict[int, Rows | PagedRows] = {
            layer: Rows(self.home, device=place, pin=pin, reserve=reserve, mover=form.mover) for layer in layers
        }
        exact = form.exact_scores
        self.kept = {layer: Kept(self.home, place, exact=exact) for layer in layers} if form.evicts else {}
        self._followers: dict[int, list[Follower]] = {layer: [] for layer in layers}
        # Of one record's place and score, where records may go.
        self.metadata_bytes = 0 if not form.evicts else EXACT_ROW_BYTES if exact else ROW_BYTES
        self.evicted = dict.fromkeys(layers, 0)
        # While steps of an evicting method are verified: every record, to compare with.
        self.shadow: dict[int, Rows] = {}
        self.shapes: dict[int, LayerShape] = {}
        self.codecs: dict[int, Codec] = {}
        self.max_error = 0.0
        # Told the bytes of every read from disk.
        self.on_disk: Callable[[int], None] = lambda n_bytes: None

    # --- where and what -------------------------------------------------------------------------------------

    def follow(self, layer: int, follower: Follower) -> None:
        """Let `follower` do from now on what happens to this layer's records."""
        self._followers[layer].append(follower)

    def following(self, layer: int) -> list[Follower]:
        """Return what follows a layer's records."""
        return self._followers[layer]

    def length(self, layer: int) -> int:
        """Return the rows stored of a layer."""
        return self.pool[layer].length

    def seen(self, layer: int) -> int:
        """Return the tokens a layer was given, evicted ones included."""
        return self.pool[layer].length + self.evicted[layer]

    def find_uneven(self) -> list[int]:
        """Return layers that were given different numbers of tokens; one where all were given the same."""
        first: dict[int, int] = {}
        for layer, n in self.evicted.items():
            first.setdefault(self.pool[layer].length + n, layer)
        return list(first.values())

    def heads(self, layer: int) -> tuple[int, int]:
        """Return the number of sequences and of KV heads; zeros before anything was stored."""
        return self.pool[layer].heads

    def shape(self, layer: int) -> LayerShape:
        """Return what a layer's records are made of, with the sequences that there are now."""
        batch, heads = self.heads(layer)
        known = self.shapes[layer]
        return known._replace(batch=batch, kv_heads=heads) if heads else known

    def batch(self, layer: int) -> int:
        """Return the number of sequences."""
        return self.heads(layer)[0]

    def stored_bytes(self, shape: LayerShape) -> int:
        """Return the bytes that one record takes where it is kept."""
        if self.limits.quant is None:
            return shape.record_bytes
        return encoded_bytes(self.limits.quant, shape.k_dim, shape.v_dim)

    def reserve(self, rows: dict[int, int]) -> None:
        """Make every layer's first allocation this many rows."""
        for layer, n in rows.items():
            self.pool[layer].reserve = n
            if layer in self.kept:
                self.kept[layer].places.reserve = self.kept[layer].scores.reserve = n

    # --- pages ----------------------------------------------------------------------------------------------

    def page_form(self, shape: LayerShape, dtype: torch.dtype) -> PageForm:
        """Return the form of a page: as large as the context asks for, or as the saved text has it."""
        record_bytes = self.stored_bytes(shape)
        if self.limits.saved is not None:
            tokens = self.limits.saved.page_tokens
        else:
            context = max(self.limits.reserve_tokens, *(rows.length for rows in self.pool.values()))
            tokens = count_page_tokens(record_bytes, context)
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
        # Over pages nothing is lost by eviction: where no order is asked for, the copy that was longest unused goes.
        policy = make_policy("lru" if self.limits.evict == "refuse" else self.limits.evict)
        self.page_cache = PageCache(self.host, policy, pages)
        self.pool = {layer: PagedRows(self.host, self.page_cache) for layer in self.pool}

    def find_resident(self, layer: int) -> tuple[Bool[Tensor, "B Hkv P"], int]:
        """Return which full pages of a layer have a copy in host memory, and the tokens of a page."""
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
        """Note what a layer's records are made of."""
        self.shapes[layer] = shape
        if self.limits.quant is not None and layer not in self.codecs:
            self.codecs[layer] = Codec(self.limits.quant, shape.k_dim, shape.v_dim, dtype)

    def encode(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return new records as they are stored, in parts that lie side by side."""
        if layer not in self.shapes:
            self.describe(layer, LayerShape.of(k, v), k.dtype)
        # Records are not differentiated through: they would hold on to every pass's graph.
        k, v = k.detach(), v.detach()
        if self.limits.quant is None:
            return k, v
        codec = self.codecs[layer]
        rows = codec.encode(k, v)
        # A deliberate sync on a GPU: the receipt tells the largest error.
        self.max_error = max(self.max_error, codec.measure_error(k, v, rows))
        return (rows,)

    def decode(self, layer: int, rows: Tensor) -> Tensor:
        """Return stored rows as records of the model's own type, [..., Dk + Dv]."""
        codec = self.codecs.get(layer)
        return rows if codec is None else codec.decode(rows)

    def add(self, layer: int, k: Tensor, v: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Add the new tokens' records, `parts`, to a layer."""
        if layer in self.shadow:
            self.shadow[layer].append(k, v)
        if layer in self.kept:
            self.kept[layer].append(k, self.seen(layer))
        self.pool[layer].append(*parts)

    def pass_by(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Count new tokens whose records are stored by `put` once it is known which stay."""
        self.describe(layer, LayerShape.of(k, v), k.dtype)
        if layer in self.shadow:
            self.shadow[layer].append(k, v)
        self.evicted[layer] += k.shape[2]

    def put(self, layer: int, k: Tensor, v: Tensor, kept: Keep) -> None:
        """Store those of the passing tokens' records that stay: k and v are of all of them."""
        assert self.pool[layer].length == 0
        positions = kept.positions
        at = positions[..., None].to(k.device)
        # One part at a time, so that no more than what stays is ever copied.
        self.pool[layer].append(*(t.gather(2, at.expand(-1, -1, -1, t.shape[-1])) for t in (k, v)))
        self.kept[layer].put(positions, kept.scores, kept.gapless)
        self.evicted[layer] -= positions.shape[-1]

    def evict(self, layer: int, kept: Keep) -> None:
        """Drop every record of a layer but those at the kept positions, and free their memory."""
        before = self.length(layer)
        rows = self.pool[layer]
        assert isinstance(rows, Rows)
        for follower in self.following(layer):
            follower.keep(kept.positions)
        at = kept.positions.to(rows.device)
        rows.keep(at)
        self.kept[layer].keep(at, kept.scores.to(at.device), kept.gapless)
        self.evicted[layer] += before - self.length(layer)

    def remember_all(self, tokens: int) -> None:
        """Keep every record besides, of `tokens` at first, to verify against; counted against the same limit."""
        if self.kept and not self.shadow:
            self.shadow = {
                layer: Rows(self.home, device=rows.device, reserve=tokens) for layer, rows in self.pool.items()
            }

    # --- records out ----------------------------------------------------------------------------------------

    def locate(self, layer: int, positions: Int[Tensor, "B Hkv K"]) -> Int[Tensor, "B Hkv K"]:
        """Return the tokens, counted from the context's begin, of the rows at `positions`."""
        if not self.evicted[layer]:
            return positions
        return self.kept[layer].places.view()[..., 0].to(positions.device).gather(-1, positions).long()

    def rows(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Return records of a layer, [B, Hkv, n, Dk + Dv], in the pool's memory: in place where they are kept so."""
        stop = self.length(layer) if stop is None else stop
        return self.decode(layer, self.pool[layer].read(start, stop))

    def records(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all K and V of a layer in the pool's memory."""
        rows, k_dim = self.rows(layer), self.shapes[layer].k_dim
        return rows[..., :k_dim], rows[..., k_dim:]

    def keys(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Return keys, [B, Hkv, n, Dk], in the pool's memory: in place where they are kept so."""
        return self.rows(layer, start, stop)[..., : self.shapes[layer].k_dim]

    def all_keys(self, layer: int) -> Tensor:
        """Return the keys of every token, evicted ones too where steps are verified."""
        if layer in self.shadow:
            return self.shadow[layer].view()[..., : self.shapes[layer].k_dim]
        return self.keys(layer)

    # --- the batch ------------------------------------------------------------------------------------------

    def crop(self, layer: int, n_tokens: int) -> None:
        """Forget the newest tokens of a layer.

        Raises:
            CacheStateError: what came before them is evicted.
        """
        if layer in self.kept:
            self.kept[layer].crop(n_tokens, self.evicted[layer])
        self.pool[layer].crop(n_tokens)
        if layer in self.shadow:
            self.shadow[layer].crop(n_tokens)
        now = Cropped(n_tokens, self.length(layer), self.seen(layer))
        for follower in self.following(layer):
            follower.crop(now)

    def select(self, layer: int, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        for held in (self.pool[layer], self.kept.get(layer), self.shadow.get(layer), *self.following(layer)):
            if held is not None:
                held.select(sequences)

    def clear(self, layer: int) -> None:
        """Free a layer."""
        for held in (self.pool[layer], self.kept.get(layer), self.shadow.get(layer), *self.following(layer)):
            if held is not None:
                held.clear()
        self.evicted[layer] = 0
