"""Does it matter in how large passes a prompt is read? KL to the full cache by chunk size, at 5 % of the KV bytes.

    python benchmarks/chunking.py --model FOLDER
    PYTHONPATH=OLD/src python benchmarks/chunking.py --model FOLDER --when before --add

In: a model, texts whose first quarter is of another kind than the rest. Out: a JSON line per text, method and chunk
size: KL in nats over known tokens that follow the text, fed one by one. Keys, queries and values are those of one dense
pass, whatever the chunks, so that all differences are the method's. `before` is the code before an index was fitted to
the whole prompt (the parent of commit bf7875c).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mixed_texts import Bench, Mixed, force_full, force_tokens, measure_kl, read_once, split_passes
from rows import RESULTS, Row, format_rows, group, mean, read_rows
from runs import Recorder, find_versions, make_parser, read_numbers

from farkv import InfiniGen, attach
from farkv.evals.prefill import Prefilled, fill_cache
from farkv.methods import LowBit, Oracle

METHODS: dict[str, Any] = {
    "infinigen": InfiniGen(fraction=0.05, columns=16),
    "lowbit": LowBit(fraction=0.05),
    "oracle": Oracle(fraction=0.05),
}
TOKENS, STEPS = 4096, 64


def run_text(bench: Bench, text: Mixed, prefilled: Prefilled, full: torch.Tensor, sizes: list[int]) -> Iterator[Row]:
    """Read a text in passes of every size, by every method."""
    following = text.tokens[prefilled.n_tokens :]
    for name, method in METHODS.items():
        # The oracle has no index: its passes are of no account.
        for size in sizes if name != "oracle" else [0]:
            n, chunk = prefilled.n_tokens, size or prefilled.n_tokens
            passes = [min(chunk, n - start) for start in range(0, n, chunk)]
            with attach(bench.model, method, profile=False) as far:
                cache = fill_cache(far, split_passes(prefilled, passes), len(following))
                kl = measure_kl(full, force_tokens(bench.model, cache, following))
            yield dict(text=text.name, method=name, chunk=size, kl=kl)


def format_table(path: Path = RESULTS / "chunking.jsonl") -> str:
    """Return one Markdown row per method and version: mean KL at every chunk size."""
    rows = read_rows(path)
    sizes = sorted({r["chunk"] for r in rows}, key=lambda n: n or TOKENS)
    head = ["method", "code", *(f"chunks of {n}" if n else "one pass" for n in sizes)]
    lines = []
    for (method, when), mine in group(rows, "method", "when").items():
        found = {n: [r["kl"] for r in mine if r["chunk"] == n] for n in sizes}
        if method == "oracle" and when == "before":
            continue
        cells = [f"{mean(found[n]):.4f}" if found[n] else "" for n in sizes]
        lines.append([method, {"before": "before", "now": "**now**"}[when], *cells])
    order = list(METHODS)
    lines.sort(key=lambda cells: (order.index(cells[0]), cells[1] != "before"))
    n_texts, model = len({r["text"] for r in rows}), rows[0]["model"]
    note = (
        f"{model}, {n_texts} texts of {TOKENS:,} tokens, {STEPS} decode steps each, 5 % read, no profile; KL in nats."
    )
    return format_rows(head, lines, note)


def main() -> None:
    parser = make_parser(__doc__, "chunking.jsonl")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="the model's name in the table")
    parser.add_argument("--sizes", default="256,512,1024,2048,0", type=read_numbers, help="by commas; 0: one pass")
    parser.add_argument("--texts", default=6, type=int)
    parser.add_argument("--when", default="now", choices=["before", "now"])
    run = Recorder(parser)
    args = run.args
    bench = Bench(args.model)
    for text in bench.make_texts(args.texts, TOKENS // 4, TOKENS * 3 // 4 + STEPS):
        prefilled = read_once(bench.model, text.tokens[:TOKENS])
        full = force_full(bench.model, prefilled, text.tokens[TOKENS:])
        for row in run_text(bench, text, prefilled, full, args.sizes):
            run.write(dict(model=args.name, when=args.when) | row | find_versions())
        run.say(text.name)
    print(format_table(args.out))


if __name__ == "__main__":
    main()
