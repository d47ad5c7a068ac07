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
from children import forget_files, forget_peak, read_memory
from random_models import make_llama
from runs import time_call
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM

from farkv import InfiniGen, attach
from farkv.hf.load import quiet_libraries
from farkv.math.logits import Logits
from farkv.math.step import Query, Step

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 32, 8, 64
# The KV's shape is that of Llama-3.2-1B.
SHAPE = dict(layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden=256, mlp=256, vocabulary=1024)
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
        self.engine = self.cache.engine
        self.engine.announce_prompt(args.tokens, PASS_TOKENS)
        for start in range(0, args.tokens, PASS_TOKENS):
            n = min(PASS_TOKENS, args.tokens - start)
            for layer in self.cache.layers:
                step = Step(Query(draw(HEADS, n), Logits(HEAD_DIM**-0.5)), draw(KV_HEADS, n), draw(KV_HEADS, n), None)
                layer.update(step.k, step.v)
                self.engine.selector.observe(self.engine.records[layer.layer], step)

    def forget(self) -> None:
        """Make the system forget what it has of the file."""
        self.engine.store.page_cache.pages.file.drop_cached()

    def report(self) -> dict[str, Any]:
        """Return what the receipt says."""
        receipt, file = self.far.receipt(self.cache), self.engine.store.page_cache.pages.file
        assert receipt.kv_bytes.host_peak <= self.limit
        kv = receipt.kv_bytes.total
        row = dict(host_limit=self.limit, host_peak=receipt.kv_bytes.host_peak, kv_bytes=kv,
                   frames=self.engine.store.page_cache.room, pages=file.n_pages, page_bytes=file.page_bytes,
                   attended=receipt.read_fraction, index_peak=receipt.kv_bytes.index_peak,
                   disk_bytes=receipt.disk_bytes_per_token,
                   from_disk=receipt.disk_bytes_per_token / kv)  # fmt: skip
        # The same pages by plain system calls: what the disk itself can do.
        return row | measure_disk(file._fd, file.n_pages, file.page_bytes)


class Baseline:
    """A file per layer; Hugging Face's cache, whose layers take their K and V from it."""

    suffix = ""

    def __init__(self, args: argparse.Namespace, folder: Path, model: LlamaForCausalLM):
        self.model, self.cache, self.tokens = model, DynamicCache(config=model.config), args.tokens
        self.files = [folder / f"{i}{self.suffix}" for i in range(LAYERS)]
        self.lengths = [args.tokens] * LAYERS
        for i, layer in enumerate(self.cache.layers):
            layer.get_seq_length = lambda *_, i=i: self.lengths[i]
            layer.update = lambda k, v, *_, i=i, **__: self.update(i, k, v)
        self.fill(args.tokens + 2 * args.steps + 8)

    def fill(self, room: int) -> None:
        raise NotImplementedError

    def update(self, i: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Give a layer's K and V with the new token."""
        raise NotImplementedError

    def forget(self) -> None:
        """Make the system forget what it has of the files."""
        forget_files(*self.files)

    def report(self) -> dict[str, Any]:
        """Return what every step reads."""
        size = sum(path.stat().st_size for path in self.files)
        return dict(kv_bytes=size, attended=1.0, disk_bytes=size, from_disk=1.0)


class Loaded(Baseline):
    """Every file is loaded whole at every step; what is decoded stays in memory."""

    suffix = ".pt"

    def fill(self, room: int) -> None:
        for path in self.files:
            torch.save((draw(KV_HEADS, self.tokens), draw(KV_HEADS, self.tokens)), path)
        self.new: list[list[tuple[Any, Any]]] = [[] for _ in range(LAYERS)]

    def update(self, i: int, k: Any, v: Any) -> tuple[Any, Any]:
        self.new[i].append((k, v))
        self.lengths[i] += 1
        k, v = (
            torch.cat([part, *(pair[j] for pair in self.new[i])], 2) for j, part in enumerate(torch.load(self.files[i]))
        )
        return k, v


class Mapped(Baseline):
    """Every file is mapped into memory; attention reads it in place, and new tokens are written to it."""

    suffix = ".bin"

    def fill(self, room: int) -> None:
        self.shape = torch.Size((2, 1, KV_HEADS, room, HEAD_DIM))
        for path in self.files:
            for part in self.map(path):
                part[:, :, : self.tokens] = draw(KV_HEADS, self.tokens)
        self.tensors = [self.map(path) for path in self.files]

    def map(self, path: Path) -> torch.Tensor:
        return torch.from_file(str(path), shared=True, size=self.shape.numel(), dtype=torch.bfloat16).view(self.shape)

    def update(self, i: int, k: Any, v: Any) -> tuple[Any, Any]:
        n = self.lengths[i]
        self.lengths[i] = n + 1
        for part, new in zip(self.tensors[i], (k, v), strict=True):
            part[:, :, n : n + 1] = new
        return self.tensors[i][0][:, :, : n + 1], self.tensors[i][1][:, :, : n + 1]

    def forget(self) -> None:
        """Mapped pages cannot be dropped, so the files are mapped anew."""
        self.tensors = []
        super().forget()
        self.tensors = [self.map(path) for path in self.files]


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


@torch.no_grad()
def run_child(args: argparse.Namespace) -> None:
    """Make a context, then take a step for every line that comes in: `cold`, `warm`; `report` ends it."""
    torch.set_num_threads(1)
    quiet_libraries()
    kind = {"farkv": Farkv, "torch.load": Loaded, "mapped": Mapped}[args.child.split()[0]]
    AttentionInterface.register("plain", attend_plainly)
    attention = "sdpa" if kind is Farkv else "plain"
    model = make_llama(2 * args.tokens, torch.bfloat16, **SHAPE, attn_implementation=attention)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    forget_peak()
    row: dict[str, Any] = {"before": read_memory()}
    row["filled_s"], way = time_call(lambda: kind(args, Path(args.folder), model))
    row["filled"] = read_memory()
    forget_peak()
    print("ready", flush=True)
    for n, line in enumerate(sys.stdin):
        if line.strip() == "report":
            print(json.dumps(row | way.report()), flush=True)
            return
        if line.strip() == "cold":
            way.forget()
        step = dict(input_ids=torch.tensor([[n % 1024]]), position_ids=torch.tensor([[args.tokens + n]]))
        print(time_call(lambda s=step: way.model(past_key_values=way.cache, use_cache=True, **s))[0], flush=True)
        # Before the files are read again for the disk's own speed.
        row["memory"] = read_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in {"child": str, "folder": str, "tokens": int, "steps": int}.items():
        parser.add_argument(f"--{name}", required=True, type=kind)
    run_child(parser.parse_args())


if __name__ == "__main__":
    main()
