"""One way to decode over KV on disk, in an interpreter of its own: a step for every line that comes in.

Started by disk.py, which says what is measured and how. In: `cold`, `warm` or `report`, a line each. Out: the seconds
of the step, or a JSON object that ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

from farkv.hf.attach import attach
from farkv.hf.load import quiet_libraries
from farkv.methods import InfiniGen
from farkv.methods.contract import Query, Step

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 32, 8, 64
TOKEN_BYTES = LAYERS * KV_HEADS * 2 * HEAD_DIM * 2
PASS_TOKENS = 2048
# Of the KV: what host memory may take.
HOST_SHARE = 0.25
PART_BYTES = 1 << 20
READERS = 4


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


def main() -> None:
    """Parse the command line and be one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", required=True, help="the way's name")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--tokens", required=True, type=int)
    parser.add_argument("--steps", required=True, type=int)
    run_child(parser.parse_args())


if __name__ == "__main__":
    main()
