"""Decoding on a GPU: farkv with its records in host memory, against Hugging Face's offloaded and resident caches.

In: a shape, a context, a batch. Out: a row per method: milliseconds per layer and token of whole models of a few
layers with random weights, caches filled directly; what crossed the link per token, predicted and counted. farkv runs
as a user runs it: `attach(model, InfiniGen(fraction=...), near=...)`. Of one of its steps a trace is kept (for
ui.perfetto.dev), and how much of the copying in it computation hid.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import Row, Rows
from transformers import DynamicCache, PreTrainedModel

from farkv import InfiniGen, attach
from farkv.bench.e2e import ModelRunner, ModelSettings, fill_far, fill_plain
from farkv.bench.fill import KVSource
from farkv.bench.models import share_weights
from farkv.bench.report import OURS
from farkv.bench.timing import measure_interleaved, summarize
from farkv.errors import CapacityError
from farkv.hf.handle import Handle

RESIDENT, OFFLOADED = "hf-resident", "hf-offloaded"
# Kernels of ours that read host memory themselves.
LINK_KERNELS = ("_fetch", "_gather", "_sum_rows")
Spans = list[tuple[float, float]]


class Task(NamedTuple):
    """One measurement: near memory is `near_share` of the KV bytes of these layers."""

    settings: ModelSettings
    context: int
    near_share: float
    methods: tuple[str, ...] = (OURS, OFFLOADED, RESIDENT)

    @property
    def kv_bytes(self) -> int:
        """Return the KV bytes of all layers."""
        return self.settings.layers * self.settings.shape.layer_bytes(self.context, self.settings.batch)

    @property
    def near_limit(self) -> int:
        """Return the near limit in bytes; a toy's share would not hold a window."""
        return max(1 << 20, int(self.near_share * self.kv_bytes))


class DeviceRunner(ModelRunner):
    """One whose step ends when the device has done it."""

    def step(self, layer: int) -> None:
        super().step(layer)
        if self.ids.is_cuda:
            torch.cuda.synchronize()


def make_runner(name: str, task: Task, model: PreTrainedModel, source: KVSource, far: Handle) -> DeviceRunner:
    """Fill one method's cache."""
    settings, context = task.settings, task.context
    if name == OURS:
        model, cache = far.model, fill_far(settings, context, source, far)
    elif name == RESIDENT:
        cache = fill_plain(settings, context, source)
    else:
        cache = DynamicCache(config=model.config, offloading=True)
        for layer in range(settings.layers):
            cache.update(*source.draw_kv(layer, 0, context), layer)
    runner = DeviceRunner(name, model, cache, settings.batch)
    runner.ids = runner.ids.to(source.device)
    return runner


def predict_link_bytes(task: Task, cache: Any) -> float:
    """Return the bytes per step that cross where no chosen record is near but those of the window.

    What is read, less each layer's window and newest token, which are near in any case.
    """
    shape, settings = task.settings.shape, task.settings
    window_bytes = (
        settings.layers * settings.batch * shape.kv_heads * (cache.engine.store.window + 1) * shape.record_bytes()
    )
    return max(0.0, cache.account.read_fraction() * task.kv_bytes - window_bytes)


def measure_task(task: Task, plain: PreTrainedModel, trace: Path | None = None) -> Rows:
    """Measure every method of a task, one cache after another in memory, each alone with the device.

    Args:
        trace: where one of farkv's steps is kept; None: not at all.
    """
    rows, settings = [], task.settings
    source = KVSource(settings.shape, settings.batch, plain.device)
    method = InfiniGen(fraction=settings.fraction)
    with attach(share_weights(plain), method, near=task.near_limit, profile=False) as far:
        for name in task.methods:
            started = time.perf_counter()
            row: Row = {"method": name, "shape": settings.shape.name, "context": task.context, "batch": settings.batch}
            try:
                runner = make_runner(name, task, plain, source, far)
                row |= measure_runner(task, runner)
                if name == OURS and trace is not None:
                    row["timeline"] = trace_step(runner, trace)
            except (CapacityError, torch.OutOfMemoryError) as error:
                row["refused"] = str(error).splitlines()[0]
            rows.append(row)
            # Gives back what it took, near and in pinned host memory.
            runner = None
            gc.collect()
            if plain.device.type == "cuda":
                torch.cuda.empty_cache()
                # An older torch keeps pinned memory until the end.
                getattr(torch.accelerator, "empty_host_cache", lambda: None)()
            sys.stderr.write(f"{name}, batch {settings.batch}: {time.perf_counter() - started:.0f} s\n")
    return rows


def measure_runner(task: Task, runner: DeviceRunner) -> Row:
    """Time one method."""
    layers = task.settings.layers
    # An offloaded cache of a large batch takes seconds per token: few rounds tell as much.
    rounds = 2 if runner.name == OFFLOADED else task.settings.rounds
    spread = summarize(measure_interleaved([runner], rounds)[runner.name])
    row: Row = {"ms_per_layer": 1e3 * spread.median_s / layers, "ms_low": 1e3 * spread.low_s / layers,
                "ms_high": 1e3 * spread.high_s / layers, "rounds": spread.rounds, "layers": layers}  # fmt: skip
    if runner.name == OURS:
        account = runner.cache.account
        row |= {"read_fraction": account.read_fraction(), "index_fraction": account.index_fraction(),
                "link_bytes_counted": account.fetched_bytes / max(1, account.decode_steps),
                "link_bytes_predicted": predict_link_bytes(task, runner.cache),
                "kernels": sorted(account.kernels) or ["torch"], "fallbacks": dict(account.fallbacks),
                "near_limit_bytes": task.near_limit}  # fmt: skip
    return row


def trace_step(runner: DeviceRunner, path: Path) -> dict[str, float]:
    """Trace one decode step; return how much of its copying was hidden."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if runner.ids.is_cuda else [])]
    runner.step(0)
    with profile(activities=activities) as trace:
        runner.step(0)
    trace.export_chrome_trace(str(path))
    return measure_overlap(json.loads(path.read_text()))


def find_spans(trace: dict[str, Any], *, copies: bool) -> Spans:
    """Return the spans of time, in microseconds, in which something was copied over the link, or anything else ran.

    A copy from device to device crosses no link and counts as computation, as the profiler's memory sets do.
    """
    spans: Spans = []
    for event in sorted(trace.get("traceEvents", ()), key=lambda e: float(e.get("ts", 0))):
        category, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X" or category not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        crosses = category == "gpu_memcpy" and "DtoD" not in name and "Device -> Device" not in name
        crosses |= category == "kernel" and name.startswith(LINK_KERNELS)
        if crosses != copies:
            continue
        start, stop = float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], stop)
        else:
            spans.append((start, stop))
    return spans


def measure_overlap(trace: dict[str, Any]) -> dict[str, float]:
    """Return the microseconds of copying, computing, and both at once, and the share of the copying that is hidden."""
    copy, compute = (find_spans(trace, copies=copies) for copies in (True, False))
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in copy for c, d in compute)
    copy_us, compute_us = (sum(b - a for a, b in spans) for spans in (copy, compute))
    hidden = both / copy_us if copy_us else 0.0
    return {"copy_us": copy_us, "compute_us": compute_us, "both_us": both, "hidden_share": hidden}
