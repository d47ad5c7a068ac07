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
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import read_numbers, read_rows
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from farkv.hf.ask import Listener, prefill
from farkv.hf.attach import attach
from farkv.methods import InfiniGen
from farkv.store.sizes import LayerShape
from farkv.store.tiers import BLOCK_TOKENS

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
FRACTION = 0.02
NEW_TOKENS = 4
SHAPE = LayerShape(1, KV_HEADS, HEAD_DIM, HEAD_DIM, 4)


def make_model(tokens: int) -> LlamaForCausalLM:
    """Make a random model of CPU size."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=4 * HEADS * HEAD_DIM,
        vocab_size=512,
        max_position_embeddings=2 * tokens,
    )
    return LlamaForCausalLM(config).eval()


def find_limit(model: Any, tokens: int, chunk: int) -> int:
    """Return the bytes that decoding needs, two blocks and one pass."""
    with attach(model, InfiniGen(fraction=FRACTION), near="64GiB", profile=False) as far:
        recipe: Any = far.new_cache(tokens=tokens).recipe
        decoding = recipe.near_need_of(SHAPE, tokens, 0, 0).total
    return decoding + (2 * BLOCK_TOKENS + chunk) * SHAPE.token_bytes


@torch.no_grad()
def read_in_passes(model: Any, ids: list[int], chunk: int) -> dict[str, Any]:
    """Read a prompt under the limit, and decode a few tokens."""
    n = len(ids) + NEW_TOKENS
    limit = find_limit(model, n, chunk)
    with attach(model, InfiniGen(fraction=FRACTION), near=limit, profile=False) as far:
        cache = far.new_cache(tokens=n, chunk_tokens=chunk)
        recipe: Any = cache.recipe
        started = time.perf_counter()
        prefill(far, cache, ids, chunk, Listener())
        seconds = time.perf_counter() - started
        store = recipe.store
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
    started = time.perf_counter()
    model.model(input_ids=prompt, past_key_values=cache, use_cache=True)
    return time.perf_counter() - started


def run_length(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Read one length, in turns with the plain model where it is asked for."""
    model = make_model(tokens)
    ids = torch.randint(512, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    repeats = args.repeats if tokens <= args.plain else 1
    rows, plain = [], []
    for _ in range(repeats):
        rows.append(read_in_passes(model, ids, args.chunk))
        if tokens <= args.plain:
            plain.append(read_at_once(model, ids))
    row = dict(tokens=tokens, chunk=args.chunk, repeats=repeats, all_passes_s=[r["passes_s"] for r in rows],
               all_plain_s=plain)  # fmt: skip
    row |= rows[-1] | {"passes_s": statistics.median(r["passes_s"] for r in rows)}
    ratios = [r["passes_s"] / seconds for r, seconds in zip(rows, plain, strict=False)]
    return row | {"plain_s": statistics.median(plain) if plain else None,
                  "ratio": statistics.median(ratios) if ratios else None}  # fmt: skip


def format_table(path: Path) -> str:
    """Return one Markdown row per length."""
    head = ["prompt", "KV, MiB", "near limit, MiB", "near peak of the prompt, MiB", "less the index, MiB"]
    head += ["seconds in passes", "of one pass through the plain model"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in read_rows(path):
        sizes = (r["kv_bytes"], r["near_limit"], r["near_peak"], r["near_peak"] - r["index_peak"])
        cells = [f"{r['tokens'] // 1024} K tokens", *(f"{n / 2**20:.2f}" for n in sizes), f"{r['passes_s']:.1f}"]
        cells += [f"{r['ratio']:.2f} x" if r["ratio"] else "not measured"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/prefill.jsonl")
    parser.add_argument("--add", action="store_true", help="add to the results file")
    parser.add_argument("--lengths", default="8192,16384,32768,65536", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--plain", default=16384, type=int, help="longest prompt that the plain model reads too")
    parser.add_argument("--repeats", default=2, type=int, help="times that each of those is read")
    parser.add_argument("--chunk", default=2048, type=int, help="tokens of a pass")
    parser.add_argument("--threads", default=1, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    if not args.add:
        out.write_text("")
    for tokens in args.lengths:
        row = run_length(tokens, args)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stderr.write(f"{tokens}: {row['passes_s']:.1f} s\n")
    print(format_table(out))


if __name__ == "__main__":
    main()
