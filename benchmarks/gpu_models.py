"""Decoding on a GPU: farkv with its records in host memory, against Hugging Face's offloaded and resident caches.

In: a shape, a context, a batch. Out: a row per method: milliseconds per layer and token of whole models of a few
layers with random weights, caches filled directly; what crossed the link per token, predicted and counted. farkv runs
as a user runs it: `attach(model, InfiniGen(fraction=...), near=...)`.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_timeline import draw_timeline
from transformers import DynamicCache, PreTrainedModel

from farkv.bench.e2e import ModelRunner, ModelSettings, fill_far, fill_plain
from farkv.bench.fill import KVSource
from farkv.bench.models import share_weights
from farkv.bench.report import OURS
from farkv.bench.timing import measure_interleaved, summarize
from farkv.errors import CapacityError
from farkv.hf.attach import attach
from farkv.hf.handle import Handle
from farkv.methods import InfiniGen

RESIDENT, OFFLOADED = "hf-resident", "hf-offloaded"


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


def near_limit_of(task: Task) -> int:
    """Return the near limit in bytes; a toy's share would not hold a window."""
    return max(1 << 20, int(task.near_share * task.kv_bytes))


def wait_for(device: torch.device) -> Any:
    """Return what waits for a device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def make_offloaded(task: Task, model: PreTrainedModel, source: KVSource) -> DynamicCache:
    """Return Hugging Face's offloaded cache with a context in it."""
    cache = DynamicCache(config=model.config, offloading=True)
    for layer in range(task.settings.layers):
        cache.update(*source.draw_kv(layer, 0, task.context), layer)
    return cache


def make_runner(name: str, task: Task, model: PreTrainedModel, source: KVSource, far: Handle) -> ModelRunner:
    """Fill one method's cache."""
    if name == OURS:
        runner = ModelRunner(name, far.model, fill_far(task.settings, task.context, source, far), task.settings.batch)
    elif name == OFFLOADED:
        runner = ModelRunner(name, model, make_offloaded(task, model, source), task.settings.batch)
    else:
        runner = ModelRunner(name, model, fill_plain(task.settings, task.context, source), task.settings.batch)
    runner.ids = runner.ids.to(source.device)
    return runner


def predict_link_bytes(task: Task, cache: Any) -> float:
    """Return the bytes per step that cross where no chosen record is near but those of the window.

    What is read, less each layer's window and newest token, which are near in any case.
    """
    shape, settings = task.settings.shape, task.settings
    read = cache.account.read_fraction() * settings.layers * shape.layer_bytes(task.context, settings.batch)
    tail = settings.layers * settings.batch * shape.kv_heads * (cache.recipe.window + 1) * shape.record_bytes()
    return max(0.0, read - tail)


def measure_task(task: Task, plain: PreTrainedModel, picture: Path | None = None) -> list[dict[str, Any]]:
    """Measure every method of a task, one cache after another in memory, each alone with the device.

    Args:
        picture: where the timeline of one of farkv's steps is drawn; None: not at all.
    """
    device, rows = plain.device, []
    source = KVSource(task.settings.shape, task.settings.batch, device)
    method, near = InfiniGen(fraction=task.settings.fraction), near_limit_of(task)
    with attach(share_weights(plain), method, near=near, profile=False) as far:
        for name in task.methods:
            started = time.perf_counter()
            try:
                runner = make_runner(name, task, plain, source, far)
                rows.append(measure_runner(task, runner, device))
                if name == OURS and picture is not None:
                    rows[-1]["timeline"] = draw_step(runner, picture)
            except (CapacityError, torch.OutOfMemoryError) as error:
                rows.append({"method": name, "refused": str(error).splitlines()[0]})
            runner = None
            free_memory(device)
            sys.stderr.write(f"{name}, batch {task.settings.batch}: {time.perf_counter() - started:.0f} s\n")
    for row in rows:
        row |= {"shape": task.settings.shape.name, "context": task.context, "batch": task.settings.batch}
    return rows


def free_memory(device: torch.device) -> None:
    """Give back what the last method took: near, and in pinned host memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # An older torch keeps pinned memory until the end.
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()


def measure_runner(task: Task, runner: ModelRunner, device: torch.device) -> dict[str, Any]:
    """Time one method."""
    layers = task.settings.layers
    # An offloaded cache of a large batch takes seconds per token: few rounds tell as much.
    rounds = 2 if runner.name == OFFLOADED else task.settings.rounds
    spread = summarize(measure_interleaved([runner], rounds, wait=wait_for(device))[runner.name])
    row: dict[str, Any] = {"method": runner.name, "ms_per_layer": 1e3 * spread.median_s / layers,
                           "ms_low": 1e3 * spread.low_s / layers, "ms_high": 1e3 * spread.high_s / layers,
                           "rounds": spread.rounds, "layers": layers}  # fmt: skip
    if runner.name == OURS:
        account = runner.cache.account
        steps = max(1, account.decode_steps)
        row |= {"read_fraction": account.read_fraction(), "index_fraction": account.index_fraction(),
                "link_bytes_counted": account.fetched_bytes / steps,
                "link_bytes_predicted": predict_link_bytes(task, runner.cache),
                "kernels": sorted(account.kernels) or ["torch"], "fallbacks": dict(account.fallbacks),
                "near_limit_bytes": near_limit_of(task)}  # fmt: skip
    return row


def draw_step(runner: ModelRunner, picture: Path) -> dict[str, float]:
    """Trace one decode step and draw it; return how much of its copying was hidden."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = runner.ids.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    runner.step(0)
    with profile(activities=activities) as trace:
        runner.step(0)
        wait_for(runner.ids.device)()
    file = picture.with_suffix(".json")
    trace.export_chrome_trace(str(file))
    overlap = draw_timeline(file, picture)
    file.unlink()
    return overlap
