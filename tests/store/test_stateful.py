"""Store against plain tensors: whatever is done in whatever order, what is read is what was stored.

One machine, several configurations. To add an operation, add a rule that does it to `self.store` and to
`self.model`; the invariants run after every rule.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from farkv.engine import bytes_recent
from farkv.errors import CacheStateError, CapacityError
from farkv.session.file import Saved, write_saved
from farkv.session.pages import list_pages, open_tail, take_text
from farkv.store.far import pages as pages_module
from farkv.store.far.page_file import DiskSpace
from farkv.store.far.quantize import Codec
from farkv.store.records import Fetch, Keep, Needs, SavedText, StoreLimits
from farkv.store.sizes import LayerShape
from farkv.store.tiers import Store
from farkv.store.whole import crop
from tests.engine.admitting import Gate
from tests.store.far.test_page_cache import check_copies

LAYERS, HEADS, D, DV, WINDOW = (0, 1), 2, 4, 3, 2
PAGE_TOKENS, MOST_CHOSEN, BLOCK = 8, 12, 16
ROW = (D + DV) * 4
CPU = torch.device("cpu")


class Case(NamedTuple):
    """One configuration of a store."""

    near: int | None = None
    host: int | None = None
    disk: bool = False
    quant: str | None = None
    evict: str = "refuse"
    evicts: bool = False
    pins: bool = False


CASES = {
    "plain": Case(),
    "plain, evicting": Case(evicts=True),
    "near": Case(near=1 << 20),
    "near, evicting, pinning": Case(near=1 << 20, evicts=True, pins=True),
    "near, host": Case(near=60_000, host=40_000),
    "near, small recently used set": Case(near=30_000),
    "near, small recently used set, evicting": Case(near=30_000, evicts=True),
    "near, small recently used set, disk, tight host": Case(near=30_000, disk=True, host=40_000, evict="lru"),
    "near, small recently used set, int8": Case(near=30_000, quant="int8"),
    "disk": Case(disk=True),
    "disk, tight host": Case(disk=True, host=40_000, evict="lru"),
    "disk, tight host, clock": Case(disk=True, host=32_000, evict="clock"),
    "disk, tight host, score": Case(disk=True, host=36_000, evict="score"),
    "disk, near": Case(disk=True, near=1 << 20, evict="counter"),
    "disk, near, tight host": Case(disk=True, near=60_000, host=16_000, evict="fifo"),
    "int8": Case(quant="int8"),
    "int4, near": Case(quant="int4", near=1 << 20),
    "int8, evicting": Case(quant="int8", evicts=True),
    "int8, disk": Case(quant="int8", disk=True),
    "int4, disk, tight host": Case(quant="int4", disk=True, host=40_000, evict="lru"),
}


@dataclass
class Model:
    """What a store must hold: per layer the rows, and which tokens they are, [B, Hkv, S, ...]."""

    batch: int
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)
    seen: int = 0
    # Rows at the end that nothing was taken from.
    gapless: int = 0

    def __post_init__(self) -> None:
        for layer in LAYERS:
            self.rows[layer] = torch.empty(self.batch, HEADS, 0, D + DV)
            self.tokens[layer] = torch.empty(self.batch, HEADS, 0, dtype=torch.int64)

    @property
    def length(self) -> int:
        return self.rows[0].shape[2]

    def append(self, layer: int, rows: torch.Tensor, start: int) -> None:
        tokens = torch.arange(start, start + rows.shape[2]).expand(self.batch, HEADS, -1)
        self.rows[layer] = torch.cat([self.rows[layer], rows], 2)
        self.tokens[layer] = torch.cat([self.tokens[layer], tokens], 2)

    def pick(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        return self.rows[layer].gather(2, positions[..., None].expand(-1, -1, -1, D + DV))


class StoreMachine(RuleBasedStateMachine):
    """A store and its model, side by side; sometimes a deep copy of both beside them."""

    case: Case

    @initialize(batch=st.integers(1, 2), seed=st.integers(0, 999))
    def open(self, batch: int, seed: int) -> None:
        self.case = type(self).case
        self.torch = torch.Generator().manual_seed(seed)
        self.held = (pages_module.PAGE_BYTES, pages_module.MOST_TOKENS, bytes_recent.LEAST_SLOTS)
        pages_module.PAGE_BYTES, pages_module.MOST_TOKENS = PAGE_TOKENS * ROW, PAGE_TOKENS
        bytes_recent.LEAST_SLOTS = 1
        self.folder = tempfile.TemporaryDirectory()
        self.space = DiskSpace(Path(self.folder.name), None) if self.case.disk else None
        case = self.case
        limits = StoreLimits(case.near, case.host, disk=self.space, evict=case.evict, quant=case.quant)
        self.store = Store(list(LAYERS), limits, CPU, Needs(WINDOW, evicts=case.evicts, pins=case.pins))
        self.gate = self.make_gate(self.store)
        self.model = Model(batch)
        self.twin: tuple[Store, Model, Gate] | None = None

    def teardown(self) -> None:
        if hasattr(self, "held"):
            pages_module.PAGE_BYTES, pages_module.MOST_TOKENS, bytes_recent.LEAST_SLOTS = self.held
            if self.space is not None:
                self.space.close()
            self.folder.cleanup()

    # --- what it takes --------------------------------------------------------------------------------------

    def is_filled(self) -> bool:
        return self.model.length > 0

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.torch)

    def shape(self) -> LayerShape:
        return LayerShape(self.model.batch, HEADS, D, DV, 4)

    def make_gate(self, store: Store) -> Gate:
        """Return a store's admission: of near bytes that no rule goes beyond."""
        # A choice of a test has records twice, is read beside blocks, and pins what it likes.
        n = 2 * (2 * MOST_CHOSEN + WINDOW + 1) + 2 * BLOCK + (len(LAYERS) * MOST_CHOSEN if self.case.pins else 0)
        return Gate(store, 2 * MOST_CHOSEN + WINDOW + 1, spare=n * HEADS * 2 * ROW)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what comes back of rows."""
        if self.case.quant is None:
            return rows
        codec = Codec(self.case.quant, D, DV, torch.float32)
        return codec.decode(codec.encode(rows[..., :D], rows[..., D:]))

    # --- rules ----------------------------------------------------------------------------------------------

    @rule(n=st.one_of(st.just(1), st.integers(1, 40)))
    def append(self, n: int) -> None:
        model, store, shape = self.model, self.store, self.shape()
        store.open_pages(shape, torch.float32)
        try:
            self.gate.admit(shape, n)
        except CapacityError:
            return  # Nothing was stored: the invariants say so.
        for layer in LAYERS:
            new = torch.randn(model.batch, HEADS, n, D + DV, generator=self.torch)
            store.append(layer, new[..., :D], new[..., D:])
            model.append(layer, self.encode(new), model.seen)
        model.seen += n
        model.gapless += n

    @precondition(is_filled)
    @rule(
        layer=st.sampled_from(LAYERS), n=st.integers(0, MOST_CHOSEN), late=st.integers(0, MOST_CHOSEN),
        n_newest=st.integers(1, WINDOW + 1), masks=st.tuples(st.booleans(), st.booleans()),
    )  # fmt: skip
    def read(self, layer: int, n: int, late: int, n_newest: int, masks: tuple[bool, bool]) -> None:
        model, store = self.model, self.store
        n_newest = min(n_newest, model.length)
        n_old = model.length - n_newest
        n, late = (n, late) if n_old else (0, 0)
        chosen = [self.choose(n_old, k, masked=m) for k, m in zip((n, late), masks, strict=True)]
        early = store.fetch(layer, *chosen[0], late + n_newest)
        top_up = Fetch(*chosen[1], None, None) if late else None
        out = store.read(layer, early, top_up, n_newest)
        newest = torch.arange(n_old, model.length).expand(model.batch, HEADS, -1)
        parts = [p for p, _ in chosen[: 2 if late else 1]] + [newest]
        assert torch.equal(out.positions, torch.cat(parts, -1))
        rows = torch.cat([out.k, out.v], -1)
        assert rows.isfinite().all()
        flags = [torch.ones_like(p, dtype=torch.bool) if v is None else v for p, v in chosen[: 2 if late else 1]]
        valid = torch.cat([*flags, torch.ones_like(newest, dtype=torch.bool)], -1)
        assert valid.all() if out.valid is None else torch.equal(out.valid, valid)
        assert torch.equal(rows[valid], model.pick(layer, out.positions)[valid])
        where = model.tokens[layer].gather(2, out.positions)
        assert torch.equal(store.locate(layer, out.positions), where)

    def choose(self, n_old: int, n: int, *, masked: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw positions; of a masked choice every head has its own number of valid ones, which stand first."""
        batch = self.model.batch
        positions = self.randint(max(1, n_old), batch, HEADS, n)
        if not masked:
            return positions, None
        return positions, torch.arange(n) < self.randint(n + 1, batch, HEADS, 1)

    @precondition(is_filled)
    @rule(
        layer=st.sampled_from(LAYERS),
        block=st.sampled_from([3, PAGE_TOKENS, 11, BLOCK]),
        share=st.floats(0, 1),
        stops=st.booleans(),
    )
    def read_blocks(self, layer: int, block: int, share: float, stops: bool) -> None:
        store, model = self.store, self.model
        store.block_tokens = block
        stop, at = round(share * model.length), 0
        if not store.is_far:
            return
        for start, k, v in store.read_blocks(layer, stop):
            assert start == at
            assert 0 < k.shape[2] <= block
            assert torch.equal(torch.cat([k, v], -1), model.rows[layer][:, :, start : start + k.shape[2]])
            at += k.shape[2]
            if stops:
                return
        assert at == stop

    @precondition(is_filled)
    @rule(layer=st.sampled_from(LAYERS))
    def read_all(self, layer: int) -> None:
        if self.store.near.limit is not None or self.store.reads_in_place:
            with self.store.read_all(layer) as (k, v):
                assert torch.equal(torch.cat([k, v], -1), self.model.rows[layer])
        k, v = self.store.records(layer)
        assert torch.equal(torch.cat([k, v], -1), self.model.rows[layer])

    @precondition(lambda self: self.case.evicts and self.model.length > WINDOW + 1)
    @rule(share=st.floats(0, 1), recent=st.integers(WINDOW + 1, 8))
    def evict(self, share: float, recent: int) -> None:
        model = self.model
        length = model.length
        recent = min(recent, length)
        n_old = length - recent
        n = int(share * n_old)
        for layer in LAYERS:
            noise = torch.rand(model.batch, HEADS, n_old, generator=self.torch)
            old = noise.argsort(-1)[..., :n].sort(-1).values
            new = torch.arange(n_old, length).expand(model.batch, HEADS, -1)
            positions = torch.cat([old, new], -1)
            self.store.evict(layer, Keep(positions, torch.rand(positions.shape), min(recent, model.gapless)))
            model.rows[layer] = model.pick(layer, positions)
            model.tokens[layer] = model.tokens[layer].gather(2, positions)
        model.gapless = min(recent, model.gapless)

    @precondition(is_filled)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        model = self.model
        left = model.length - round(share * model.length)
        n = model.length - left
        if model.seen > model.length and n > model.gapless:
            for layer in LAYERS:
                with pytest.raises(CacheStateError):
                    crop(self.store, layer, n)
            return
        for layer in LAYERS:
            crop(self.store, layer, n)
            model.rows[layer], model.tokens[layer] = model.rows[layer][:, :, :left], model.tokens[layer][:, :, :left]
        model.seen -= n
        model.gapless = max(0, model.gapless - n)

    @precondition(is_filled)
    @rule(order=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def select(self, order: list[int]) -> None:
        model = self.model
        order = [i % model.batch for i in order]
        if self.case.host is not None and len(order) > model.batch:
            return  # More sequences may find no room: that is not admitted beforehand.
        for layer in LAYERS:
            self.store.select(layer, torch.tensor(order))
            model.rows[layer], model.tokens[layer] = model.rows[layer][order], model.tokens[layer][order]
        model.batch = len(order)

    @precondition(is_filled)
    @rule(batch=st.integers(1, 3))
    def clear(self, batch: int) -> None:
        for layer in LAYERS:
            self.store.clear(layer)
        assert self.store.host.used == self.store.near.used == 0
        self.model = Model(batch)
        self.store.open_pages(self.shape(), torch.float32)

    def is_one_text(self) -> bool:
        whole = self.model.length == self.model.seen and not (self.case.evicts or self.case.pins)
        return self.is_filled() and self.model.batch == 1 and whole

    @precondition(is_one_text)
    @rule()
    def save_and_load(self) -> None:
        """Go on from a file: what is asked afterwards is read from there."""
        old, length = self.store, self.model.length
        form = old.page_form(self.shape(), torch.float32)
        n_pages = length // form.tokens
        path = Path(self.folder.name) / "text.farkv"
        tails = {str(layer): open_tail(old, layer, form) for layer in LAYERS}
        write_saved(path, {}, tails, list_pages(old, form), n_pages * HEADS * len(LAYERS), form.n_bytes)
        saved = Saved.open(path)
        text = SavedText(saved.reader, saved.n_pages, form.tokens)
        new = Store(list(LAYERS), old.limits._replace(saved=text, reserve_tokens=length + 1), CPU, Needs(WINDOW))
        new.open_pages(self.shape(), torch.float32)
        gate = self.make_gate(new)
        try:
            gate.admit(self.shape(), 1)
        except CapacityError:
            return  # Open pages, index and buffers are counted together where a text is on disk.
        for layer in LAYERS:
            new.describe(layer, self.shape(), torch.float32)
        take_text(new, n_pages, {layer: saved.tensor(str(layer)) for layer in LAYERS})
        # A read that is still under way holds the file that it reads.
        old.link.drain()
        self.store, self.gate = new, gate

    @rule()
    def copy(self) -> None:
        if self.twin is not None:
            self.twin[0].link.drain()
        self.twin = (self.store, self.model, self.gate)
        self.store, self.model, self.gate = copy.deepcopy(self.twin)

    @precondition(lambda self: self.twin is not None)
    @rule()
    def swap(self) -> None:
        assert self.twin is not None
        now = self.store, self.model, self.gate
        (self.store, self.model, self.gate), self.twin = self.twin, now

    @precondition(lambda self: self.store.page_cache is not None)
    @rule(room=st.integers(0, 20), piece=st.integers(1, 8))
    def resize(self, room: int, piece: int) -> None:
        pages = self.store.page_cache
        assert pages is not None
        # Under a limit there is never more room than was admitted.
        pages.resize(min(room, pages.room) if self.case.host else room, min(piece, pages.piece))

    @precondition(lambda self: self.case.pins and self.model.length > 0)
    @rule(layer=st.sampled_from(LAYERS), n=st.integers(1, MOST_CHOSEN))
    def pin(self, layer: int, n: int) -> None:
        n = min(n, self.model.length)
        noise = torch.rand(self.model.batch, HEADS, self.model.length, generator=self.torch)
        self.store.pin(layer, noise.argsort(-1)[..., :n])

    # --- what must always hold ------------------------------------------------------------------------------

    @invariant()
    def lengths_agree(self) -> None:
        for layer in LAYERS:
            assert self.store.length(layer) == self.model.length
            assert self.store.seen(layer) == self.model.seen

    @invariant()
    def ledgers_are_right(self) -> None:
        for store in [self.store, *([self.twin[0]] if self.twin else [])]:
            near = count_near(store)
            assert store.near.used == near
            assert store.host.used == count_host(store) + (near if store.shares_host else 0)
            for ledger in (store.near, store.host):
                assert ledger.limit is None or ledger.peak <= ledger.limit

    @invariant()
    def copies_are_right(self) -> None:
        stores = [self.store, *([self.twin[0]] if self.twin else [])]
        for store in stores:
            check_recently_used(store)
            if store.page_cache is not None:
                check_copies(store.page_cache)
        if self.space is not None:
            opened = [s.page_cache.pages.file for s in stores if s.page_cache is not None]
            files = {id(file): file for file in opened}
            assert self.space.ledger.used == sum(f.n_pages * f.page_bytes for f in files.values() if f is not None)


def count_bytes(tensors: list[Any]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def count_near(store: Store) -> int:
    """Return the bytes of everything near, by the tensors themselves."""
    held = [h.rows.data for h in (*store.pinned.values(), *store.recently_used.values())]
    return count_bytes([t.data for t in store.windows.values()] + list(store.buffers._areas) + held)


def count_host(store: Store) -> int:
    """Return the bytes of the pool and its metadata, by the tensors themselves."""
    pool: list[Any] = [part.data for rows in store.pool.values() for part in parts_of(rows)]
    pool += [rows.data for kept in store.kept.values() for rows in (kept.places, kept.scores)]
    pool += [held.slots.data for held in store.pinned.values()]
    pool += [table for each in store.recently_used.values() for table in each.metadata]
    if store.page_cache is None:
        return count_bytes(pool)
    return count_bytes([*pool, store.page_cache.scratch]) + store.page_cache.used * store.page_cache.pages.form.n_bytes


def check_recently_used(store: Store) -> None:
    """Every copy in a recently used set that can be found is its record's."""
    for layer, recent in store.recently_used.items():
        head, slot = (recent.owner >= 0).nonzero(as_tuple=True)
        at = recent.owner[head, slot].long()
        assert (at < store.length(layer)).all()
        if len(at):
            stored = store.pool[layer].read(0, store.length(layer)).flatten(0, 1)
            assert torch.equal(recent.rows.view().flatten(0, 1)[head, slot], stored[head, at])


def parts_of(rows: Any) -> list[Any]:
    return [rows] if hasattr(rows, "data") else [rows.table, rows.open]


for _name, _case in CASES.items():
    _machine = type(f"Machine_{_name}", (StoreMachine,), {"case": _case})
    # A failure shows its steps; making them fewer takes minutes. Add Phase.shrink to look for the cause.
    _machine.TestCase.settings = settings(
        max_examples=10,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    globals()["Test_" + _name.replace(", ", "_").replace(" ", "_")] = _machine.TestCase
