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
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from children import return_freed, start_script
from demo_texts import ANSWER_TOKENS, Demo, Questions, ask_all, read, same, step
from disk_ways import HOST_SHARE
from rows import RESULTS, Row, Rows, format_rows, group, mean, mib, percent, read_rows
from runs import Recorder, find_versions, make_parser, read_names, read_numbers

from farkv import InfiniGen, attach
from farkv.errors import CapacityError

ENVIRONMENT = return_freed(1 << 20) | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
WAYS = ("farkv 0.10", "farkv 0.05", "torch.load", "mapped file")
QUALITY_LENGTHS = (2048, 4096, 8192)
CHUNK_TOKENS = 256


class Child:
    """One way in its interpreter, stepped from here."""

    def __init__(self, name: str, tokens: int, folder: str, steps: int):
        self.name = name
        self.times: dict[str, list[float]] = {"cold": [], "warm": []}
        options = ("--child", name, "--folder", folder, "--tokens", tokens, "--steps", steps)
        self.process = start_script(Path(__file__).with_name("disk_ways.py"), *options, env=ENVIRONMENT)
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


def run_traffic(tokens: int, args: argparse.Namespace) -> Rows:
    """Take the ways' steps in turn."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="farkv-disk-", dir=args.folder or None) as folder:
        folders = {name: Path(folder) / str(i) for i, name in enumerate(args.ways)}
        for path in folders.values():
            path.mkdir()
        children = [Child(name, tokens, str(path), args.steps) for name, path in folders.items()]
        for kind in ("cold", "warm"):
            for i in range(-1, args.steps):
                for child in children:
                    seconds = float(child.tell(kind))
                    # The first of each kind is not counted.
                    if i >= 0:
                        child.times[kind].append(seconds)
        for child in children:
            row = {"task": "traffic", "way": child.name, "tokens": tokens, "steps": args.steps}
            row |= json.loads(child.tell("report"))
            child.process.wait()
            row |= {f"{kind}_s": statistics.median(times) for kind, times in child.times.items()}
            row |= {f"{kind}_all": times for kind, times in child.times.items()}
            rows.append(row | {"versions": find_versions()})
    return rows


def run_quality(args: argparse.Namespace) -> Iterator[Row]:
    """Ask the demo model about the same texts, with all records in memory and with most of them on disk."""
    demo = Demo()
    for length in QUALITY_LENGTHS:
        for seed in range(args.prompts):
            asked = demo.make_questions(length, 13_000_000 + 1000 * length + seed)
            limit = int(HOST_SHARE * demo.token_bytes * len(asked.text))
            row = dict(task="quality", length=length, seed=seed, host_limit=limit)
            try:
                with tempfile.TemporaryDirectory(prefix="farkv-disk-", dir=args.folder or None) as folder:
                    yield row | ask_over_disk(demo, asked, limit, folder)
            except CapacityError as error:
                yield row | dict(refused=True, why=str(error))
                break


def ask_over_disk(demo: Demo, asked: Questions, limit: int, folder: str) -> Row:
    """Ask all questions of a text with a disk and without."""
    n = len(asked.text) + max(map(len, asked.questions)) + ANSWER_TOKENS
    with attach(demo.model, InfiniGen(fraction=0.10), host=limit, disk=f"{folder}:1GiB") as far:
        cache = read(far, asked.text, CHUNK_TOKENS, tokens=n, chunk_tokens=CHUNK_TOKENS)
        got = ask_all(far, cache, asked.questions)
        step(far, cache, asked.questions[0])
        receipt = far.receipt(cache)
    assert receipt.kv_bytes.host_peak <= limit
    with attach(demo.model, InfiniGen(fraction=0.10)) as far:
        plain = ask_all(far, read(far, asked.text, CHUNK_TOKENS), asked.questions)
    return dict(refused=False, agrees=same(got, plain), right=same(got, asked.answers),
                plain_right=same(plain, asked.answers), host_peak=receipt.kv_bytes.host_peak,
                disk_bytes=receipt.disk_bytes_per_token, kv_bytes=receipt.kv_bytes.total)  # fmt: skip


def format_table(path: Path = RESULTS / "disk.jsonl") -> str:
    """Return one Markdown row per way and length, and what the disk itself can do."""
    rows, lines, notes = read_rows(path, task="traffic"), [], []
    head = ["way", "attended", "from disk", "both", "MiB from disk per token"]
    head += ["s/token cold", "s/token warm", "memory over the model, MiB", "of the host limit"]
    for r in rows:
        ours = "host_limit" in r
        peaks = [r[name]["VmHWM"] - r["before"]["VmRSS"] for name in ("filled", "memory")]
        rise = max(peaks) if ours else peaks[1]
        cells = [f"{r['way']}, {r['tokens'] // 1024} K tokens", f"{r['attended']:.3f}", f"{r['from_disk']:.3f}"]
        cells += [f"{r['attended'] + r['from_disk']:.3f}" if ours else "1", mib(r["disk_bytes"], 1)]
        cells += [f"{r['cold_s']:.3f}", f"{r['warm_s']:.3f}", mib(rise)]
        lines.append([*cells, f"{rise / r['host_limit']:.2f}" if ours else ""])
    for _, mine in sorted(group(rows, "tokens").items()):
        found = {r["way"]: r for r in mine}
        notes += [format_ratios(found, name) for name in WAYS if name.startswith("farkv") and name in found]
    return format_rows(head, lines, *notes)


def format_ratios(rows: dict[str, Row], name: str) -> str:
    """Say how one of our ways compares with the baselines, and with the disk."""
    ours = rows[name]
    parts = [
        f"{rows[way][f'{kind}_s'] / ours[f'{kind}_s']:.1f} x {way} {kind}"
        for way in WAYS[2:]
        for kind in ("cold", "warm")
        if way in rows
    ]
    rate, random, in_order = ours["disk_bytes"] / ours["cold_s"], ours["disk_at_random"], ours["disk_in_order"]
    return (
        f"* {name}, {ours['tokens'] // 1024} K tokens: speed {', '.join(parts)}; {mib(rate)} MiB/s of cold steps "
        f"are {rate / random:.0%} of what the disk gives at random ({mib(random)}"
        f" MiB/s) and {rate / in_order:.0%} of what it gives in order ({mib(in_order)} MiB/s)."
    )


def format_quality(path: Path = RESULTS / "disk.jsonl") -> str:
    """Return one Markdown row per length: answers with the disk against answers without."""
    head = ["context", "questions", "same answer with the disk", "where that is right", "right with / without"]
    lines = []
    for length, mine in sorted(group(read_rows(path, task="quality"), "length").items()):
        cells = [f"{length // 1024} K tokens, host limit {mib(mine[0]['host_limit'], 1)} MiB"]
        if any(r["refused"] for r in mine):
            lines.append([*cells, "refused before the prompt was read"])
            continue
        agrees, right, plain = ([x for r in mine for x in r[key]] for key in ("agrees", "right", "plain_right"))
        good = percent(a for a, b in zip(agrees, plain, strict=True) if b)
        cells += [str(len(agrees)), percent(agrees), good, f"{percent(right)} / {percent(plain)}"]
        lines.append([*cells, f"{mean(r['disk_bytes'] / r['kv_bytes'] for r in mine):.3f}"])
    return format_rows([*head, "from disk per token, of the KV"], lines)


def main() -> None:
    parser = make_parser(__doc__, "disk.jsonl")
    parser.add_argument("--tasks", default="traffic,quality", type=read_names)
    parser.add_argument("--lengths", default="16384", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--steps", default=4, type=int, help="decode steps, cold and again warm")
    parser.add_argument("--prompts", default=2, type=int, help="texts of every length for the quality part")
    parser.add_argument("--ways", default=",".join(WAYS), type=read_names)
    parser.add_argument("--folder", default="", help="where the files go; default: the system's temporary folder")
    run = Recorder(parser)
    for row in run_quality(run.args) if "quality" in run.args.tasks else ():
        run.write(row)
    for tokens in run.args.lengths if "traffic" in run.args.tasks else ():
        run.write(*run_traffic(tokens, run.args))
    print(format_table(run.args.out), format_quality(run.args.out), sep="\n\n")


if __name__ == "__main__":
    main()
