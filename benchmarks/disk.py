"""What does a context on disk cost? Bytes and time per token where the KV is four times the host limit.

    python benchmarks/disk.py
    python benchmarks/disk.py --lengths 16384 --steps 4 --prompts 0

Two parts in one file of results:
  traffic  Three ways to decode over KV that host memory has no room for, each in an interpreter of its own, their steps
           interleaved: farkv with a disk and a host limit of a quarter of the KV; every layer's K and V loaded with
           torch.load at each step; every layer's K and V attended to in a mapped file. `cold`: the system's copies of
           the files are dropped before each step. `warm`: they may stay. The same file is then read in order and at
           random, cold, with plain system calls: the disk's own bandwidth.
  quality  The demo model: does the answer change when records go through the disk? The same method with and without.

Traffic is measured on a random model whose KV has the shape of Llama-3.2-1B (16 layers, 8 KV heads, 32 query heads,
head dimension 64, bfloat16); hidden size and MLP are 256, so what is timed is the KV and little else. Its context is
not read but filled in, pass by pass, with random keys and values: storing, paging and indexing run as they do for a
prompt, only the dense attention over it, which would take an hour here, is left out. Keys and queries are random, so
successive queries have next to nothing in common: no page is favoured, and the share of reads that a copy in host
memory serves is about the share of copies. Trained models are kinder. The traffic is therefore near the worst case,
and says nothing of quality. The baselines attend with matrix products in float32, a head at a time: for one
bfloat16 query on a CPU torch's fused attention, and its bfloat16 products, are many times slower.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from disk_ways import HOST_SHARE
from eviction import ANSWER_TOKENS, CHUNK_TOKENS, Questions, ask_all, make_questions
from quality import percent, read_numbers, read_rows

from farkv.demo.filler import STDLIB, read_sources
from farkv.errors import CapacityError
from farkv.hf.ask import Listener, prefill
from farkv.hf.attach import attach
from farkv.hf.load import load_model, quiet_libraries
from farkv.methods import InfiniGen

# Freed memory goes back to the system in all children alike, so that the resident set is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
WAYS = ("farkv 0.10", "farkv 0.05", "torch.load", "mapped file")
QUALITY_LENGTHS = (2048, 4096, 8192)


class Child:
    """One way in its interpreter, stepped from here."""

    def __init__(self, name: str, tokens: int, args: argparse.Namespace):
        self.name, self.times = name, {"cold": [], "warm": []}
        self.folder = tempfile.mkdtemp(prefix="farkv-disk-", dir=args.folder or None)
        command = [
            sys.executable,
            str(Path(__file__).with_name("disk_ways.py")),
            "--child",
            name,
            "--folder",
            self.folder,
        ]
        command += ["--tokens", str(tokens), "--steps", str(args.steps)]
        environment = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the child ended")
        return line

    def tell(self, text: str) -> str:
        """Send a line, return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> dict[str, Any]:
        """Return what it measured, and remove its files."""
        row = json.loads(self.tell("report"))
        self.process.wait()
        shutil.rmtree(self.folder)
        return row


def run_traffic(tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Take the ways' steps in turn."""
    children = [Child(name, tokens, args) for name in args.ways]
    for kind, n in (("cold", args.steps), ("warm", args.steps)):
        for i in range(-1, n):
            for child in children:
                seconds = float(child.tell(kind))
                # The first of each kind is not counted.
                if i >= 0:
                    child.times[kind].append(seconds)
    rows = []
    for child in children:
        row = {"task": "traffic", "way": child.name, "tokens": tokens, "steps": args.steps, **child.end()}
        row |= {f"{kind}_s": statistics.median(times) for kind, times in child.times.items()}
        row |= {f"{kind}_all": times for kind, times in child.times.items()}
        rows.append(row | {"versions": {"torch": torch.__version__, "python": platform.python_version()}})
    return rows


def run_quality(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Ask the demo model about the same texts, with all records in memory and with most of them on disk."""
    quiet_libraries()
    torch.set_num_threads(1)
    model, tokenizer = load_model("demo", device="cpu")
    sources = read_sources(STDLIB, held_out=True)
    for length in QUALITY_LENGTHS:
        for seed in range(args.prompts):
            asked = make_questions(tokenizer, sources, length, 13_000_000 + 1000 * length + seed)
            limit = int(HOST_SHARE * 8 * 2 * 32 * 2 * 4 * len(asked.text))
            row = dict(task="quality", length=length, seed=seed, host_limit=limit)
            folder = tempfile.mkdtemp(prefix="farkv-disk-", dir=args.folder or None)
            try:
                yield [row | ask_over_disk(model, asked, limit, folder)]
            except CapacityError as error:
                yield [row | dict(refused=True, why=str(error))]
                break
            finally:
                shutil.rmtree(folder)


def ask_over_disk(model: Any, asked: Questions, limit: int, folder: str) -> dict[str, Any]:
    """Ask all questions of a text with a disk and without."""
    n = len(asked.text) + max(map(len, asked.questions)) + ANSWER_TOKENS
    with attach(model, InfiniGen(fraction=0.10), host=limit, disk=f"{folder}:1GiB") as far:
        cache = far.new_cache(tokens=n, chunk_tokens=CHUNK_TOKENS)
        prefill(far, cache, asked.text, CHUNK_TOKENS, Listener())
        got = ask_all(far, cache, asked.questions)
        for token in asked.questions[0]:
            far.model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        receipt = far.receipt(cache)
    assert receipt.kv_bytes.host_peak <= limit
    with attach(model, InfiniGen(fraction=0.10)) as far:
        cache = far.new_cache()
        prefill(far, cache, asked.text, CHUNK_TOKENS, Listener())
        plain = ask_all(far, cache, asked.questions)
    return dict(refused=False, agrees=[a == b for a, b in zip(got, plain, strict=True)],
                right=[a == b for a, b in zip(got, asked.answers, strict=True)],
                plain_right=[a == b for a, b in zip(plain, asked.answers, strict=True)],
                host_peak=receipt.kv_bytes.host_peak, disk_bytes=receipt.disk_bytes_per_token,
                kv_bytes=receipt.kv_bytes.total)  # fmt: skip


def format_table(path: Path) -> str:
    """Return one Markdown row per way and length, and what the disk itself can do."""
    rows = [r for r in read_rows(path) if r["task"] == "traffic"]
    head = ["way", "attended", "from disk", "both", "MiB from disk per token"]
    head += ["s/token cold", "s/token warm", "memory over the model, MiB", "of the host limit"]
    lines, notes = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for r in rows:
        cells = [f"{r['way']}, {r['tokens'] // 1024} K tokens", f"{r['attended']:.3f}", f"{r['from_disk']:.3f}"]
        ours = "host_limit" in r
        cells += [f"{r['attended'] + r['from_disk']:.3f}" if ours else "1"]
        cells += [f"{r['disk_bytes'] / 2**20:,.1f}", f"{r['cold_s']:.3f}", f"{r['warm_s']:.3f}"]
        peaks = [r[name]["VmHWM"] - r["before"]["VmRSS"] for name in ("filled", "memory")]
        rise = max(peaks) if ours else peaks[1]
        cells += [f"{rise / 2**20:,.0f}", f"{rise / r['host_limit']:.2f}" if ours else ""]
        lines.append(f"| {' | '.join(cells)} |")
    for tokens in sorted({r["tokens"] for r in rows}):
        mine = {r["way"]: r for r in rows if r["tokens"] == tokens}
        for name in (way for way in WAYS if way.startswith("farkv") and way in mine):
            notes.append(format_ratios(mine, name))
    return "\n".join([*lines, "", *notes])


def format_ratios(rows: dict[str, dict[str, Any]], name: str) -> str:
    """Say how one of our ways compares with the baselines, and with the disk."""
    ours = rows[name]
    parts = [
        f"{rows[way][f'{kind}_s'] / ours[f'{kind}_s']:.1f} x {way} {kind}"
        for way in WAYS[2:]
        for kind in ("cold", "warm")
        if way in rows
    ]
    rate, mib = ours["disk_bytes"] / ours["cold_s"], 2**20
    return (
        f"* {name}, {ours['tokens'] // 1024} K tokens: speed {', '.join(parts)}; {rate / mib:,.0f} MiB/s of cold steps "
        f"are {rate / ours['disk_at_random']:.0%} of what the disk gives at random ({ours['disk_at_random'] / mib:,.0f}"
        f" MiB/s) and {rate / ours['disk_in_order']:.0%} of what it gives in order "
        f"({ours['disk_in_order'] / mib:,.0f} MiB/s)."
    )


def format_quality(path: Path) -> str:
    """Return one Markdown row per length: answers with the disk against answers without."""
    rows = [r for r in read_rows(path) if r["task"] == "quality"]
    lines = [
        "| context | questions | same answer with the disk | where that is right | right with / without "
        "| from disk per token, of the KV |",
        "|---" * 6 + "|",
    ]
    for length in sorted({r["length"] for r in rows}):
        mine = [r for r in rows if r["length"] == length]
        name = f"{length // 1024} K tokens, host limit {mine[0]['host_limit'] / 2**20:.1f} MiB"
        if any(r["refused"] for r in mine):
            lines.append(f"| {name} | refused before the prompt was read | | | | |")
            continue
        agrees, right, plain = ([x for r in mine for x in r[key]] for key in ("agrees", "right", "plain_right"))
        disk = statistics.fmean(r["disk_bytes"] / r["kv_bytes"] for r in mine)
        good = percent(a for a, b in zip(agrees, plain, strict=True) if b)
        cells = [name, str(len(agrees)), percent(agrees), good, f"{percent(right)} / {percent(plain)}", f"{disk:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/disk.jsonl")
    parser.add_argument("--tasks", default="traffic,quality", type=lambda text: text.split(","))
    parser.add_argument("--add", action="store_true", help="add to the results file")
    parser.add_argument("--lengths", default="16384", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--steps", default=4, type=int, help="decode steps, cold and again warm")
    parser.add_argument("--prompts", default=2, type=int, help="texts of every length for the quality part")
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda text: text.split(","))
    parser.add_argument("--folder", default="", help="where the files go; default: the system's temporary folder")
    args = parser.parse_args()
    out = Path(args.out)
    if not args.add:
        out.write_text("")
    lengths = args.lengths if "traffic" in args.tasks else []
    quality = run_quality(args) if "quality" in args.tasks else []
    parts = itertools.chain(quality, (run_traffic(tokens, args) for tokens in lengths))
    for rows in parts:
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(format_table(out), format_quality(out), sep="\n\n")


if __name__ == "__main__":
    main()
