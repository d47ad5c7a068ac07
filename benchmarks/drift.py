"""What does it cost that an index was fitted to the beginning? KL to the full cache after more text, at 5 % read.

    python benchmarks/drift.py --model FOLDER
    PYTHONPATH=OLD/src python benchmarks/drift.py --model FOLDER --when before --add

In: a model, a prompt of 2,048 tokens, and text of another kind that is appended: in turns of 256 tokens, each answered
by 8, or token by token, as a long generation. Out: a JSON line per text, method, way and length: KL in nats over known
tokens that follow, fed one by one, and how often a layer was fitted again. `whole` is a prompt that was read with all
of the text at once. `before` is the code that fitted to turns once the text was longer by half, and never to what was
generated (commit a30c547).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mixed_texts import Bench, Mixed, force_full, force_tokens, measure_kl, read_once, split_passes
from rows import RESULTS, Row, format_rows, group, mean, read_rows
from runs import Recorder, find_versions, make_parser, read_names, read_numbers

import farkv
from farkv import InfiniGen, attach
from farkv.evals.prefill import Prefilled, fill_cache
from farkv.methods import LowBit

METHODS: dict[str, Any] = {
    "infinigen": InfiniGen(fraction=0.05, columns=16),
    "infinigen, profile": InfiniGen(fraction=0.05, columns=16),
    "lowbit": LowBit(fraction=0.05),
}
PROMPT, STEPS = 2048, 16
TURN, ANSWER = 248, 8
PROFILE_TOKENS = 1536


def append(cache: Any, whole: Prefilled, start: int, stop: int, way: str) -> None:
    """Append the tokens from `start` to `stop`, in turns or one by one, as if they had been read or decoded."""
    cache.engine.announce_prompt(0, stop)
    turn = [TURN, *[1] * ANSWER] if way == "turns" else [1]
    sizes = [start, *(turn * ((stop - start) // sum(turn)))]
    for steps in split_passes(whole, sizes).passes[1:]:
        for i, step in steps.items():
            cache.layers[i].update(step.k, step.v)
            cache.engine.attend(i, step, read_nothing)
        cache.engine.commit()


class Nothing:
    """An attention function whose output is not needed."""

    sinks = None

    def __call__(self, q: Any, k: Any, v: Any, mask: Any) -> object:
        return None

    def wrap(self, out: Any) -> object:
        return None


read_nothing = Nothing()


class Read(NamedTuple):
    """A text read once, and the full cache's predictions after so many appended tokens."""

    text: Mixed
    whole: Prefilled
    fulls: dict[int, torch.Tensor]


def run_text(bench: Bench, read: Read, plan: list[tuple[str, str]], profile: Any) -> Iterator[Row]:
    """Append a text by every method and way; measure at every length."""
    for name, way in plan:
        with attach(bench.model, METHODS[name], profile=profile if "profile" in name else False) as far:
            cache = fill_cache(far, split_passes(read.whole, [PROMPT]), max(read.fulls))
            at, started = PROMPT, time.time()
            for more, full in read.fulls.items():
                if way == "whole":
                    cache = fill_cache(far, split_passes(read.whole, [PROMPT + more]), STEPS)
                else:
                    append(cache, read.whole, at, PROMPT + more, way)
                at = PROMPT + more
                twin = copy.deepcopy(cache)
                kl = measure_kl(full, force_tokens(bench.model, twin, read.text.tokens[at : at + STEPS]))
                refits = cache.account.fallbacks.get("refit", 0) / len(cache.engine.layers)
                yield dict(text=read.text.name, method=name, way=way, more=more, kl=kl, refits=refits)
            seconds = round(time.time() - started, 1)
            yield dict(text=read.text.name, method=name, way=way, more=0, seconds=seconds)


def format_table(path: Path = RESULTS / "drift.jsonl") -> str:
    """Return one Markdown row per method, way and version: mean KL after more and more text."""
    rows = [r for r in read_rows(path) if r["more"]]
    lengths = sorted({r["more"] for r in rows})
    lines = []
    for (method, way, when), mine in group(rows, "method", "way", "when").items():
        found = {n: [r for r in mine if r["more"] == n] for n in lengths}
        cells = [f"{mean(r['kl'] for r in found[n]):.4f}" if found[n] else "" for n in lengths]
        refits = f"{mean(r['refits'] for r in found[lengths[-1]]):.1f}" if when == "now" and way != "whole" else ""
        lines.append([method, way, {"before": "before", "now": "**now**"}[when], *cells, refits])
    ways = ["generated", "turns", "whole"]
    lines.sort(key=lambda c: (list(METHODS).index(c[0]), ways.index(c[1]), c[2] != "before"))
    head = ["method", "appended", "code", *(f"+ {n:,} tokens" for n in lengths), "fitted again"]
    texts, model = {r["text"] for r in rows}, rows[0]["model"]
    note = f"{model}, {len(texts)} texts, a prompt of {PROMPT:,} tokens, {STEPS} decode steps, 5 % read; KL in nats."
    return format_rows(head, lines, note)


def main() -> None:
    parser = make_parser(__doc__, "drift.jsonl")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="the model's name in the table")
    parser.add_argument("--more", default="1024", type=read_numbers, help="tokens appended, by commas")
    parser.add_argument("--texts", default=6, type=int)
    parser.add_argument("--ways", default="generated,turns,whole", type=read_names)
    parser.add_argument("--methods", default=",".join(METHODS), type=lambda text: text.replace(", ", "; ").split(","))
    parser.add_argument("--when", default="now", choices=["before", "now"])
    run = Recorder(parser)
    args = run.args
    bench, profile = Bench(args.model), None
    names = [name.replace(";", ",") for name in args.methods]
    if any("profile" in name for name in names):
        profile = farkv.profile(bench.model, [torch.tensor(bench.take(kind, PROFILE_TOKENS)) for kind in bench.kinds])
    for text in bench.make_texts(args.texts, PROMPT, max(args.more) + STEPS):
        whole = read_once(bench.model, text.tokens[: PROMPT + max(args.more)])
        fulls: dict[int, torch.Tensor] = {}
        for more in args.more:
            at = PROMPT + more
            fulls[more] = force_full(bench.model, split_passes(whole, [at]), text.tokens[at : at + STEPS])
        plan = [(name, way) for name in names for way in args.ways]
        for row in run_text(bench, Read(text, whole, fulls), plan, profile):
            run.write(dict(model=args.name, when=args.when) | row | find_versions())
        run.say(text.name)
    print(format_table(args.out))


if __name__ == "__main__":
    main()
