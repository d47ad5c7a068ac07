"""How much does a recently used set spare the link? Its hit rate by size, real and from the trace of what was chosen.

    python benchmarks/hot.py

In: the demo model, held-out standard-library code of 4 K tokens, 64 tokens generated greedily. Out: a JSON line per
text, method and size. A run is real: the near limit is what decoding needs and a share of the KV besides, which becomes
the recently used set; its answer must equal that of a run under the same limit without one. From the choices other
rules of replacement are simulated at the same sizes; there too what a fetch reads is never replaced by it. Every set
begins empty: the first fetch of each layer is all misses. The link is memory here: bytes are what counts, not times.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from demo_texts import Demo, find_near_need, step
from rows import RESULTS, Row, Rows, format_rows, group, mean, percent, read_rows
from runs import Recorder, make_parser, read_numbers

from farkv import InfiniGen, attach
from farkv.engine import bytes_recent
from farkv.hf.ask import Listener, prefill
from farkv.methods import Method, Random

METHODS: dict[str, Method] = {"infinigen 0.10": InfiniGen(fraction=0.10), "random 0.10": Random(fraction=0.10)}
CHUNK_TOKENS = 128

# Of every layer and KV head: the records of one fetch after the other.
Trace = dict[tuple[int, int], list[np.ndarray]]


class Run(NamedTuple):
    """One real run."""

    row: Row
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


def run_real(model: Any, method: Method, ids: list[int], n_new: int, share: float) -> Run:
    """Read a text and generate under one near limit."""
    n_tokens, trace, tokens = len(ids) + n_new, {}, [ids[-1]]
    need, shape = find_near_need(model, method, n_tokens)
    limit = need + 2 + model.config.num_hidden_layers * shape.token_bytes * int(share * n_tokens)
    with attach(model, method, near=limit) as far:
        cache: Any = far.new_cache(tokens=n_tokens, chunk_tokens=CHUNK_TOKENS)
        # Under a tight limit passes are smaller.
        prefill(far, cache, ids[:-1], cache.engine.chunk_tokens, Listener())
        store = cache.engine.store
        record_fetches(store, trace)
        for _ in range(n_new):
            tokens.append(int(step(far, cache, tokens[-1:]).argmax(-1)))
        receipt = far.receipt(cache)
    assert receipt.kv_bytes.near_peak <= limit
    asked = count_asked(trace) * next(iter(cache.account.record_bytes.values()))
    bytes_per_token = receipt.fetched_bytes_per_token
    row = dict(near_limit=limit, near_peak=receipt.kv_bytes.near_peak, resident=receipt.resident_fraction,
               slots=max((each.size.slots for each in store.recently_used.values()), default=0),
               bytes_per_token=bytes_per_token,
               asked_bytes_per_token=asked / n_new, kv_bytes=receipt.kv_bytes.total,
               hits=1 - bytes_per_token * n_new / asked, decode_s=receipt.time.decode_s)  # fmt: skip
    return Run(row, trace, tokens)


def run_without(model: Any, method: Method, ids: list[int], n_new: int, share: float) -> Run:
    """Run under the same limit, without a recently used set."""
    least, bytes_recent.LEAST_SLOTS = bytes_recent.LEAST_SLOTS, sys.maxsize
    try:
        return run_real(model, method, ids, n_new, share)
    finally:
        bytes_recent.LEAST_SLOTS = least


def count_asked(trace: Trace) -> int:
    """Return the records that all fetches asked for."""
    return sum(len(chosen) for fetches in trace.values() for chosen in fetches)


@dataclass
class Entry:
    """A record of a simulated set: when it came, when it was read last, how often, and the clock's mark."""

    came: int
    read: int
    count: int = 1
    marked: bool = False


KEYS: dict[str, Callable[[Entry], Any]] = {
    "lru": lambda entry: entry.read,
    "fifo": lambda entry: entry.came,
    # Of those read equally often the longest unread.
    "counter": lambda entry: (entry.count, entry.read),
}


def simulate(fetches: list[np.ndarray], slots: int, rule: str) -> int:
    """Return the hits of one KV head's recently used set."""
    hot: dict[int, Entry] = {}
    ring: deque[int] = deque()
    n_hits = 0
    for now, chosen in enumerate(fetches, start=1):
        here = [record for record in chosen.tolist() if record in hot]
        missing = [record for record in chosen.tolist() if record not in hot]
        n_hits += len(here)
        for entry in map(hot.__getitem__, here):
            entry.read, entry.count, entry.marked = now, entry.count + 1, True
        old = [record for record in hot if hot[record].read != now]
        n_gone = min(len(old), max(0, len(hot) + len(missing) - slots))
        if rule == "clock":
            gone = turn_clock(ring, hot, now, n_gone)
        else:
            gone = sorted(old, key=lambda record: (KEYS[rule](hot[record]), record))[:n_gone]
        for record in gone:
            del hot[record]
        enter = missing[: slots - len(hot)]
        ring.extend(enter)
        hot |= {record: Entry(now, now) for record in enter}
    return n_hits


def turn_clock(ring: deque[int], hot: dict[int, Entry], now: int, n: int) -> list[int]:
    """Take the first `n` records in a round that were not read since the last one, nor now."""
    gone: list[int] = []
    while len(gone) < n:
        record, entry = ring[0], hot[ring.popleft()]
        if entry.read != now and not entry.marked:
            gone.append(record)
        else:
            entry.marked = entry.marked and entry.read == now
            ring.append(record)
    return gone


def simulate_all(trace: Trace, slots: int, rule: str) -> float:
    """Return the hit rate over all layers and KV heads."""
    hits = sum(simulate(fetches, slots, rule) for fetches in trace.values()) if slots else 0
    return hits / count_asked(trace)


def run_text(model: Any, name: str, ids: list[int], args: argparse.Namespace) -> Rows:
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


def format_table(path: Path = RESULTS / "hot.jsonl") -> str:
    """Return one Markdown row per method and size."""
    rows, lines = read_rows(path), []
    for (name, share), mine in group(rows, "method", "share").items():
        cells = [name, f"{share} %", f"{mean(r['bytes_per_token'] for r in mine) / 1024:.0f}"]
        cells += [percent(r[key] for r in mine) for key in ("hits", "lru", "fifo", "clock", "counter")]
        cells += [f"{1000 * mean(r[key] / r['new'] for r in mine):.0f}" for key in ("decode_s", "decode_s_without")]
        lines.append(cells)
    head = [
        "choice",
        "recently used set, of the context",
        "KiB per token over the link",
        "hits",
        "simulated: LRU",
        "FIFO",
    ]
    tokens, new, n = rows[0]["tokens"], rows[0]["new"], len({r["text"] for r in rows})
    note = f"{n} texts of {tokens} tokens, {new} generated after each: the same without."
    return format_rows([*head, "clock", "counter", "ms per token", "without"], lines, note)


def main() -> None:
    parser = make_parser(__doc__, "hot.jsonl")
    parser.add_argument("--shares", default="0,5,10,20,30", type=read_numbers, help="per cent of the context; first 0")
    parser.add_argument("--texts", default=3, type=int)
    parser.add_argument("--tokens", default=4096, type=int)
    parser.add_argument("--new", default=64, type=int, help="tokens generated")
    run, demo = Recorder(parser), Demo()
    args = run.args
    for text in range(args.texts):
        ids = demo.encode("".join(demo.draw(args.tokens + 100, 16_000_000 + text)))[: args.tokens]
        for name in METHODS:
            run.write(*({"text": text} | row for row in run_text(demo.model, name, ids, args)))
            run.say(f"text {text}, {name}")
    print(format_table(args.out))


if __name__ == "__main__":
    main()
