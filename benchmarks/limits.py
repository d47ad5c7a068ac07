"""Do byte limits hold? The demo model under a sweep of near limits: the peak, and the bytes over the link.

    python benchmarks/limits.py --out benchmarks/results/near_limits.jsonl

In: the demo model, one text. Out: a JSON line per limit: refused before the prompt was read, or run with its near
peak, its answer, and fetched bytes per token beside what `farkv.store.sizes` predicts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.errors import CapacityError
from farkv.hf.ask import Decoding, Prompt, ask, build_prompt
from farkv.hf.attach import attach
from farkv.hf.load import load_model
from farkv.methods import InfiniGen
from farkv.store.sizes import LayerShape, fetched_bytes

NEW_TOKENS = 8


def predict_fetch(far: Any, prompt: Prompt, cache: Any) -> float:
    """Return the predicted bytes per decode step: chosen records less the resident tail, every layer."""
    recipe = cache.recipe
    pool = recipe.store.pool[far.managed[0]]
    shape = LayerShape(1, pool.data.shape[1], pool.data.shape[3], 0, pool.data.element_size())
    steps = range(len(prompt.text) + 1, prompt.n_tokens + NEW_TOKENS)
    per_step = []
    for tokens in steps:
        budget = recipe.split(tokens, far.managed[0])
        per_step.append(len(far.managed) * fetched_bytes(shape, budget.early + budget.late))
    return sum(per_step) / len(per_step)


def run_limit(model: Any, tokenizer: Any, prompt: Prompt, near: int, total: int) -> dict[str, Any]:
    """Run one limit."""
    row: dict[str, Any] = {"near_limit": near, "of_kv": near / total, "refused": False}
    with attach(model, InfiniGen(fraction=0.1), near=near) as far:
        try:
            cache = far.new_cache(tokens=prompt.n_tokens + NEW_TOKENS)
        except CapacityError as error:
            return row | {"refused": True, "why": str(error)}
        answer = ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(NEW_TOKENS, chunk_tokens=512))
        receipt = far.receipt(cache)
        row |= {
            "near_peak": receipt.kv_bytes.near_peak,
            "holds": receipt.kv_bytes.near_peak <= near,
            "fetched_bytes_per_token": receipt.fetched_bytes_per_token,
            "predicted_bytes_per_token": predict_fetch(far, prompt, cache),
            "read_fraction": receipt.read_fraction,
            "resident_fraction": receipt.resident_fraction,
            "answer": answer,
        }
    return row


def main() -> None:
    """Parse the command line and run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/near_limits.jsonl")
    parser.add_argument("--tokens", default=4096, type=int)
    args = parser.parse_args()
    model, tokenizer = load_model("demo", device="cpu")
    sources = read_sources(STDLIB, held_out=True)
    filler = draw_filler(sources, args.tokens - 440, 7, lambda line: len(tokenizer(line)["input_ids"]))
    made = make_recall_prompt(filler, 30, 7)
    prompt = build_prompt(tokenizer, made.text, made.question)
    config = model.config
    total = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * prompt.n_tokens
    rows = [run_limit(model, tokenizer, prompt, int(total * p / 100), total) for p in (1, 2, 5, *range(10, 101, 5))]
    Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(format_table(Path(args.out)))


def format_table(path: Path) -> str:
    """Return one Markdown row per limit."""
    lines = [
        "| near limit, of the KV | near peak, of the limit | fetched / predicted bytes per token |",
        "|---|---|---|",
    ]
    for row in map(json.loads, path.read_text().splitlines()):
        if row["refused"]:
            lines.append(f"| {row['of_kv']:.0%} | refused before the prompt was read | |")
        else:
            share = row["near_peak"] / row["near_limit"]
            fetched, predicted = row["fetched_bytes_per_token"], row["predicted_bytes_per_token"]
            lines.append(f"| {row['of_kv']:.0%} | {share:.0%} | {fetched:,.0f} / {predicted:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
