"""Bytes beyond a limit: several caches of one handle, what stands beside the records, and what lives for a moment.

Bytes are counted by the tensors themselves, as they lie in the caches, never by what a ledger says.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from functools import cache as remember
from typing import Any

import torch
from random_models import make_llama
from torch.utils._python_dispatch import TorchDispatchMode

import farkv
from attacks.base import Attack, Verdict
from farkv.errors import FarKVError
from farkv.methods import Full, InfiniGen, LowBit, Oracle, Pages, SnapKV, Window

LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 2, 16, 64
TOKEN_BYTES = LAYERS * KV_HEADS * 2 * HEAD_DIM * 4
MIB = 1 << 20


@remember
def make_model(heads: int = 4, head_dim: int = HEAD_DIM) -> Any:
    """Return a small model; its caches, not it, are what is attacked."""
    return make_llama(16384, layers=LAYERS, heads=heads, kv_heads=KV_HEADS, hidden=32, head_dim=head_dim, mlp=32,
                      vocabulary=VOCABULARY)  # fmt: skip


def read(model: Any, cache: Any, n_tokens: int, rng: random.Random, chunk: int = 64) -> None:
    """Read so many random tokens more."""
    shape = (max(1, cache.engine.store.batch(0)), n_tokens)
    for part in torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))).split(
        chunk, 1
    ):
        model(input_ids=part, past_key_values=cache)


# --- what is there, by the tensors -----------------------------------------------------------------------------


def sum_storages(tensors: list[Any]) -> int:
    """Return the bytes that tensors hold, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def list_rows(store: Any) -> list[Any]:
    """Return the tensors of records and of what stands beside them."""
    found: list[Any] = []
    for rows in store.pool.values():
        found += [rows.data] if hasattr(rows, "data") else [rows.table.data, rows.open.data]
    found += [part.data for kept in store.kept.values() for part in (kept.places, kept.scores)]
    return found + [t for each in store.recently_used.values() for t in each.metadata]


def list_near(engine: Any) -> list[Any]:
    """Return the tensors of index, buffers, windows and recently used sets."""
    store = engine.store
    found = [window.data for window in store.windows.values()] + list(store.buffers._areas)
    found += [each.rows.data for each in store.recently_used.values()]
    followers = engine.selector.followers.values()
    return found + [getattr(each, "index", each).rows.data for each in followers]


def count_held(caches: list[Any], *, near_apart: bool) -> tuple[int, int]:
    """Return the near and host bytes of all caches; near memory is the host's where it has no limit of its own."""
    near = host = 0
    for cache in caches:
        store, pages = cache.engine.store, cache.engine.store.page_cache
        near += sum_storages(list_near(cache.engine))
        host += sum_storages(list_rows(store))
        if pages is not None:
            host += pages.used * pages.pages.form.n_bytes + sum_storages([pages.scratch])
    return (near, host) if near_apart else (0, near + host)


# --- several caches --------------------------------------------------------------------------------------------


class Play:
    """Caches of one handle, and what a user may do with them."""

    def __init__(self, rng: random.Random, model: Any, far: Any):
        self.rng, self.model, self.far = rng, model, far
        self.caches: list[Any] = []

    def pick(self) -> Any:
        return self.rng.choice(self.caches)

    def start(self) -> None:
        n = self.rng.randrange(40, 400)
        self.caches.append(self.far.new_cache(tokens=self.rng.choice([0, n + 8])))
        read(self.model, self.caches[-1], n, self.rng)

    def announce(self) -> None:
        """What was promised counts, though nothing of it is there yet."""
        self.caches.append(self.far.new_cache(tokens=self.rng.randrange(40, 400)))

    def go_on(self) -> None:
        cache = self.pick()
        for n in self.rng.choice([[1, 1, 1], [50]]):
            read(self.model, cache, n, self.rng)

    def copy(self) -> None:
        self.caches.append(copy.deepcopy(self.pick()))

    def widen(self) -> None:
        cache = self.pick()
        cache.batch_repeat_interleave(2)
        read(self.model, cache, 1, self.rng)
        cache.batch_select_indices(torch.tensor([0]))

    def join(self) -> None:
        one, other = self.pick(), self.pick()
        one.join(other)
        one.batch_select_indices(torch.tensor([0]))

    def reset(self) -> None:
        self.pick().reset()

    def drop(self) -> None:
        self.caches.remove(self.pick())


ACTIONS = ["start", "start", "announce", "go_on", "go_on", "copy", "copy", "widen", "join", "reset", "drop"]
METHODS = [Full(), InfiniGen(fraction=0.2), Pages(fraction=0.2, page=4), Window(fraction=0.2), Oracle(fraction=0.2)]


def share(rng: random.Random) -> Verdict:
    """Let caches come, grow, be copied, joined and dropped under one handle's limits."""
    model, method = make_model(), rng.choice([*METHODS, SnapKV(fraction=0.3)])
    host, near = int(rng.uniform(300, 900) * TOKEN_BYTES), None
    options: dict[str, Any] = rng.choice([{}, {"quant": "int8"}, {"near": True}, {"disk": True}, {"evict": "lru"}])
    options = {} if isinstance(method, SnapKV) else dict(options)
    near = int(rng.uniform(300, 900) * TOKEN_BYTES) if options.pop("near", False) else None
    refused = False
    with tempfile.TemporaryDirectory() as folder:
        if options.pop("disk", False):
            options["disk"] = folder
        with farkv.attach(model, method, host=host, near=near, **options) as far:
            play = Play(rng, model, far)
            over: list[bool] = []

            def look(*_: object) -> None:
                held = count_held(play.caches, near_apart=near is not None)
                over.append(held[0] > (near or 0) or held[1] > host)

            hooks = [block.register_forward_hook(look) for block in model.model.layers]
            try:
                for _ in range(12):
                    action = rng.choice(ACTIONS) if play.caches else "start"
                    try:
                        getattr(play, action)()
                    except FarKVError:
                        refused = True
                    look()
            except Exception:
                return "wrong"
            finally:
                for hook in hooks:
                    hook.remove()
    return "wrong" if any(over) else "refused" if refused else "right"


# --- beside the records, and for a moment ------------------------------------------------------------------------


def surround(rng: random.Random) -> Verdict:
    """Give a host limit that the records fit just so, to a method that keeps an index beside them."""
    model = make_model()
    method = rng.choice([Pages(fraction=0.3, page=2), Pages(fraction=0.3, page=8), LowBit(fraction=0.3),
                         InfiniGen(fraction=0.3, index_bits=8)])  # fmt: skip
    n_tokens, refused = rng.randrange(100, 600), False
    host = int(n_tokens * TOKEN_BYTES * rng.uniform(1.0, 2.2))
    with farkv.attach(model, method, host=host) as far:
        try:
            cache = far.new_cache(tokens=rng.choice([0, n_tokens]))
            read(model, cache, n_tokens - 4, rng)
            for _ in range(4):
                read(model, cache, 1, rng)
        except FarKVError:
            refused = True
        except Exception:
            return "wrong"
        over = count_held([cache], near_apart=False)[1] > host if not refused else False
    return "wrong" if over else "refused" if refused else "right"


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                # Of a view the storage was made, or counted, before; what is expanded takes nothing.
                self.n_bytes = max(self.n_bytes, tensor.untyped_storage().nbytes())
        return out


# A mask of Hugging Face's own as numbers, and tiles of our own; not flags for every head, query and record.
MOMENT_BYTES = 12 * MIB


def evict(rng: random.Random) -> Verdict:
    """Read on where a full pool evicts, with many heads and long passes: nothing made meanwhile may be large."""
    model, host = make_model(32, 8), rng.choice([MIB // 4, MIB // 2])
    method = rng.choice([Full(), Window(fraction=0.2), InfiniGen(fraction=0.2)])
    chunk = rng.choice([512, 640])
    with farkv.attach(model, method, host=host, evict=rng.choice(["lru", "fifo"])) as far:
        cache = far.new_cache()
        try:
            n = cache.engine.announce_prompt(4 * chunk, chunk)
            read(model, cache, host // (LAYERS * KV_HEADS * 64), rng, min(n, chunk))
            with Largest() as largest:
                read(model, cache, chunk, rng, chunk)
        except FarKVError:
            return "refused"
        except Exception:
            return "wrong"
    return "wrong" if largest.n_bytes > MOMENT_BYTES else "right"


Attempt = Callable[[random.Random], Verdict]


def without_gradients(attempt: Attempt) -> Attempt:
    """Make a try as a user generates."""
    return torch.no_grad()(attempt)


ATTACKS = {
    "share": Attack(4, "caches of one handle come, grow, are copied, joined, reset and dropped under its limits",
                    without_gradients(share), 6, 60),
    "surround": Attack(4, "records fit a host limit just so, and the method keeps an index beside them",
                       without_gradients(surround), 6, 100),
    "moment": Attack(4, "long passes of many heads through a pool that evicts: what is made for a moment",
                     without_gradients(evict), 2, 20),
}  # fmt: skip
