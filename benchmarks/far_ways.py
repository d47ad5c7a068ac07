"""One way to decode over KV that memory cannot hold, in an interpreter of its own: a turn of steps for every line in.

Started by far.py. In: `turn` or `report`, a line each. Out: the seconds of each step, as JSON; what the run was.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from children import forget_files, forget_peak, read_memory
from random_models import make_llama
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM

from farkv import InfiniGen, attach
from farkv.hf.load import quiet_libraries
from farkv.kernels.native import Native, Rows, load_native
from farkv.math.logits import Logits
from farkv.math.step import Query, Step
from farkv.store.far.quantize import Codec

SHAPES = {
    # Hidden size and MLP are small: what is timed is the KV and little else.
    "llama-3.2-1b": dict(layers=16, heads=32, kv_heads=8, head_dim=64, hidden=64),
    "qwen2.5-0.5b": dict(layers=24, heads=14, kv_heads=2, head_dim=64, hidden=56),
}
SMALL = dict(mlp=64, vocabulary=1024)
DTYPE = torch.bfloat16
PASS_TOKENS = 256
PART_BYTES = 1 << 20
READERS = 8
ALIGNED = 4096  # Direct reads begin and end at such bytes.


class Shape:
    """Numbers of a run."""

    def __init__(self, name: str, tokens: int, layers: int):
        given = dict(SHAPES[name])
        self.layers = layers or given["layers"]
        self.heads, self.kv_heads, self.head_dim = given["heads"], given["kv_heads"], given["head_dim"]
        self.tokens = tokens
        self.kv_bytes = self.layers * self.kv_heads * 2 * self.head_dim * DTYPE.itemsize * tokens
        self.model = given | dict(layers=self.layers)


def draw(heads: int, n: int, dim: int) -> torch.Tensor:
    """Return numbers of a fixed kind: what keys are made of costs the baselines nothing."""
    return torch.randn(1, heads, n, dim).to(DTYPE)


class Ours:
    """The context on disk, host memory a part of its bytes."""

    quant: str | None = None

    def __init__(self, shape: Shape, args: argparse.Namespace, model: LlamaForCausalLM):
        self.model, self.shape, self.limit = model, shape, int(args.host_share * shape.kv_bytes)
        storage = {"host": self.limit, "disk": f"{args.folder}:64GiB", "quant": self.quant}
        self.far = attach(model, InfiniGen(fraction=args.fraction), **storage, profile=False)
        self.cache = self.far.new_cache(tokens=shape.tokens + args.steps + 8)
        engine = self.engine = self.cache.engine
        engine.announce_prompt(shape.tokens, PASS_TOKENS)
        for start in range(0, shape.tokens, PASS_TOKENS):
            n = min(PASS_TOKENS, shape.tokens - start)
            for layer in self.cache.layers:
                k, v = (draw(shape.kv_heads, n, shape.head_dim) for _ in range(2))
                step = Step(Query(draw(shape.heads, n, shape.head_dim), Logits(shape.head_dim**-0.5)), k, v, None)
                layer.update(k, v)
                engine.selector.observe(engine.records[layer.layer], step)

    def begin(self) -> None:
        """Make the system forget what it has of the file, before every step."""
        self.engine.store.page_cache.pages.file.drop_cached()

    def report(self) -> dict[str, Any]:
        """Return what the receipt says."""
        receipt, file = self.far.receipt(self.cache), self.engine.store.page_cache.pages.file
        assert receipt.kv_bytes.host_peak <= self.limit
        row = dict(host_limit=self.limit, host_peak=receipt.kv_bytes.host_peak, page_bytes=file.page_bytes)
        row |= dict(read_fraction=receipt.read_fraction, disk_bytes=receipt.disk_bytes_per_token)
        return row | dict(device=measure_device(file._fd, file.n_pages, file.page_bytes))


class OursInt8(Ours):
    """The same with records in eight bits."""

    quant = "int8"


class Dense:
    """Every layer's records in a file of its own, all of them read at every step, attended to by our dense kernel."""

    form = "plain"

    def __init__(self, shape: Shape, args: argparse.Namespace, model: LlamaForCausalLM):
        kernels = load_native()
        assert isinstance(kernels, Native)
        self.model, self.shape, self.kernels = model, shape, kernels
        self.cache = DynamicCache(config=model.config)
        self.codec = None if self.form == "plain" else Codec(self.form, shape.head_dim, shape.head_dim, DTYPE)
        self.files = [Path(args.folder) / str(i) for i in range(shape.layers)]
        for i, layer in enumerate(self.cache.layers):
            layer.get_seq_length = lambda *_: shape.tokens
            layer.update = lambda k, v, *_, i=i, **__: (k, v)
            self.write(self.files[i])
        self.row_shape = (1, shape.kv_heads, shape.tokens, -1)

    def write(self, path: Path) -> None:
        """Write a layer's records, head by head, filled up to whole blocks of the disk."""
        shape, data = self.shape, bytearray()
        for _ in range(shape.kv_heads):
            k, v = (draw(1, shape.tokens, shape.head_dim) for _ in range(2))
            rows = torch.cat([k, v], -1) if self.codec is None else self.codec.encode(k, v)
            data += rows.contiguous().view(torch.uint8).numpy().tobytes()
        path.write_bytes(bytes(data) + bytes(-len(data) % ALIGNED))
        self.n_bytes = len(data)
        forget_files(path)

    def attend(self, layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return attention over all records of a layer."""
        rows = self.get_rows(layer).view(*self.row_shape)
        dim = self.shape.head_dim
        out = self.kernels.attend(
            q, Rows(rows, dim, dim, self.form), Logits(scaling), positions=None, n=self.shape.tokens
        )
        self.release(layer)
        return out

    def get_rows(self, layer: int) -> torch.Tensor:
        """Return a layer's records, in memory."""
        raise NotImplementedError

    def release(self, layer: int) -> None:
        """Note that a layer's records are read."""

    def begin(self) -> None:
        """Make the next step cold."""

    def report(self) -> dict[str, Any]:
        """Return what every step reads."""
        return dict(disk_bytes=self.n_bytes * self.shape.layers, read_fraction=1.0)


class Mapped(Dense):
    """Files mapped into memory: the system reads what is touched, ahead as it sees fit; none of it is there before."""

    def begin(self) -> None:
        """Map the files anew, and make the system forget them."""
        self.maps: list[torch.Tensor] = []
        forget_files(*self.files)
        n = self.n_bytes // DTYPE.itemsize
        self.maps = [torch.from_file(str(path), shared=True, size=n, dtype=DTYPE) for path in self.files]

    def get_rows(self, layer: int) -> torch.Tensor:
        """Return the mapping."""
        return self.maps[layer]


class Streamed(Dense):
    """Two buffers take turns: a layer is attended to while the next one's file is read, around the system's copies."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        size = -(-self.n_bytes // ALIGNED) * ALIGNED
        self.buffers = [mmap.mmap(-1, size) for _ in range(2)]
        self.fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in self.files]
        self.pool = ThreadPoolExecutor(READERS)
        self.pending: dict[int, list[Future[None]]] = {}
        self.last = False

    def fetch(self, layer: int) -> None:
        """Start to read a layer's file."""
        fd, view = self.fds[layer], memoryview(self.buffers[layer % 2])
        places = range(0, len(view), PART_BYTES)
        self.pending[layer] = [self.pool.submit(self.read, fd, view, at) for at in places]

    def read(self, fd: int, view: memoryview, at: int) -> None:
        part = view[at : at + PART_BYTES]
        done = 0
        while done < len(part):
            n = os.preadv(fd, [part[done:]], at + done)
            assert n > 0
            done += n

    def begin(self) -> None:
        """Note which step of a turn this is: but for the first, the first layer was read behind the last one."""
        if not self.pending:
            self.fetch(0)

    def get_rows(self, layer: int) -> torch.Tensor:
        """Start on the next layer, which may be the next step's first one, and wait for this."""
        if layer not in self.pending:
            self.fetch(layer)
        for part in self.pending.pop(layer):
            part.result()
        if not (self.last and layer + 1 == self.shape.layers):
            self.fetch((layer + 1) % self.shape.layers)
        dtype = DTYPE if self.codec is None else torch.uint8
        return torch.frombuffer(self.buffers[layer % 2], dtype=dtype, count=self.n_bytes // dtype.itemsize)


class Coded(Streamed):
    """The same with records in four bits."""

    form = "int4"


WAYS = {"farkv": Ours, "farkv int8": OursInt8, "mapped": Mapped, "streamed": Streamed, "streamed int4": Coded}


def measure_device(fd: int, n_pages: int, page_bytes: int) -> float:
    """Return the bytes per second of cold reads of a file's pages at random: what the device gives."""
    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    torch.manual_seed(1)
    places = (torch.randperm(n_pages)[: (512 << 20) // page_bytes] * page_bytes).tolist()
    buffers = [bytearray(page_bytes) for _ in range(READERS)]
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read(reader: int) -> None:
        for place in places[reader::READERS]:
            os.preadv(fd, [buffers[reader]], place)

    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
    seconds = time.perf_counter() - started
    os.close(fd)
    return len(places) * page_bytes / seconds


def attend_dense(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
    """Attend by the way that this interpreter measures."""
    out = CURRENT[0].attend(module.layer_idx, q, scaling) if CURRENT else torch.zeros_like(q)
    return out.transpose(1, 2), None


CURRENT: list[Any] = []


@torch.no_grad()
def run_child(args: argparse.Namespace) -> None:
    """Make a context, then take a turn of steps for every line that comes in; `report` ends it."""
    torch.set_num_threads(args.threads)
    quiet_libraries()
    shape = Shape(args.shape, args.tokens, args.layers)
    AttentionInterface.register("far_dense", attend_dense)
    kind = WAYS[args.child]
    attention = "sdpa" if issubclass(kind, Ours) else "far_dense"
    model = make_llama(2 * args.tokens, DTYPE, **shape.model, **SMALL, attn_implementation=attention)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    row: dict[str, Any] = {"before": read_memory()}
    forget_peak()
    started = time.perf_counter()
    way = kind(shape, args, model)
    if not issubclass(kind, Ours):
        CURRENT.append(way)
    row |= {"filled_s": time.perf_counter() - started, "filled": read_memory()}
    forget_peak()
    print("ready", flush=True)
    n = 0
    for line in sys.stdin:
        if line.strip() == "report":
            print(json.dumps(row | way.report()), flush=True)
            return
        seconds = []
        for i in range(args.turn):
            way.last = i == args.turn - 1
            forgets = time.perf_counter()
            way.begin()
            # What a real run would not do: making the system forget.
            started = forgets if isinstance(way, Streamed) else time.perf_counter()
            step = dict(input_ids=torch.tensor([[n % 1024]]), position_ids=torch.tensor([[args.tokens + n]]))
            model(past_key_values=way.cache, use_cache=True, **step)
            seconds.append(time.perf_counter() - started)
            n += 1
        row["memory"] = read_memory()
        print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds: dict[str, Any] = {"child": str, "folder": str, "shape": str, "tokens": int, "steps": int, "turn": int}
    kinds |= {"layers": int, "threads": int, "host-share": float, "fraction": float}
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", required=True, type=kind)
    run_child(parser.parse_args())


if __name__ == "__main__":
    main()
