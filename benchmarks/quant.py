"""What do rounded records cost? InfiniGen at 0.10 over records as they came, in int8 and in int4.

    python benchmarks/quant.py

In: the demo model, held-out standard-library files. Out: a JSON line per text and storage. Every run is real: the text
is read in passes of 512 tokens over rounded records, and the question or the known code is decoded over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from demo_texts import Demo, ask_all, compare_logs, force_tokens, read, same
from rows import RESULTS, Row, format_rows, group, mean, percent, read_rows
from runs import Recorder, make_parser, read_numbers

from farkv import InfiniGen, attach
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle

STORED = (None, "int8", "int4")
CHUNK_TOKENS = 512
CODE_STEPS = 64


def read_each(demo: Demo, text: list[int]) -> Iterator[tuple[str | None, Handle, FarCache]]:
    """Read a text over every storage; give the cache while its handle is attached."""
    for stored in STORED:
        with attach(demo.model, InfiniGen(fraction=0.10), quant=stored) as far:
            yield stored, far, read(far, text, CHUNK_TOKENS)


def measured(far: Handle, cache: FarCache, stored: str | None) -> Row:
    """Return a receipt's columns; `pool` is the bytes of the stored records alone, index and buffers apart."""
    receipt = far.receipt(cache)
    rows = sum(p.length * p.n_bytes // p.capacity for p in cache.engine.store.pool.values())
    return dict(stored=stored or "as they came", pool=rows, kv_bytes=receipt.kv_bytes.total,
                max_error=receipt.quant.max_error, read=receipt.read_fraction)  # fmt: skip


def run_recall(demo: Demo, length: int, seed: int) -> Iterator[Row]:
    """Ask several questions of one text."""
    asked = demo.make_questions(length, seed)
    full = demo.ask_full(asked, CHUNK_TOKENS)
    for stored, far, cache in read_each(demo, asked.text):
        got = ask_all(far, cache, asked.questions)
        yield dict(task="recall", length=length, seed=seed, agrees=same(got, full), right=same(got, asked.answers),
                   **measured(far, cache, stored))  # fmt: skip


def run_code(demo: Demo, length: int, seed: int) -> Iterator[Row]:
    """Decode known code after one text."""
    text, following = demo.make_code(length, CODE_STEPS, seed)
    full = demo.force_full(text, following, CHUNK_TOKENS)
    for stored, far, cache in read_each(demo, text):
        kl, top1 = compare_logs(full, force_tokens(far, cache, following))
        yield dict(task="code", length=length, seed=seed, kl=kl, top1=top1, **measured(far, cache, stored))


def format_table(path: Path = RESULTS / "quant.jsonl") -> str:
    """Return one Markdown row per storage."""
    rows, lines = read_rows(path), []
    for stored, mine in group(rows, "stored").items():
        recall, code = ([r for r in mine if r["task"] == task] for task in ("recall", "code"))
        errors = [r["max_error"] for r in mine if r["max_error"] is not None]
        cells = [stored, f"{mean(r['pool'] / r['kv_bytes'] for r in mine):.3f}"]
        cells += [percent(x for r in recall for x in r[key]) for key in ("agrees", "right")]
        cells += [f"{mean(r['kl'] for r in code):.4f}", percent(r["top1"] for r in code)]
        lines.append([*cells, f"{max(errors):.3f}" if errors else "0"])
    int8 = [r for r in rows if r["stored"] == "int8"]
    n, n_codes = sum(len(r.get("agrees", ())) for r in int8), sum(r["task"] == "code" for r in int8)
    return format_rows(
        ["records", "bytes in the pool", "agrees", "right", "KL on code", "same first choice on code",
         "largest error of a value"],
        lines, f"{n} questions, {n_codes} texts of code with {CODE_STEPS} steps each.",
    )  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, "quant.jsonl")
    parser.add_argument("--lengths", default="2048,4096", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--texts", default="2,1", type=read_numbers, help="recall texts, one number a length")
    parser.add_argument("--codes", default="2,0", type=read_numbers, help="code texts, one number a length")
    run, demo = Recorder(parser), Demo()
    for length, n_texts, n_codes in zip(run.args.lengths, run.args.texts, run.args.codes, strict=True):
        for i in range(n_texts):
            run.write(*run_recall(demo, length, 14_000_000 + 1000 * length + i))
        for i in range(n_codes):
            run.write(*run_code(demo, length, 15_000_000 + 1000 * length + i))
        run.say(f"{length} tokens")
    print(format_table(run.args.out))


if __name__ == "__main__":
    main()
