"""A text that was read once, as pages in a file: which page is where, out of any store and into a new one.

In: a store that holds a whole text, or a saved file. Out: its pages in the file's order, or a store that reads them
when they are asked for, or holds them all. Full pages are in the file's page area, the records of the last, open page
beside it.

The file has layer after layer; in a layer runs of up to RUN_PAGES pages per KV head; in a run head after head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from farkv._axes import Int, Tensor
from farkv.store.far.page_reader import PageReader
from farkv.store.far.page_rows import PagedRows
from farkv.store.far.pages import PageForm
from farkv.store.far.pool import FarStore
from farkv.store.memory import PageMover

# Consecutive pages of one head that lie together: a megabyte on real shapes.
RUN_PAGES = 16


def number_pages(n_layers: int, heads: int, n_pages: int) -> Int[Tensor, "L Hkv P"]:
    """Return the place in the file of every page of every layer and KV head."""
    page = torch.arange(n_pages)
    run = page // RUN_PAGES * RUN_PAGES
    length = (n_pages - run).clamp_max(RUN_PAGES)
    head = torch.arange(heads)[:, None]
    layer = torch.arange(n_layers)[:, None, None] * heads * n_pages
    return layer + heads * run + head * length + (page - run)


def list_pages(store: FarStore, form: PageForm) -> Iterator[Tensor]:
    """Give a text's full pages in the order of the file, a run at a time: [Hkv * n, tokens, W] in host memory.

    Cost: one run of one layer in memory at a time; every full page read once.
    """
    step = RUN_PAGES * form.tokens
    for layer, rows in store.pool.items():
        end = store.length(layer) // form.tokens * form.tokens
        for start in range(0, end, step):
            block = rows.read(start, min(start + step, end))
            # A deliberate copy to the host.
            yield block.to("cpu").reshape(-1, form.tokens, form.width).contiguous()


def open_tail(store: FarStore, layer: int, form: PageForm) -> Tensor:
    """Return the stored rows behind a layer's last full page, [1, Hkv, n, W]."""
    n = store.length(layer)
    return store.pool[layer].read(n // form.tokens * form.tokens, n)


def take_text(store: FarStore, n_pages: int, tails: dict[int, Tensor]) -> None:
    """Let an empty store hold a saved text: page tables are filled, no page is read.

    Args:
        n_pages: full pages of every layer and KV head.
        tails: the stored rows behind them.
    """
    assert store.page_cache is not None
    heads = next(iter(tails.values())).shape[1]
    numbers = number_pages(len(store.pool), heads, n_pages)
    tokens = store.page_cache.pages.form.tokens
    for (layer, rows), table in zip(store.pool.items(), numbers, strict=True):
        assert isinstance(rows, PagedRows)
        rows.take_pages(table[None, :, :, None])
        tail = tails[layer]
        if tail.shape[2]:
            rows.append(tail)
        assert rows.length == n_pages * tokens + tail.shape[2]


def read_text(store: FarStore, n_pages: int, tails: dict[int, Tensor], *, form: PageForm, reader: PageReader) -> None:
    """Let an empty store that keeps records in memory hold a saved text; as `take_text`.

    Args:
        form: of the file's pages.
        reader: reads and verifies them.

    Cost: every page read once, a run at a time; one copy of it.

    Raises:
        StoreError: a page is damaged or cannot be read.
    """
    heads = next(iter(tails.values())).shape[1]
    numbers = number_pages(len(store.pool), heads, n_pages)
    reader.mover = store.needs.mover if isinstance(store.needs.mover, PageMover) else None
    for (layer, rows), table in zip(store.pool.items(), numbers, strict=True):
        for run in table.split(RUN_PAGES, 1) if n_pages else ():
            block = torch.empty(1, heads, run.shape[1] * form.tokens, form.width, dtype=form.dtype)
            reader.read(run.reshape(-1), block)
            rows.append(block)
        if tails[layer].shape[2]:
            rows.append(tails[layer])
