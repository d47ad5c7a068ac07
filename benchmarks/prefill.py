"""Does near memory stay flat while a long prompt is read? Passes under a near limit too small for one layer.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --lengths 8192,65536 --plain 8192

In: a random model (2 layers, 4 query and 2 KV heads of dimension 32, float32), a prompt of random tokens. Out: a JSON
line per length: the near peak of reading the prompt in passes, less the index, which grows with the text; its time, and
the time of one pass through the plain model with Hugging Face's own cache, in turns. The near limit is what decoding
needs, and two blocks and one pass besides: far less than one layer's KV, so that earlier records come near block by
block. Random weights say nothing of quality: this is memory and time.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from demo_texts import find_near_need, read
from random_models import make_llama
from rows import RESULTS, Row, format_rows, mib, read_rows
from runs import Recorder, make_parser, read_numbers, time_call
from transformers import DynamicCache

from farkv import InfiniGen, attach
from farkv.store.tiers import BLOCK_TOKENS

SHAPE = dict(layers=2, heads=4, kv_heads=2, head_dim=32, hidden=128, mlp=512, vocabulary=512)
METHOD = InfiniGen(fraction=0.02)
NEW_TOKENS = 4


@torch.no_grad()
def read_in_passes(model: Any, ids: list[int], chunk: int) -> Row:
    """Read a prompt under the limit, and decode a few tokens."""
    n = len(ids) + NEW_TOKENS
    need, shape = find_near_need(model, METHOD, n, profile=False)
    # What decoding needs, two blocks and one pass.
    limit = need + (2 * BLOCK_TOKENS + chunk) * shape.token_bytes
    with attach(model, METHOD, near=limit, profile=False) as far:
        seconds, cache = time_call(lambda: read(far, ids, chunk, tokens=n, chunk_tokens=chunk))
        store: Any = cache.engine.store
        assert store.streams
        row = dict(passes_s=seconds, near_limit=limit, near_peak=store.near.peak, index_peak=store.index.peak,
                   block_tokens=store.block_tokens)  # fmt: skip
        for token in ids[:NEW_TOKENS]:
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        receipt = far.receipt(cache)
    row |= dict(near_peak_decoding=receipt.kv_bytes.near_peak, kv_bytes=receipt.kv_bytes.total)
    assert row["near_peak_decoding"] <= limit
    return row


@torch.no_grad()
def read_at_once(model: Any, ids: list[int]) -> float:
    """Return the seconds of one pass through the plain model."""
    cache, prompt = DynamicCache(config=model.config), torch.tensor([ids])
    return time_call(lambda: model.model(input_ids=prompt, past_key_values=cache, use_cache=True))[0]


def run_length(tokens: int, args: argparse.Namespace) -> Row:
    """Read one length, in turns with the plain model where it is asked for."""
    model, with_plain = make_llama(2 * tokens, **SHAPE), tokens <= args.plain
    ids = torch.randint(512, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    repeats = args.repeats if with_plain else 1
    rows, plain = [], []
    for _ in range(repeats):
        rows.append(read_in_passes(model, ids, args.chunk))
        plain += [read_at_once(model, ids)] if with_plain else []
    passes = [row["passes_s"] for row in rows]
    ratios = [a / b for a, b in zip(passes, plain, strict=False)]
    row = dict(tokens=tokens, chunk=args.chunk, repeats=repeats, all_passes_s=passes, all_plain_s=plain)
    return row | rows[-1] | dict(passes_s=statistics.median(passes),
                                 plain_s=statistics.median(plain) if plain else None,
                                 ratio=statistics.median(ratios) if ratios else None)  # fmt: skip


def format_table(path: Path = RESULTS / "prefill.jsonl") -> str:
    """Return one Markdown row per length."""
    head = ["prompt", "KV, MiB", "near limit, MiB", "near peak of the prompt, MiB", "less the index, MiB"]
    head += ["seconds in passes", "of one pass through the plain model"]
    lines = []
    for r in read_rows(path):
        sizes = (r["kv_bytes"], r["near_limit"], r["near_peak"], r["near_peak"] - r["index_peak"])
        ratio = f"{r['ratio']:.2f} x" if r["ratio"] else "not measured"
        lines.append([f"{r['tokens'] // 1024} K tokens", *(mib(n, 2) for n in sizes), f"{r['passes_s']:.1f}", ratio])
    return format_rows(head, lines)


def main() -> None:
    parser = make_parser(__doc__, "prefill.jsonl")
    parser.add_argument("--lengths", default="8192,16384,32768,65536", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--plain", default=16384, type=int, help="longest prompt that the plain model reads too")
    parser.add_argument("--repeats", default=2, type=int, help="times that each of those is read")
    parser.add_argument("--chunk", default=2048, type=int, help="tokens of a pass")
    run = Recorder(parser)
    for tokens in run.args.lengths:
        run.write(run_length(tokens, run.args))
        run.say(f"{tokens} tokens")
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
