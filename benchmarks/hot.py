"""How much does a hot set spare the link? Its hit rate by size, real and from the trace of what was chosen.

    python benchmarks/hot.py

In: the demo model, held-out standard-library code of 4 K tokens, 64 tokens generated greedily. Out: a JSON line per
text, method and size. A run is real: the near limit is what decoding needs and a share of the KV besides, which becomes
the hot set; its answer must equal that of a run under the same limit without one. From the choices other rules of
replacement are simulated at the same sizes; there too what a fetch reads is never replaced by it. Every set begins
empty: the first fetch of each layer is all misses. The link is memory here: bytes are what counts, not times.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from quality import mean, percent, read_numbers, read_rows

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.hf.ask import Listener, feed, prefill
from farkv.hf.attach import attach
from farkv.hf.load import load_model, quiet_libraries
from farkv.methods import InfiniGen, Method, Random
from farkv.store import spare
from farkv.store.sizes import LayerShape

METHODS: dict[str, Method] = {"infinigen 0.10": InfiniGen(fraction=0.10), "random 0.10": Random(fraction=0.10)}
CHUNK_TOKENS = 128

# Of every layer and KV head: the records of one fetch after the other.
Trace = dict[tuple[int, int], list[np.ndarray]]


class Run(NamedTuple):
    """One real run."""

    row: dict[str, Any]
    trace: Trace
    tokens: list[int]


def record_fetches(store: Any, trace: Trace) -> None:
    """Note what every fetch of a decode step asks for."""
    fetch = store.link.fetch

    def record(rows: Any, positions: Any, valid: Any, *others: Any) -> Any:
        layer = next(i for i, pool in store.pool.items() if pool is rows)
        for head in range(positions.shape[1]):
            chosen = positions[0, head] if valid is None else positions[0, head][valid[0, head]]
            trace.setdefault((layer, head), []).append(chosen.numpy().copy())
        return fetch(rows, positions, valid, *others)

    store.link.fetch = record


def find_limit(model: Any, method: Method, tokens: int, share: float) -> int:
    """Return the near bytes that decoding needs, and a share of the KV besides."""
    config = model.config
    shape = LayerShape(1, config.num_key_value_heads, config.head_dim, config.head_dim, 4)
    with attach(model, method, near="64GiB") as far:
        recipe: Any = far.new_cache(tokens=tokens).recipe
        need = recipe.near_need_of(shape, tokens, 0, 0).total
    return need + 2 + len(recipe.layers) * shape.token_bytes * int(share * tokens)


@torch.no_grad()
def run_real(model: Any, method: Method, ids: list[int], n_new: int, share: float) -> Run:
    """Read a text and generate under one near limit."""
    n_tokens, trace, tokens = len(ids) + n_new, {}, []
    limit = find_limit(model, method, n_tokens, share)
    with attach(model, method, near=limit) as far:
        cache: Any = far.new_cache(tokens=n_tokens, chunk_tokens=CHUNK_TOKENS)
        # Under a tight limit passes are smaller.
        prefill(far, cache, ids[:-1], cache.recipe.chunk_tokens, Listener())
        store = cache.recipe.store
        record_fetches(store, trace)
        token = ids[-1]
        for _ in range(n_new):
            logits = feed(far, cache, [token])
            assert logits is not None
            token = int(logits.argmax(-1))
            tokens.append(token)
        receipt = far.receipt(cache)
    assert receipt.kv_bytes.near_peak <= limit
    asked = sum(len(chosen) for fetches in trace.values() for chosen in fetches)
    record_bytes = next(iter(cache.account.record_bytes.values()))
    bytes_per_token = receipt.fetched_bytes_per_token
    row = dict(near_limit=limit, near_peak=receipt.kv_bytes.near_peak, resident=receipt.resident_fraction,
               slots=max((hot.size.slots for hot in store.recently_used.values()), default=0), bytes_per_token=bytes_per_token,
               asked_bytes_per_token=asked * record_bytes / n_new, kv_bytes=receipt.kv_bytes.total,
               hits=1 - bytes_per_token * n_new / (asked * record_bytes), decode_s=receipt.time.decode_s)  # fmt: skip
    return Run(row, trace, tokens)


# --- rules, simulated ---------------------------------------------------------------------------------------


class Books(NamedTuple):
    """Of every record: whether it is hot, and since it is so, when it came, was read last, and how often."""

    hot: np.ndarray
    came: np.ndarray
    read: np.ndarray
    count: np.ndarray


KEYS: dict[str, Callable[[Books, np.ndarray], np.ndarray]] = {
    "lru": lambda books, at: books.read[at],
    "fifo": lambda books, at: books.came[at],
    # Of those read equally often the longest unread.
    "counter": lambda books, at: books.count[at] * 10_000 + books.read[at],
}


def simulate(fetches: list[np.ndarray], slots: int, rule: str) -> int:
    """Return the hits of one KV head's hot set."""
    n_records = 1 + max(int(chosen.max(initial=0)) for chosen in fetches)
    books = Books(np.zeros(n_records, bool), *(np.zeros(n_records, np.int64) for _ in range(3)))
    ring: deque[int] = deque()
    marked = np.zeros(n_records, bool)
    n_hits = n_hot = 0
    for now, chosen in enumerate(fetches, start=1):
        here, missing = chosen[books.hot[chosen]], chosen[~books.hot[chosen]]
        n_hits += len(here)
        books.read[chosen], marked[here] = now, True
        books.count[here] += 1
        old = np.flatnonzero(books.hot & (books.read != now))
        n_gone = min(len(old), max(0, n_hot + len(missing) - slots))
        if rule == "clock":
            gone = turn_clock(ring, marked, books.read != now, n_gone)
        else:
            gone = old[np.argsort(KEYS[rule](books, old), kind="stable")[:n_gone]]
        books.hot[gone] = False
        enter = missing[: slots - n_hot + n_gone]
        n_hot += len(enter) - n_gone
        ring.extend(enter.tolist())
        books.hot[enter], books.came[enter], books.count[enter], marked[enter] = True, now, 1, False
    return n_hits


def turn_clock(ring: deque[int], marked: np.ndarray, is_old: np.ndarray, n: int) -> np.ndarray:
    """Take the first `n` records in a round that were not read since the last one, nor now."""
    gone: list[int] = []
    while len(gone) < n:
        record = ring.popleft()
        if is_old[record] and not marked[record]:
            gone.append(record)
        else:
            marked[record] = marked[record] and not is_old[record]
            ring.append(record)
    return np.array(gone, np.int64)


def simulate_all(trace: Trace, slots: int, rule: str) -> float:
    """Return the hit rate over all layers and KV heads."""
    asked = sum(len(chosen) for fetches in trace.values() for chosen in fetches)
    return sum(simulate(fetches, slots, rule) for fetches in trace.values()) / asked if slots else 0.0


# --- all of it ----------------------------------------------------------------------------------------------


def run_without(model: Any, method: Method, ids: list[int], n_new: int, share: float) -> Run:
    """Run under the same limit, without a hot set."""
    least, spare.LEAST_SLOTS = spare.LEAST_SLOTS, sys.maxsize
    try:
        return run_real(model, method, ids, n_new, share)
    finally:
        spare.LEAST_SLOTS = least


def run_text(model: Any, name: str, ids: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one text at every size."""
    rows = []
    for share in args.shares:
        without = run_without(model, METHODS[name], ids, args.new, share / 100)
        run = run_real(model, METHODS[name], ids, args.new, share / 100) if share else without
        assert run.tokens == without.tokens
        slots = int(share / 100 * (len(ids) + args.new))
        rules = {rule: simulate_all(without.trace, slots, rule) for rule in (*KEYS, "clock")}
        of_run = dict(method=name, tokens=len(ids), new=args.new, share=share, decode_s_without=without.row["decode_s"])
        rows.append(of_run | run.row | rules)
    return rows


def format_table(path: Path) -> str:
    """Return one Markdown row per method and size."""
    rows = read_rows(path)
    head = [
        "choice",
        "hot set, of the context",
        "KiB per token over the link",
        "hits",
        "simulated: LRU",
        "FIFO",
        "clock",
    ]
    lines = [f"| {' | '.join([*head, 'counter', 'ms per token', 'without'])} |", "|---" * (len(head) + 3) + "|"]
    for name, share in dict.fromkeys((r["method"], r["share"]) for r in rows):
        mine = [r for r in rows if (r["method"], r["share"]) == (name, share)]
        cells = [name, f"{share} %", f"{mean(r['bytes_per_token'] for r in mine) / 1024:.0f}"]
        cells += [percent(r[key] for r in mine) for key in ("hits", "lru", "fifo", "clock", "counter")]
        cells += [f"{1000 * mean(r[key] / r['new'] for r in mine):.0f}" for key in ("decode_s", "decode_s_without")]
        lines.append(f"| {' | '.join(cells)} |")
    n = len({r["text"] for r in rows})
    return "\n".join(
        [
            *lines,
            "",
            f"{n} texts of {rows[0]['tokens']} tokens, {rows[0]['new']} generated after each: the same without.",
        ]
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/hot.jsonl")
    parser.add_argument("--shares", default="0,5,10,20,30", type=read_numbers, help="per cent of the context; first 0")
    parser.add_argument("--texts", default=3, type=int)
    parser.add_argument("--tokens", default=4096, type=int)
    parser.add_argument("--new", default=64, type=int, help="tokens generated")
    parser.add_argument("--threads", default=1, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    model, tokenizer = load_model("demo", device="cpu")
    sources, started, out = read_sources(STDLIB, held_out=True), time.time(), Path(args.out)
    out.write_text("")
    for text in range(args.texts):
        lines = draw_filler(sources, args.tokens + 100, 16_000_000 + text, lambda s: len(tokenizer(s)["input_ids"]))
        ids = tokenizer("".join(lines))["input_ids"][: args.tokens]
        for name in METHODS:
            with out.open("a") as file:
                file.writelines(json.dumps({"text": text} | row) + "\n" for row in run_text(model, name, ids, args))
            sys.stderr.write(f"{text}, {name}: {time.time() - started:.0f} s\n")
    print(format_table(out))


if __name__ == "__main__":
    main()
