"""Puts an engine together: a method, or an evictor beside it, and what a user set -> one cache's engine."""

from __future__ import annotations

from typing import NamedTuple

from farkv.engine.admit import Admission
from farkv.engine.attend import Attention
from farkv.engine.bank import Bank
from farkv.engine.budget import Budgets
from farkv.engine.choose import Chooser
from farkv.engine.evict import Eviction
from farkv.engine.fast_path import FastPath
from farkv.engine.mode import Mode
from farkv.engine.padding import Padding
from farkv.engine.parts import Parts
from farkv.engine.pool_policy import PoolPolicy
from farkv.engine.records import LayerRecords
from farkv.engine.setup import Setup
from farkv.engine.shares import Shares
from farkv.engine.step import Engine
from farkv.methods.base import Evictor, Place, Selector
from farkv.methods.full import Full
from farkv.methods.table import Method, Row, find_row
from farkv.store.records import Needs, StoreLimits
from farkv.store.tiers import Store


class Roles(NamedTuple):
    """The methods of one engine: what selects, and what evicts; None where neither does so.

    keeps: layers keep shares; without it the evictor's scores only say what is pinned near.
    """

    selects: Method | None
    evicts: Method | None = None
    keeps: bool = False


def make_engine(roles: Roles, setup: Setup) -> Engine:
    """Set up the engine of one cache.

    Raises:
        ConfigError: the method cannot work in this place.
    """
    setting, levers = setup.setting, setup.setting.levers
    # What keeps only what it reads is read whole, and lives near.
    lives_near = roles.selects is None
    config: Method = Full() if roles.selects is None else roles.selects
    row, evicting = find_row(config), None if roles.evicts is None else find_row(roles.evicts)
    store = make_store(setup, row, evicting, roles, lives_near=lives_near)
    place = Place(
        setup.layers,
        setup.device,
        store.index,
        reserve_tokens=store.limits.reserve_tokens,
        travels=store.travels,
        dense_tokens=setting.kernels.dense_tokens,
        profile=setting.profile,
        on_fallback=setup.account.add_fallback,
        indexer=setting.indexer,
    )
    padding, mode, latents = Padding(), Mode(), setting.latents or {}
    records = {layer: LayerRecords(store, padding, mode, layer, latents.get(layer)) for layer in setup.layers}
    policy = None
    assert row.selector is not None
    selector = row.selector(config, place)
    if spills(store.limits):
        policy = PoolPolicy(store, selector.cap.sinks, store.window)
    evictor = None
    if roles.evicts is not None and evicting is not None and evicting.evictor is not None:
        evictor = evicting.evictor(roles.evicts, place)
    shares = None
    if evictor is not None and roles.keeps:
        shares = Shares(evictor.rule, levers.kept, store, passes_by=lives_near)
    follow(store, padding, selector, evictor)
    budgets = Budgets(selector.cap, levers.fetch, store, padding)
    fast = FastPath(setting.kernels, store, padding, setup.account)
    bank = Bank(budgets.burst, [i for i in setup.layers if not selector.reads_all(i)])
    for layer in list(store.order)[:1]:
        store.follow(layer, bank)
    held = {"shares": shares, "pins": levers.near, "policy": policy}
    repeats = {"n_groups": setting.n_groups, "expands": bool(latents)}
    parts = Parts(
        store,
        padding,
        records,
        selector,
        evictor,
        budgets,
        Chooser(selector, budgets, fast, setup.account, bank),
        Attention(budgets, fast, setup.account, mode, policy),
        Eviction(records, selector, budgets, evictor=evictor, **held),
        Admission(selector, budgets, mode, verifies=setup.verifies, **repeats, **held),
        mode,
        bank,
    )
    return Engine(setup, parts)


def make_store(setup: Setup, row: Row, evicting: Row | None, roles: Roles, *, lives_near: bool) -> Store:
    """Set up a cache's store, as the methods need it."""
    assert row.selector is not None
    window = 0 if roles.selects is None else row.selector.find_window(roles.selects)
    exact = evicting is not None and evicting.evictor is not None and evicting.evictor.sums_scores
    needs = Needs(
        window=window,
        lives_near=lives_near,
        evicts=roles.keeps or spills(setup.setting.limits),
        pins=setup.setting.levers.near is not None,
        mover=setup.setting.kernels.fast,
        worker=setup.setting.worker,
        exact_scores=exact,
    )
    store = Store(setup.layers, setup.setting.limits, setup.device, needs)
    # The account's, not the engine's: a store that knew its engine would keep both alive until the collector comes.
    store.listen(setup.account.count_fetch, setup.account.count_disk)
    return store


def spills(limits: StoreLimits) -> bool:
    """Say whether a full pool evicts: over a disk, or a saved text, only copies go."""
    return limits.evict != "refuse" and limits.disk is None and limits.saved is None and limits.host is not None


def follow(store: Store, padding: Padding, selector: Selector, evictor: Evictor | None) -> None:
    """Let what is kept beside the records do what happens to them."""
    for layer in list(store.order)[:1]:
        store.follow(layer, padding)
    for part in (selector, evictor):
        for layer, follower in () if part is None else part.followers.items():
            store.follow(layer, follower)
