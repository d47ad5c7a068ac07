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
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from eviction import ANSWER_TOKENS, CHUNK_TOKENS, Questions, ask_all, make_questions
from quality import percent, read_numbers, read_rows
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

from farkv.config import InfiniGen
from farkv.demo.filler import STDLIB, read_sources
from farkv.errors import CapacityError
from farkv.hf.ask import Listener, prefill
from farkv.hf.attach import attach
from farkv.hf.load import load_model, quiet_libraries
from farkv.methods.contract import Query, Step

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 32, 8, 64
TOKEN_BYTES = LAYERS * KV_HEADS * 2 * HEAD_DIM * 2
PASS_TOKENS = 2048
# Of the KV: what host memory may take.
HOST_SHARE = 0.25
PART_BYTES = 1 << 20
# Freed memory goes back to the system in all children alike, so that the resident set is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
READERS = 4
WAYS = ("farkv 0.10", "farkv 0.05", "torch.load", "mapped file")
QUALITY_LENGTHS = (2048, 4096, 8192)


# --- one way, in an interpreter of its own ------------------------------------------------------------------------


def attend_plainly(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
    """Attend with one query to all records, by matrix products in float32, a head at a time."""
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q[0, :, 0].float().view(kv_heads, heads // kv_heads, -1)
    rows = []
    for h in range(kv_heads):
        weights = (grouped[h] @ k[0, h].float().mT).mul_(scaling).softmax(-1)
        rows.append(weights @ v[0, h].float())
    return torch.cat(rows).to(q.dtype)[None, None], None


def make_model(tokens: int, attention: str) -> LlamaForCausalLM:
    """Make a random model whose KV has the shape of Llama-3.2-1B."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=256,
        vocab_size=1024,
        max_position_embeddings=2 * tokens,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def draw(heads: int, n: int) -> torch.Tensor:
    return torch.randn(1, heads, n, HEAD_DIM).to(torch.bfloat16)


class Farkv:
    """The context on disk, host memory of a quarter of its bytes."""

    def __init__(self, args: argparse.Namespace, folder: Path, model: LlamaForCausalLM):
        self.model = model
        self.limit = int(HOST_SHARE * args.tokens * TOKEN_BYTES)
        method = InfiniGen(fraction=float(args.child.split()[1]))
        self.far = attach(self.model, method, host=self.limit, disk=f"{folder}:64GiB", profile=False)
        self.cache = self.far.new_cache(tokens=args.tokens + 2 * args.steps + 8)
        recipe: Any = self.cache.recipe
        self.recipe = recipe
        for start in range(0, args.tokens, PASS_TOKENS):
            n = min(PASS_TOKENS, args.tokens - start)
            for layer in self.cache.layers:
                step = Step(Query(draw(HEADS, n), HEAD_DIM**-0.5, None), draw(KV_HEADS, n), draw(KV_HEADS, n), None)
                layer.update(step.k, step.v)
                recipe.observe(layer.layer, step)

    def forget(self) -> None:
        """Make the system forget what it has of the file."""
        self.recipe.store.frames.pages.file.drop_cached()

    def report(self) -> dict[str, Any]:
        """Return what the receipt says."""
        receipt, file = self.far.receipt(self.cache), self.recipe.store.frames.pages.file
        assert receipt.kv_bytes.host_peak <= self.limit
        kv = receipt.kv_bytes.total
        row = dict(host_limit=self.limit, host_peak=receipt.kv_bytes.host_peak, kv_bytes=kv,
                   frames=self.recipe.store.frames.room, pages=file.n_pages, page_bytes=file.page_bytes,
                   attended=receipt.read_fraction, index_peak=receipt.kv_bytes.index_peak,
                   disk_bytes=receipt.disk_bytes_per_token,
                   from_disk=receipt.disk_bytes_per_token / kv)  # fmt: skip
        # The same pages by plain system calls: what the disk itself can do.
        return row | measure_disk(file._fd, file.n_pages, file.page_bytes)


class Loaded:
    """A file per layer, loaded whole at every step; what is decoded stays in memory."""

    def __init__(self, args: argparse.Namespace, folder: Path, model: LlamaForCausalLM):
        self.model = model
        self.cache = DynamicCache(config=self.model.config)
        self.files = [folder / f"{i}.pt" for i in range(LAYERS)]
        for i, path in enumerate(self.files):
            torch.save((draw(KV_HEADS, args.tokens), draw(KV_HEADS, args.tokens)), path)
            self.cache.layers[i].get_seq_length = lambda *_, i=i: args.tokens + self.count_new(i)
            self.cache.layers[i].update = lambda k, v, *_, i=i, **__: self.update(i, k, v)
        self.new: list[list[tuple[Any, Any]]] = [[] for _ in range(LAYERS)]

    def count_new(self, i: int) -> int:
        return len(self.new[i])

    def update(self, i: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Give a layer's K and V, loaded now, with the new tokens."""
        self.new[i].append((k, v))
        old = torch.load(self.files[i])
        k, v = (torch.cat([part, *(pair[j] for pair in self.new[i])], 2) for j, part in enumerate(old))
        return k, v

    def forget(self) -> None:
        """Make the system forget what it has of the files."""
        forget_files(self.files)

    def report(self) -> dict[str, Any]:
        """Return what every step reads."""
        size = sum(path.stat().st_size for path in self.files)
        return dict(kv_bytes=size, attended=1.0, disk_bytes=size, from_disk=1.0)


class Mapped:
    """A file per layer, mapped into memory; attention reads it in place, and new tokens are written to it."""

    def __init__(self, args: argparse.Namespace, folder: Path, model: LlamaForCausalLM):
        self.model = model
        self.cache = DynamicCache(config=self.model.config)
        self.files = [folder / f"{i}.bin" for i in range(LAYERS)]
        self.shape = (2, 1, KV_HEADS, args.tokens + 2 * args.steps + 8, HEAD_DIM)
        self.lengths = [args.tokens] * LAYERS
        self.tensors: list[Any] = []
        for path in self.files:
            self.open([path])
            for part in self.tensors.pop():
                part[:, :, : args.tokens] = draw(KV_HEADS, args.tokens)
        self.open(self.files)
        for i in range(LAYERS):
            self.cache.layers[i].get_seq_length = lambda *_, i=i: self.lengths[i]
            self.cache.layers[i].update = lambda k, v, *_, i=i, **__: self.update(i, k, v)

    def open(self, paths: list[Path]) -> None:
        size = torch.Size(self.shape).numel()
        self.tensors = [
            torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).view(self.shape) for path in paths
        ]

    def update(self, i: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Write the new token, give all in place."""
        n = self.lengths[i]
        self.lengths[i] = n + 1
        for part, new in zip(self.tensors[i], (k, v), strict=True):
            part[:, :, n : n + 1] = new
        return self.tensors[i][0][:, :, : n + 1], self.tensors[i][1][:, :, : n + 1]

    def forget(self) -> None:
        """Make the system forget: mapped pages cannot be dropped, so the files are mapped anew."""
        self.tensors = []
        forget_files(self.files)
        self.open(self.files)

    def report(self) -> dict[str, Any]:
        """Return what every step reads."""
        size = sum(path.stat().st_size for path in self.files)
        return dict(kv_bytes=size, attended=1.0, disk_bytes=size, from_disk=1.0)


def forget_files(paths: list[Path]) -> None:
    """Write files to the disk and make the system forget its copies."""
    for path in paths:
        fd = os.open(path, os.O_RDWR)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure_disk(fd: int, n_pages: int, page_bytes: int) -> dict[str, float]:
    """Return the bytes per second of cold reads of a file's pages, in order and at random."""
    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    n_parts = n_pages * page_bytes // PART_BYTES
    torch.manual_seed(1)
    n_random = min(n_pages, 4096)
    random = (torch.randperm(n_pages)[:n_random] * page_bytes).tolist()
    buffers = [bytearray(PART_BYTES) for _ in range(READERS)]

    def read(reader: int, places: list[int], size: int) -> None:
        for place in places[reader::READERS]:
            os.preadv(fd, [memoryview(buffers[reader])[:size]], place)

    found = {}
    for name, places, size in (
        ("in_order", [i * PART_BYTES for i in range(n_parts)], PART_BYTES),
        ("at_random", random, page_bytes),
    ):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM if name == "at_random" else os.POSIX_FADV_SEQUENTIAL)
        started = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda r, p=places, s=size: read(r, p, s), range(READERS)))
        found[f"disk_{name}"] = len(places) * size / (time.perf_counter() - started)
    os.close(fd)
    return found


def read_memory() -> dict[str, int]:
    """Return the resident set, its peak, and the part of it that is no file's, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


def forget_peak() -> None:
    """Let the resident set's peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def run_child(args: argparse.Namespace) -> None:
    """Make a context, then take a step for every line that comes in: `cold`, `warm`; `report` ends it."""
    torch.set_num_threads(1)
    quiet_libraries()
    make = {"farkv": Farkv, "torch.load": Loaded, "mapped": Mapped}[args.child.split()[0]]
    AttentionInterface.register("plain", attend_plainly)
    model = make_model(args.tokens, "sdpa" if make is Farkv else "plain")
    model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    forget_peak()
    before = read_memory()
    started = time.perf_counter()
    way = make(args, Path(args.folder), model)
    filled_s, filled = time.perf_counter() - started, read_memory()
    memory: dict[str, int] = {}
    forget_peak()
    print("ready", flush=True)
    for n, line in enumerate(sys.stdin):
        kind = line.strip()
        if kind == "report":
            print(
                json.dumps(
                    {"before": before, "filled": filled, "memory": memory, "filled_s": filled_s, **way.report()}
                ),
                flush=True,
            )
            return
        if kind == "cold":
            way.forget()
        at = torch.tensor([[args.tokens + n]])
        started = time.perf_counter()
        ids = torch.tensor([[n % 1024]])
        way.model(input_ids=ids, past_key_values=way.cache, position_ids=at, use_cache=True)
        print(time.perf_counter() - started, flush=True)
        # Before the files are read again for the disk's own speed.
        memory = read_memory()


# --- all ways -----------------------------------------------------------------------------------------------------


class Child:
    """One way in its interpreter, stepped from here."""

    def __init__(self, name: str, tokens: int, args: argparse.Namespace):
        self.name, self.times = name, {"cold": [], "warm": []}
        self.folder = tempfile.mkdtemp(prefix="farkv-disk-", dir=args.folder or None)
        command = [sys.executable, __file__, "--child", name, "--folder", self.folder]
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
    """Parse the command line; run everything, or be one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/disk.jsonl")
    parser.add_argument("--tasks", default="traffic,quality", type=lambda text: text.split(","))
    parser.add_argument("--add", action="store_true", help="add to the results file")
    parser.add_argument("--lengths", default="16384", type=read_numbers, help="tokens, by commas")
    parser.add_argument("--steps", default=4, type=int, help="decode steps, cold and again warm")
    parser.add_argument("--prompts", default=2, type=int, help="texts of every length for the quality part")
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda text: text.split(","))
    parser.add_argument("--folder", default="", help="where the files go; default: the system's temporary folder")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", default=0, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args)
        return
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
