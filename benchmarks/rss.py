"""Is a byte limit the memory that a process takes? Resident sets over the loaded model, for every tier and method.

    python benchmarks/rss.py                                  # all, each in an interpreter of its own
    python benchmarks/rss.py --add --only "disk infinigen;near"
    python benchmarks/rss.py --limit 32 --only "host full"    # smaller and shorter

In: a random model whose KV has a real shape (8 layers, 4 KV heads of 128, two query heads each, float32: 32 KiB a
token) and small weights; random tokens, read in passes of 256, then decoded. Out: a JSON line per tier and method.

What is counted. The baseline is the resident set of the process after the model was loaded and has read three passes of
256 tokens and decoded one, plainly, into an ordinary cache that was dropped: model, libraries, and what torch and the
allocator keep for passes of this size. From then on the peak is taken, of the prompt and of the decoding apart: by the
system's own mark (VmHWM, set back through /proc/self/clear_refs) where it can be set back, and by a thread that asks
psutil every 2 ms. `ratio` is (peak - baseline - CONSTANT) / (near + host); the constant is the same for every row. It
holds what grows with a pass and not with a limit: a pass of the plain model takes 22 MiB of it; Hugging Face's mask
over the context, as flags and as numbers; copies of a few MiB that attention, scoring and coding work on; the queries
that a skew is fitted to (8 MiB here), the libraries that fit it (9 MiB), and what malloc keeps of what was freed.

The context is what the limit holds (`fits`), or three times that (disk, session, eviction): most of it is then
elsewhere. What a tier refuses is a row too, with the words.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from children import forget_peak, read_memory, run_script
from random_models import make_llama
from rows import RESULTS, Row, format_rows, mib, read_rows
from runs import Recorder, find_versions, make_parser
from transformers import DynamicCache

import farkv
from farkv.errors import FarKVError
from farkv.methods import METHODS

MIB = 1 << 20
CONSTANT, BOUND = 48 * MIB, 1.10
LAYERS, KV_HEADS, HEADS, HEAD_DIM = 8, 4, 8, 128
TOKEN_BYTES = LAYERS * KV_HEADS * 2 * HEAD_DIM * 4
CHUNK, NEW_TOKENS = 256, 12
EVICTORS = [name for name, row in METHODS.items() if row.evictor is not None]
SELECTORS = [name for name in METHODS if name not in EVICTORS]


class Tier(NamedTuple):
    """Where records are: shares of the whole limit for near and host, the context in units of what the limit holds."""

    near: float
    host: float
    contexts: float
    options: dict[str, Any]
    methods: list[str]


TIERS = {
    "host": Tier(0, 1, 0.7, {}, [*SELECTORS, *EVICTORS]),
    "host, lru": Tier(0, 1, 3, {"evict": "lru"}, SELECTORS),
    "near": Tier(1, 0, 0.6, {}, EVICTORS),
    "near, host": Tier(0.25, 0.75, 0.6, {}, SELECTORS),
    "int8": Tier(0, 1, 2, {"quant": "int8"}, SELECTORS),
    "int4": Tier(0, 1, 3, {"quant": "int4"}, SELECTORS),
    "disk": Tier(0, 1, 3, {"disk": True}, SELECTORS),
    "disk, near": Tier(0.5, 0.5, 3, {"disk": True}, SELECTORS),
    "session": Tier(0, 1, 3, {"session": True}, SELECTORS),
}


# --- one configuration, in an interpreter of its own -----------------------------------------------------------


class Watch:
    """The peak of the resident set since it was last asked for."""

    def __init__(self) -> None:
        import psutil

        self._rss: Callable[[], int] = lambda: psutil.Process().memory_info().rss
        self._peak, self._stopped = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(0.001):
            self._peak = max(self._peak, self._rss())

    @contextmanager
    def measure(self, row: Row, name: str) -> Iterator[None]:
        """Write the peak of what is done meanwhile into a row."""
        marks = True
        try:
            forget_peak()
        except OSError:
            # Some sandboxes do not allow it: the samples are left.
            marks = False
        self._peak = self._rss()
        try:
            yield
        finally:
            row[name] = max(self._peak, read_memory()["VmHWM"] if marks else 0)
            row["by_mark"] = marks


def make_model(tokens: int) -> Any:
    """Return a model with small weights and a KV of a real shape."""
    return make_llama(tokens, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, hidden=128, head_dim=HEAD_DIM, mlp=256,
                      vocabulary=512)  # fmt: skip


def make_method(name: str) -> Any:
    """Return a method's config: a tenth is read, or kept, where it can be said."""
    config = METHODS[name].config
    return config() if name == "full" else config(fraction=0.1)


def read(decoder: Any, ids: torch.Tensor, cache: Any, chunk: int) -> None:
    """Read a prompt in passes."""
    for part in ids.split(chunk, 1):
        decoder(input_ids=part, past_key_values=cache, use_cache=True)


@torch.no_grad()
def measure(tier: Tier, name: str, limit: int, folder: Path) -> Row:
    """Read and decode under a limit; return the peaks."""
    tokens = int(tier.contexts * limit / TOKEN_BYTES)
    model, ids = make_model(2 * tokens), torch.randint(512, (1, tokens))
    options = dict(tier.options)
    if options.pop("disk", False):
        options["disk"] = str(folder)
    limits = {key: int(share * limit) for key, share in (("near", tier.near), ("host", tier.host)) if share}
    saved = folder / "text.farkv" if options.pop("session", False) else None
    if saved is not None:
        with farkv.attach(model, make_method(name)) as far:
            cache = far.new_cache()
            read(far.decoder, ids, cache, CHUNK)
            cache.save(saved)
        del cache, far
    warm: Any = DynamicCache(config=model.config)
    read(model.model, ids[:, : 3 * CHUNK], warm, CHUNK)
    model(input_ids=ids[:, :1], past_key_values=warm)
    del warm
    gc.collect()
    # What the plain passes left behind would hide as much of ours.
    ctypes.CDLL(None).malloc_trim(0)
    row: Row = {"tokens": tokens, **limits, "baseline": read_memory()["VmRSS"], "refused": ""}
    try:
        with Watch() as watch, farkv.attach(model, make_method(name), **limits, **options) as far:
            with watch.measure(row, "prefill_peak"):
                if saved is not None:
                    cache = farkv.load_cache(saved, model, tokens=tokens + NEW_TOKENS)
                else:
                    cache = far.new_cache(tokens=tokens + NEW_TOKENS, chunk_tokens=CHUNK)
                    read(far.decoder, ids, cache, cache.engine.announce_prompt(tokens, CHUNK))
            with watch.measure(row, "decode_peak"):
                for token in ids[:, :NEW_TOKENS].split(1, 1):
                    model(input_ids=token, past_key_values=cache)
            sizes = far.receipt(cache).kv_bytes
            row |= {"near_peak": sizes.near_peak, "host_peak": sizes.host_peak, "kv_bytes": sizes.total}
            row["after"] = read_memory()["VmRSS"]
    except FarKVError as error:
        row["refused"] = str(error)
    return row


def judge(row: Row, limit: int) -> Row:
    """Add the ratios, of what was not refused."""
    if row["refused"]:
        return row
    over = {name: (row[f"{name}_peak"] - row["baseline"] - CONSTANT) / limit for name in ("prefill", "decode")}
    return row | {f"{name}_ratio": round(ratio, 3) for name, ratio in over.items()} | {
        "constant": CONSTANT, "holds": max(over.values()) <= BOUND,
    }  # fmt: skip


def run_child(tier: str, method: str, limit: int, threads: int) -> Row:
    """Measure one configuration here."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(TIERS[tier], method, limit, Path(folder))
    return {"tier": tier, "method": method, "limit": limit, "threads": threads} | judge(row, limit)


# --- all of them -----------------------------------------------------------------------------------------------


def list_wanted(only: list[str]) -> list[tuple[str, str]]:
    """Return tiers and methods: all, or those that are named as a tier, a method, or both."""
    pairs = [(tier, name) for tier, each in TIERS.items() for name in each.methods]
    return [pair for pair in pairs if not only or {pair[0], pair[1], " ".join(pair)} & set(only)]


def format_table(path: Path = RESULTS / "rss.jsonl") -> str:
    """Return one Markdown row per tier: its limits, the largest ratios of prompt and decoding, and whose they are."""
    rows = [row for row in read_rows(path) if not row["refused"]]
    lines = []
    for tier in dict.fromkeys(row["tier"] for row in rows):
        mine = [row for row in rows if row["tier"] == tier]
        limits = ", ".join(f"{name} {mib(mine[0][name])}" for name in ("near", "host") if name in mine[0])
        cells = [tier, limits, mib(mine[0]["tokens"] * TOKEN_BYTES), len(mine)]
        for phase in ("prefill", "decode"):
            worst = max(mine, key=lambda row, key=f"{phase}_ratio": row[key])
            cells.append(f"{worst[f'{phase}_ratio']:.2f} ({worst['method']})")
        lines.append(cells)
    head = ["tier", "limits, MiB", "KV, MiB", "methods", "prompt: largest ratio", "decoding: largest ratio"]
    return format_rows(head, lines)


def main() -> None:
    parser = make_parser(__doc__, "rss.jsonl")
    parser.add_argument("--only", default=[], type=lambda text: text.split(";"), help="tier, method or both, by ;")
    parser.add_argument("--limit", default=64, type=int, help="near + host, in MiB")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    if (found := parser.parse_known_args()[0]).child:
        tier, method = found.child.split(";")
        print(json.dumps(run_child(tier, method, found.limit * MIB, found.threads)))
        return
    run = Recorder(parser)
    for tier, method in list_wanted(run.args.only):
        started = time.time()
        row = run_script(__file__, "--child", f"{tier};{method}", "--limit", run.args.limit, "--threads",
                         run.args.threads)  # fmt: skip
        run.write(row | {"seconds": round(time.time() - started, 1)} | find_versions())
        said = row["refused"] or f"prompt {row['prefill_ratio']}, decoding {row['decode_ratio']}"
        run.say(f"{tier}, {method}: {said}")
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
