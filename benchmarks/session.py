"""How long until the first token of an answer: from a saved session, and by reading the text again?

    python benchmarks/session.py --lengths 2048,4096,8192 --runs 3

In: the demo model, recall texts. Out: a JSON line per length, medians over fresh processes that take turns; the clock
runs from the loaded model to the first token of the answer. The file is dropped from the system's cache before every
run; the bytes are those of all its reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from children import forget_files, run_script
from demo_texts import Demo, read, step
from rows import RESULTS, Row, Rows, format_rows, mib, read_rows
from runs import Recorder, make_parser, read_numbers

from farkv import InfiniGen, attach, load_cache
from farkv.hf.prompt import Prompt
from farkv.hf.session import resume

FACTS = 20


def write(folder: Path, length: int) -> Row:
    """Write a text, its question and its session."""
    demo = Demo()
    made, prompt, *_ = demo.make_recall(length, FACTS, length, spare=0)
    with attach(demo.model, InfiniGen(fraction=0.1)) as far:
        cache = read(far, prompt.text, tokens=prompt.n_tokens)
        cache.save(folder / "book.farkv", tokenizer=demo.tokenizer, text=made.text)
    (folder / "prompt.json").write_text(json.dumps([prompt.text, prompt.question]))
    return {"file_bytes": (folder / "book.farkv").stat().st_size}


def measure(folder: Path, arm: str) -> Row:
    """Return the seconds to the first token, the token, and the bytes that were read for it."""
    demo, path = Demo(), folder / "book.farkv"
    prompt = Prompt(*json.loads((folder / "prompt.json").read_text()))
    forget_files(path)
    with attach(demo.model, InfiniGen(fraction=0.1)) as far, torch.no_grad():
        before, started = count_read(), time.perf_counter()
        if arm == "session":
            cache = load_cache(path, demo.model, tokens=prompt.n_tokens + 8, tokenizer=demo.tokenizer)
            resume(cache, prompt.text)
        else:
            cache = read(far, prompt.text, tokens=prompt.n_tokens + 8)
        token = int(step(far, cache, prompt.question).argmax(-1))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "token": token, "bytes": count_read() - before, "tokens": prompt.n_tokens}


def count_read() -> int:
    """Return the bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def run_length(length: int, runs: int) -> Row:
    """Write a session, then let both arms take turns."""
    made: dict[str, Rows] = {"session": [], "again": []}
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = run_script(__file__, "--write", length, "--folder", folder)["file_bytes"]
        for i in range(runs):
            for arm in list(made)[:: 1 - 2 * (i % 2)]:
                made[arm].append(run_script(__file__, "--arm", arm, "--folder", folder))
    session, again = ([row["seconds"] for row in made[arm]] for arm in ("session", "again"))
    return {
        "model": "demo", "tokens": made["again"][0]["tokens"], "runs": runs,
        "session_s": statistics.median(session), "again_s": statistics.median(again),
        "ratio": statistics.median(a / s for a, s in zip(again, session, strict=True)),
        "least_ratio": min(again) / max(session), "file_bytes": n_bytes,
        "read_bytes": statistics.median(row["bytes"] for row in made["session"]),
        "same_token": len({row["token"] for rows in made.values() for row in rows}) == 1,
    }  # fmt: skip


def format_table(path: Path = RESULTS / "session.jsonl") -> str:
    """Return one Markdown row per length."""
    head = ["text", "first token from the session, s", "reading it again, s", "ratio", "of the file read", "same token"]
    return format_rows(
        head,
        ([f"{r['tokens']:,} tokens, a file of {mib(r['file_bytes'], 1)} MiB", f"{r['session_s']:.2f}",
          f"{r['again_s']:.2f}", f"{r['ratio']:.1f} x", f"{100 * r['read_bytes'] / r['file_bytes']:.0f} %",
          "yes" if r["same_token"] else "no"] for r in read_rows(path)),
    )  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, "session.jsonl")
    parser.add_argument("--lengths", default="2048,4096,8192", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--runs", default=3, type=int)
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.folder, args.arm) if args.arm else write(args.folder, args.write)))
        return
    run = Recorder(parser)
    for length in args.lengths:
        run.write(run_length(length, args.runs))
    print(format_table(args.out))


if __name__ == "__main__":
    main()
