"""How large should a page on disk be? A real model's own queries, over pages of several sizes.

    python benchmarks/page_sizes.py --model FOLDER --name SmolLM2-135M-Instruct --add

One text, read once; every size goes on from it under a host limit of an eighth of the KV, and so does the same choice
in place, which no page limits. Known tokens are fed one by one; before each the system is made to forget what it has of
the file, which is not timed. KL is to all records, in nats. `read again` is what came from the disk over what was
attended to: below 1 where pages in memory, or several queries of one page, save reads.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mixed_texts import Bench, Mixed, force_full, force_tokens, measure_kl, read_once, split_passes
from rows import RESULTS, Row, format_rows, group, mean, read_rows
from runs import Recorder, find_versions, make_parser, read_numbers, time_call

from farkv import InfiniGen, attach
from farkv.evals.prefill import Prefilled, fill_cache
from farkv.store.far import pages

STEPS, PASS_TOKENS = 32, 256
HOST_SHARE = 0.125
# Of float32: as many bits of a key as the default has of half precision.
METHOD = InfiniGen(fraction=0.05, index_share=1 / 64, sampled=False)


def time_steps(bench: Bench, cache: Any, known: list[int]) -> tuple[float, torch.Tensor]:
    """Feed known tokens; return the median seconds of one, and the log-probabilities."""
    seconds, logs = [], []
    for token in known:
        held = cache.engine.store.page_cache
        if held is not None:
            held.pages.file.drop_cached()
        spent, found = time_call(lambda t=token: force_tokens(bench.model, cache, [t]))
        seconds.append(spent)
        logs.append(found)
    return statistics.median(seconds), torch.cat(logs)


def run_text(bench: Bench, text: Mixed, whole: Prefilled, sizes: list[int]) -> Iterator[Row]:
    """Go on from a text in place, and over pages of every size in KiB."""
    n = whole.n_tokens
    passes, known = split_passes(whole, [PASS_TOKENS] * (n // PASS_TOKENS)), text.tokens[n : n + STEPS]
    kv_bytes = n * sum(s.k.shape[1] * 2 * s.k.shape[3] * s.k.element_size() for s in whole.passes[0].values())
    full = force_full(bench.model, whole, known)
    for size in (0, *sizes):
        pages.PAGE_BYTES = size * 1024 or pages.PAGE_BYTES
        with tempfile.TemporaryDirectory() as folder:
            limits: dict[str, Any] = dict(disk=f"{folder}:8GiB", host=int(HOST_SHARE * kv_bytes)) if size else {}
            with attach(bench.model, METHOD, profile=False, **limits) as far:
                cache: Any = fill_cache(far, passes, STEPS)
                step_s, logs = time_steps(bench, cache, known)
                receipt = far.receipt(cache)
                made = cache.engine.store.page_cache.pages.file.page_bytes if size else 0
        yield dict(size=size, page_bytes=made, step_s=step_s, kl=measure_kl(full, logs), read=receipt.read_fraction,
                   disk=receipt.disk_bytes_per_token / kv_bytes)  # fmt: skip


def format_table(path: Path = RESULTS / "page_sizes.jsonl") -> str:
    """Return one Markdown row per model and size of a page."""
    lines, rows = [], read_rows(path)
    if not rows:
        return "Not run yet."
    for (model, tokens), mine in group(rows, "model", "tokens").items():
        for size, of_size in group(mine, "size").items():
            read, disk = (mean(r[name] for r in of_size) for name in ("read", "disk"))
            cells = [
                model,
                f"{tokens:,}",
                f"{size} KiB" if size else "in place",
                f"{mean(r['kl'] for r in of_size):.2g}",
            ]
            cells += [f"{1e3 * statistics.median(r['step_s'] for r in of_size):.0f}", f"{read:.1%}"]
            lines.append(cells + ([f"{disk:.1%}", f"{disk / read:.2f}"] if size else []))
    head = ["model", "tokens", "pages", "KL", "ms per token", "attended to", "from disk", "read again"]
    texts = len({row["text"] for row in rows})
    threads = "1 thread" if rows[0]["threads"] == 1 else f"{rows[0]['threads']} threads"
    note = f"{texts} texts, {STEPS} tokens decoded, float32, {threads}, a step may read 5 %."
    return format_rows(head, lines, note)


def main() -> None:
    parser = make_parser(__doc__, "page_sizes.jsonl", threads=2)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--name", required=True, help="the model's name in the table")
    parser.add_argument("--tokens", default=8192, type=int)
    parser.add_argument("--texts", default=3, type=int)
    parser.add_argument("--sizes", default="16,32,64,128", type=read_numbers, help="KiB, by commas")
    run = Recorder(parser)
    args, bench = run.args, Bench(run.args.model)
    for text in bench.make_texts(args.texts, args.tokens - 1024, STEPS + 1024):
        whole = read_once(bench.model, text.tokens[: args.tokens])
        for row in run_text(bench, text, whole, args.sizes):
            same = dict(model=args.name, text=text.name, tokens=args.tokens, threads=args.threads)
            run.write(same | row | find_versions())
            run.say(f"{text.name}, {row['size']} KiB")
    print(format_table(args.out))


if __name__ == "__main__":
    main()
