"""How good is a choice of records? One-question recall and decode-mode KL, every method on the same prompts.

    python benchmarks/quality.py
    python benchmarks/quality.py --lengths 2048 --prompts 10 --methods ours,oracle

In: the demo model, held-out standard-library files. Out: a JSON line per prompt and method, a table at the end.
Prefill runs once per prompt; each method's cache is then filled with those very keys, values and queries, so that
methods differ in nothing but what they read at the decode steps (question, then answer), which run for real.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from demo_texts import FACTS, Demo, answer_greedily, compare_logs, fill_cache, force_tokens, prefill_once
from rows import RESULTS, Row, format_rows, group, mean, percent, read_rows
from runs import Recorder, make_parser, read_names, read_numbers

from farkv import Full, InfiniGen, attach
from farkv.evals.prefill import Prefilled
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.methods import Method, Oracle, Random, Window

METHODS: dict[str, Method] = {
    "ours 0.10": InfiniGen(fraction=0.10),
    "ours 0.05": InfiniGen(fraction=0.05),
    "ours 0.02": InfiniGen(fraction=0.02),
    "ours 0.10, 24 columns": InfiniGen(fraction=0.10, columns=24),
    "ours 0.05, 24 columns": InfiniGen(fraction=0.05, columns=24),
    "ours 0.10, 8-bit index": InfiniGen(fraction=0.10, index_bits=8),
    "far 0.10": InfiniGen(fraction=0.10),
    "far 0.05": InfiniGen(fraction=0.05),
    "far, no top-up, post_attn 0.10": InfiniGen(fraction=0.10, top_up=0.0),
    "far, no top-up, attn 0.10": InfiniGen(fraction=0.10, top_up=0.0, source="attn"),
    "paper 0.20": InfiniGen(fraction=0.20, paper=True),
    "paper, post_attn 0.20": InfiniGen(fraction=0.20, paper=True, source="post_attn"),
    "paper 0.30 (0.20 a layer)": InfiniGen(fraction=0.30, paper=True),
    "oracle 0.10": Oracle(fraction=0.10),
    "window 0.10": Window(fraction=0.10),
    "random 0.10": Random(fraction=0.10),
    "ours 0.10, no profile": InfiniGen(fraction=0.10),
}
CODE_STEPS = 48


def fill_each(demo: Demo, prefilled: Prefilled, names: list[str]) -> Iterator[tuple[str, Handle, FarCache]]:
    """Give every method's cache over one text while its handle is attached."""
    for name in names:
        # A near limit, however large, makes near memory a tier of its own: records are then chosen one layer ahead.
        near, profile = "1GiB" if name.startswith("far") else None, False if name.endswith("no profile") else None
        with attach(demo.model, METHODS[name], near=near, profile=profile) as far:
            yield name, far, fill_cache(far, prefilled)


def measured(far: Handle, cache: FarCache) -> Row:
    """Return what a receipt says of the bytes read."""
    receipt = far.receipt(cache)
    return dict(read_fraction=receipt.read_fraction, index_fraction=receipt.index_fraction)


def run_recall(demo: Demo, length: int, seed: int, names: list[str]) -> Iterator[Row]:
    """Ask one question of one text, of every method."""
    n_facts = FACTS.get(length, 20)
    _, prompt, expected, sha = demo.make_recall(length, n_facts, seed)
    prefilled = prefill_once(demo.model, prompt.text)
    with attach(demo.model, Full()) as far:
        full = answer_greedily(far, fill_cache(far, prefilled), prompt.question)
    for name, far, cache in fill_each(demo, prefilled, names):
        answer = answer_greedily(far, cache, prompt.question)
        yield dict(task="recall", method=name, length=length, tokens=prompt.n_tokens, facts=n_facts, seed=seed,
                   prompt_sha=sha, right=answer == expected, full_right=full == expected, agrees=answer == full,
                   **measured(far, cache))  # fmt: skip


def run_code(demo: Demo, length: int, seed: int, names: list[str]) -> Iterator[Row]:
    """Decode known code token by token: KL of every method's prediction to the full cache's."""
    text, following = demo.make_code(length, CODE_STEPS, seed)
    prefilled = prefill_once(demo.model, text)
    with attach(demo.model, Full()) as far:
        full = force_tokens(far, fill_cache(far, prefilled), following)
    for name, far, cache in fill_each(demo, prefilled, names):
        kl, agrees = compare_logs(full, force_tokens(far, cache, following))
        yield dict(task="code", method=name, length=length, seed=seed, kl=kl, agrees=agrees, **measured(far, cache))


def format_table(path: Path = RESULTS / "infinigen_quality.jsonl") -> str:
    """Return one Markdown row per method: agreement and accuracy on recall, KL on code."""
    rows, lines = read_rows(path), []
    lengths = sorted({r["length"] for r in rows})
    head = ["method", "read", "index", "agrees", "agrees, full right"]
    head += [*(f"agrees {n // 1024} K" for n in lengths), "right", "KL on code"]
    for method, mine in group(rows, "method").items():
        recall = [r for r in mine if r["task"] == "recall"]
        cells = [method, *(f"{mean(r[name] for r in mine):.3f}" for name in ("read_fraction", "index_fraction"))]
        cells += [percent(r["agrees"] for r in recall), percent(r["agrees"] for r in recall if r["full_right"])]
        cells += [percent(r["agrees"] for r in recall if r["length"] == n) for n in lengths]
        cells += [percent(r["right"] for r in recall), f"{mean(r['kl'] for r in mine if r['task'] == 'code'):.4f}"]
        lines.append(cells)
    full = {(r["length"], r["seed"]): r["full_right"] for r in rows if r["task"] == "recall"}
    note = f"{len(full)} recall prompts; the full cache itself is right on {percent(full.values())} of them."
    return format_rows(head, lines, note)


def main() -> None:
    parser = make_parser(__doc__, "infinigen_quality.jsonl", threads=2)
    parser.add_argument("--lengths", default="2048,4096,8192", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--prompts", default="36,36,30", type=read_numbers, help="recall prompts, one number a length")
    parser.add_argument("--texts", default=4, type=int, help=f"code texts per length, {CODE_STEPS} decode steps each")
    parser.add_argument("--methods", default="", type=read_names, help="prefixes of method names, by commas; all")
    run, demo = Recorder(parser), Demo()
    args = run.args
    names = [name for name in METHODS if name.startswith(tuple(args.methods))]
    for length, n_prompts in zip(args.lengths, args.prompts, strict=True):
        for i in range(n_prompts):
            run.write(*run_recall(demo, length, 1_000_000 + 1000 * length + i, names))
            run.say(f"recall {length}: {i + 1}/{n_prompts}")
        for i in range(args.texts):
            run.write(*run_code(demo, length, 2_000_000 + 1000 * length + i, names))
            run.say(f"code {length}: {i + 1}/{args.texts}")
    print(format_table(args.out))


if __name__ == "__main__":
    main()
