"""Do byte limits hold? The demo model under a sweep of near limits: the peak, and the bytes over the link.

    python benchmarks/limits.py

In: the demo model, one text. Out: a JSON line per limit: refused before the prompt was read, or run with its near
peak, its answer, and fetched bytes per token beside what `farkv.store.sizes` predicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo_texts import Demo
from rows import RESULTS, Row, format_rows, mean, read_rows
from runs import Recorder, make_parser

from farkv import InfiniGen, attach
from farkv.errors import CapacityError
from farkv.hf.ask import Decoding, ask
from farkv.hf.prompt import Prompt
from farkv.store.sizes import LayerShape, fetched_bytes

NEW_TOKENS = 8


def predict_fetch(demo: Demo, far: Any, cache: Any, prompt: Prompt) -> float:
    """Return the predicted bytes per decode step: chosen records less the recent window, which is near, every layer."""
    config: Any = demo.model.config
    shape = LayerShape(1, config.num_key_value_heads, config.head_dim, config.head_dim, 4)
    budgets = [
        cache.engine.parts.budgets.split(n, far.managed[0])
        for n in range(len(prompt.text) + 1, prompt.n_tokens + NEW_TOKENS)
    ]
    return mean(len(far.managed) * fetched_bytes(shape, budget.early + budget.late) for budget in budgets)


def run_limit(demo: Demo, prompt: Prompt, near: int) -> Row:
    """Run one limit."""
    row: Row = {"near_limit": near, "of_kv": near / (demo.token_bytes * prompt.n_tokens), "refused": False}
    with attach(demo.model, InfiniGen(fraction=0.1), near=near) as far:
        try:
            cache = far.new_cache(tokens=prompt.n_tokens + NEW_TOKENS)
        except CapacityError as error:
            return row | {"refused": True, "why": str(error)}
        answer = ask(far, demo.tokenizer, prompt, cache=cache, decoding=Decoding(NEW_TOKENS, chunk_tokens=512))
        receipt = far.receipt(cache)
        return row | dict(
            near_peak=receipt.kv_bytes.near_peak, holds=receipt.kv_bytes.near_peak <= near,
            fetched_bytes_per_token=receipt.fetched_bytes_per_token,
            predicted_bytes_per_token=predict_fetch(demo, far, cache, prompt),
            read_fraction=receipt.read_fraction, resident_fraction=receipt.resident_fraction, answer=answer,
        )  # fmt: skip


def format_table(path: Path = RESULTS / "near_limits.jsonl") -> str:
    """Return one Markdown row per limit."""
    head = ["near limit, of the KV", "near peak, of the limit", "fetched / predicted bytes per token"]
    lines = []
    for r in read_rows(path):
        cells = [f"{r['of_kv']:.0%}", "refused before the prompt was read"]
        if not r["refused"]:
            link = f"{r['fetched_bytes_per_token']:,.0f} / {r['predicted_bytes_per_token']:,.0f}"
            cells[1:] = [f"{r['near_peak'] / r['near_limit']:.0%}", link]
        lines.append(cells)
    return format_rows(head, lines)


def main() -> None:
    parser = make_parser(__doc__, "near_limits.jsonl", threads=2)
    parser.add_argument("--tokens", default=4096, type=int)
    run, demo = Recorder(parser), Demo()
    prompt = demo.make_recall(run.args.tokens, 30, 7).prompt
    total = demo.token_bytes * prompt.n_tokens
    for of_total in (1, 2, 5, *range(10, 101, 5)):
        run.write(run_limit(demo, prompt, int(total * of_total / 100)))
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
