"""How long until the first token of an answer: from a saved session, and by reading the text again?

    python benchmarks/session.py --out benchmarks/results/session.jsonl

In: the demo model, recall texts. Out: a JSON line per length, medians over fresh processes that take turns; the clock
runs from the loaded model to the first token of the answer. The file is dropped from the system's cache before every
run; the bytes are those of all its reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import make_recall_prompt
from farkv.hf.ask import Listener, Prompt, build_prompt, feed, prefill
from farkv.hf.attach import attach
from farkv.hf.load import load_model, quiet_libraries
from farkv.hf.session import load_cache, resume
from farkv.methods import InfiniGen

FACTS, FACT_TOKENS = 20, 14


def write(folder: Path, length: int) -> None:
    """Write a text, its question and its session."""
    model, tokenizer = load_model("demo", device="cpu")
    filler = draw_filler(
        read_sources(STDLIB, held_out=True),
        length - FACT_TOKENS * FACTS,
        length,
        lambda s: len(tokenizer(s)["input_ids"]),
    )
    made = make_recall_prompt(filler, FACTS, length)
    prompt = build_prompt(tokenizer, made.text, made.question)
    with attach(model, InfiniGen(fraction=0.1)) as far, torch.no_grad():
        cache = far.new_cache(tokens=prompt.n_tokens)
        prefill(far, cache, prompt.text, None, Listener())
        cache.save(folder / "book.farkv", tokenizer=tokenizer, text=made.text)
    (folder / "prompt.json").write_text(json.dumps([prompt.text, prompt.question]))


def measure(folder: Path, arm: str) -> dict[str, Any]:
    """Return the seconds to the first token, the token, and the bytes that were read for it."""
    model, tokenizer = load_model("demo", device="cpu")
    prompt, path = Prompt(*json.loads((folder / "prompt.json").read_text())), folder / "book.farkv"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with attach(model, InfiniGen(fraction=0.1)) as far, torch.no_grad():
        before, started = count_read(), time.perf_counter()
        if arm == "session":
            cache = load_cache(path, model, tokens=prompt.n_tokens + 8, tokenizer=tokenizer)
            resume(cache, prompt.text)
        else:
            cache = far.new_cache(tokens=prompt.n_tokens + 8)
            prefill(far, cache, prompt.text, None, Listener())
        logits = feed(far, cache, prompt.question)
        assert logits is not None
        token = int(logits.argmax(-1))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "token": token, "bytes": count_read() - before, "tokens": prompt.n_tokens}


def count_read() -> int:
    """Return the bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def run(length: int, runs: int) -> dict[str, Any]:
    """Write a session, then let both arms take turns."""
    made: dict[str, list[dict[str, Any]]] = {"session": [], "again": []}
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, __file__, "--write", str(length), "--folder", name], check=True)
        for i in range(runs):
            for arm in list(made)[:: 1 - 2 * (i % 2)]:
                call = [sys.executable, __file__, "--arm", arm, "--folder", name]
                done = subprocess.run(call, check=True, capture_output=True, text=True)
                made[arm].append(json.loads(done.stdout.splitlines()[-1]))
        n_bytes = (Path(name) / "book.farkv").stat().st_size
    session, again = ([row["seconds"] for row in made[arm]] for arm in ("session", "again"))
    read = statistics.median(row["bytes"] for row in made["session"])
    return {
        "model": "demo", "tokens": made["again"][0]["tokens"], "runs": runs,
        "session_s": statistics.median(session), "again_s": statistics.median(again),
        "ratio": statistics.median(a / s for a, s in zip(again, session, strict=True)),
        "least_ratio": min(again) / max(session), "file_bytes": n_bytes, "read_bytes": read,
        "same_token": len({row["token"] for rows in made.values() for row in rows}) == 1,
    }  # fmt: skip


def format_table(path: Path) -> str:
    """Return one Markdown row per length."""
    names = [
        "text",
        "first token from the session, s",
        "reading it again, s",
        "ratio",
        "of the file read",
        "same token",
    ]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in (json.loads(line) for line in path.read_text().splitlines()):
        share = 100 * row["read_bytes"] / row["file_bytes"]
        lines.append(
            f"| {row['tokens']:,} tokens, a file of {row['file_bytes'] / 2**20:.1f} MiB | {row['session_s']:.2f} | "
            f"{row['again_s']:.2f} | {row['ratio']:.1f} x | {share:.0f} % | {'yes' if row['same_token'] else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/session.jsonl")
    parser.add_argument("--lengths", default="2048,4096,8192", help="tokens, by commas")
    parser.add_argument("--runs", default=3, type=int)
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    if args.write:
        write(args.folder, args.write)
    elif args.arm:
        print(json.dumps(measure(args.folder, args.arm)))
    else:
        rows = [run(int(n), args.runs) for n in args.lengths.split(",")]
        Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(format_table(Path(args.out)))


if __name__ == "__main__":
    main()
