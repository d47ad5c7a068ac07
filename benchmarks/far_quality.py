"""What do answers lose where KV does not fit? One text, read once; every way goes on from it under its own bytes.

    python benchmarks/far_quality.py --model FOLDER --name SmolLM2-135M-Instruct --add

After the figures 11 to 14 of InfiniGen's paper: all records; the chosen ones, in place and from a disk under a host
limit of a quarter of the KV; what H2O kept of them; all of them, rounded. Known tokens are fed one by one. KL is to all
records as they came, in nats; bytes are those that a step reads, of the KV bytes; the index comes on top.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mixed_texts import Bench, Mixed, force_tokens, measure_kl, read_once, split_passes
from rows import RESULTS, Row, format_rows, group, mean, read_rows
from runs import Recorder, find_versions, make_parser, read_numbers

from farkv import Full, InfiniGen, attach
from farkv.config import QUANT
from farkv.evals.prefill import Prefilled, fill_cache
from farkv.methods import H2O
from farkv.store.far.quantize import encoded_bytes

STEPS, PASS_TOKENS = 32, 256
HOST_SHARE = 0.25
# Of float32: as many bits of a key as the default has of half precision.
INDEX_SHARE = 1 / 64


def list_ways(fractions: list[int], head_dim: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return every way's method and storage."""
    ways: dict[str, tuple[Any, dict[str, Any]]] = {"all": (Full(), {})}
    for percent in fractions:
        best = InfiniGen(fraction=percent / 100, index_share=INDEX_SHARE, sampled=False)
        ways[f"infinigen {percent} %, in place"] = (replace(best, sampled=True), {})
        ways[f"infinigen {percent} %, in place, not drawn"] = (best, {})
        ways[f"infinigen {percent} %, disk"] = (best, {"disk": True})
        ways[f"H2O {percent} %"] = (H2O(fraction=percent / 100), {})
    for quant in QUANT:
        percent = int(100 * coded_share(quant, head_dim))
        ways[f"all, {quant}"] = (Full(), {"quant": quant})
        ways[f"H2O {percent} %"] = (H2O(fraction=percent / 100), {})
    return ways


def coded_share(quant: str, head_dim: int) -> float:
    """Return a coded record's bytes over those of half precision."""
    return encoded_bytes(quant, head_dim, head_dim) / (2 * head_dim * torch.bfloat16.itemsize)


def run_text(bench: Bench, text: Mixed, whole: Prefilled, fractions: list[int]) -> Iterator[Row]:
    """Go on from a text by every way."""
    n = whole.n_tokens
    passes, known = split_passes(whole, [PASS_TOKENS] * (n // PASS_TOKENS)), text.tokens[n : n + STEPS]
    record = sum(s.k.shape[1] * 2 * s.k.shape[3] * s.k.element_size() for s in whole.passes[0].values())
    full: torch.Tensor | None = None
    head_dim = next(iter(whole.passes[0].values())).k.shape[3]
    for name, (method, storage) in list_ways(fractions, head_dim).items():
        with tempfile.TemporaryDirectory() as folder:
            options = dict(storage)
            if options.pop("disk", False):
                options |= {"disk": f"{folder}:8GiB", "host": int(HOST_SHARE * record * n)}
            with attach(bench.model, method, profile=False, **options) as far:
                cache = fill_cache(far, passes, STEPS)
                logs = force_tokens(bench.model, cache, known)
                receipt = far.receipt(cache)
        full = logs if full is None else full
        same = float((logs.argmax(-1) == full.argmax(-1)).float().mean())
        read = coded_share(storage["quant"], head_dim) if "quant" in storage else receipt.read_fraction
        yield dict(way=name, kl=measure_kl(full, logs), same=same, read=read, index=receipt.index_fraction,
                   disk=receipt.disk_bytes_per_token / (record * n))  # fmt: skip


def interval(values: list[float]) -> str:
    """Return the half width of a 95 % interval of a mean, over texts."""
    if len(values) < 2:
        return ""
    spread = math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f" ± {1.96 * spread:.2g}"


def format_table(path: Path = RESULTS / "far_quality.jsonl") -> str:
    """Return one Markdown row per model and way."""
    lines, rows = [], read_rows(path)
    for model, mine in group(rows, "model").items():
        for way, of_way in group(mine, "way").items():
            kls = [r["kl"] for r in of_way]
            cells = [model, way, f"{mean(r['read'] for r in of_way):.1%}", f"{mean(r['index'] for r in of_way):.1%}"]
            cells += [f"{mean(r['disk'] for r in of_way):.1%}" if "disk" in way else ""]
            cells += ["", ""] if way == "all" else [
                f"{mean(kls):.2g}{interval(kls)}", f"{mean(r['same'] for r in of_way):.1%}"
            ]  # fmt: skip
            lines.append(cells)
    head = ["model", "way", "read per step", "index", "from disk", "KL", "same first token"]
    texts = len({row["text"] for row in rows})
    note = (
        f"{texts} texts, {rows[0]['tokens']:,} tokens read, {STEPS} decoded; ± 95 % of the mean over texts. "
        "Of rounded records the share is of half precision's bytes."
    )
    return format_rows(head, lines, note)


def main() -> None:
    parser = make_parser(__doc__, "far_quality.jsonl", threads=2)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--name", required=True, help="the model's name in the table")
    parser.add_argument("--tokens", default=2048, type=int)
    parser.add_argument("--texts", default=6, type=int)
    parser.add_argument("--fractions", default="5,10", type=read_numbers, help="percent, by commas")
    run = Recorder(parser)
    args, bench = run.args, Bench(run.args.model)
    for text in bench.make_texts(args.texts, args.tokens, STEPS):
        whole = read_once(bench.model, text.tokens[: args.tokens])
        for row in run_text(bench, text, whole, args.fractions):
            run.write(dict(model=args.name, text=text.name, tokens=args.tokens) | row | find_versions())
        run.say(text.name)
    print(format_table(args.out))


if __name__ == "__main__":
    main()
