"""A folder as `farkv eval` writes it, drawn from a seed: every method, plausible scores, no model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from farkv.evals.row import PROMPTS, READS, RESULTS, RUN, Row

FRACTIONS = (0.02, 0.05, 0.1, 0.2)
LENGTHS = (2048, 8192)
TASKS = (
    "niah_single niah_multikey niah_multivalue niah_multiquery vt cwe fwe qa extraction multiturn longgen ppl".split()
)
# How much of the full cache's score is left at a fraction of 0.02; the rest comes back with the fraction.
QUALITY = {
    "infinigen": 0.93,
    "infinigen-far": 0.9,
    "infinigen-paper": 0.74,
    "pages": 0.7,
    "lowbit": 0.88,
    "oracle": 0.96,
    "xkv": 0.42,
    "xkv-paper": 0.36,
    "snapkv": 0.4,
    "pyramidkv": 0.38,
    "h2o": 0.3,
    "window": 0.22,
    "random": 0.08,
}
EVICTS = ("xkv", "xkv-paper", "snapkv", "pyramidkv", "h2o")
INDEX = {
    "infinigen": 0.03,
    "infinigen-far": 0.03,
    "infinigen-paper": 0.15,
    "pages": 0.06,
    "lowbit": 0.06,
    "oracle": 0.5,
}
TASTE = {task: 0.2 + 0.8 * ((7 * i) % 12) / 12 for i, task in enumerate(TASKS)}


def make_row(task: str, method: str, fraction: float, length: int, seed: int, **more: Any) -> Row:
    """Return one row; all that is drawn depends on its key alone."""
    rng = random.Random(f"{task} {length} {seed}")
    level, depth = rng.random(), rng.random() if task.startswith("niah") else None
    full = 0.99 if TASTE[task] < 0.8 else 0.9 if length < 4096 else 0.86
    quality = 1.0
    if method != "full":
        lost = (1 - QUALITY.get(method, 0.5)) * TASTE[task] * (length / 2048) ** 0.15
        quality = max(0.0, 1 - 1.6 * lost * (0.02 / fraction) ** 0.8)
        if depth is not None and QUALITY.get(method, 0.5) < 0.8:
            quality *= 1 - 0.6 * math.exp(-10 * (1 - depth)) if method != "window" else float(depth > 1 - fraction)
    jitter = random.Random(f"{task} {method} {fraction} {length} {seed}").random()
    score = (
        float(level < full * quality) if task != "extraction" else min(1.0, round(full * quality + 0.06 * jitter, 2))
    )
    held = fraction if method in EVICTS or method == "window" else 1.0
    index = INDEX.get(method, 0.0)
    lost_kl = None if task != "ppl" else 0.0 if method == "full" else 2.0 * (1.02 - quality) ** 2 * (0.5 + jitter)
    proof = {"full": "everything", "oracle": "every key"}.get(method, "sparse")
    sha = f"{task}{length}{seed}"
    values: dict[str, Any] = {
        "task": task, "method": method, "fraction": fraction, "length": length, "seed": seed,
        "answer": "4711" if score == 1 else "0", "expected": ["4711"], "score": score, "prompt_sha": sha,
        "read_fraction": 0.98 * fraction, "index_fraction": index, "resident_fraction": held, "kept_fraction": held,
        "gated": task == "cwe" and length == 8192, "tokens": length, "steps": 12,
        "agrees": score == 1 or method == "full", "kl": lost_kl, "depth": depth, "proof": proof,
        "nll": None if lost_kl is None else 2.1 + lost_kl,
        "bytes_per_step": (fraction + index) * length * 512, "full_bytes_per_step": length * 512.0, "decode_s": 0.2,
        "tokens_per_s": (60 / (0.3 + fraction + 2 * index)) * (0.9 + 0.2 * jitter) * 2048 / length,
        "query_aware": method not in (*EVICTS, "window", "random"),
    }  # fmt: skip
    if values["gated"]:
        values["score"] = 0.05 * (seed % 2)
    return Row(**{**values, **more})


def make_rows(
    methods: tuple[str, ...] = tuple(QUALITY),
    fractions: tuple[float, ...] = FRACTIONS,
    tasks: tuple[str, ...] = tuple(TASKS),
    lengths: tuple[int, ...] = LENGTHS,
    limit: int = 10,
) -> list[Row]:
    """Return rows of every method at every fraction, the full cache first."""
    settings = [("full", 1.0), *((method, fraction) for method in methods for fraction in fractions)]
    return [
        make_row(task, method, fraction, length, seed)
        for task in tasks
        for length in lengths
        for seed in range(limit)
        for method, fraction in settings
    ]


def make_reads(method: str, fraction: float, length: int = 8192, layers: int = 6) -> dict[str, Any]:
    """Return one line of reads.jsonl: sinks, a window, and a few places that wander."""
    rng = random.Random(f"{method} {fraction}")
    steps, places = 12, 48
    hot = [rng.randrange(places) for _ in range(6)]
    read = []
    for layer in range(layers):
        grid = []
        for step in range(steps):
            line = [fraction * rng.random() * (2 if method != "window" else 0) for _ in range(places)]
            line[0], line[-1] = 0.4, 0.9
            for i in hot[layer % 3 :: 2]:
                line[(i + step // 4) % places] = min(1.0, 0.3 + rng.random())
            grid.append([1.0] * places if method == "full" else line)
        read.append(grid)
    return {
        "task": "niah_single", "method": method, "fraction": fraction, "length": length, "seed": 0, "prompt_sha": "x",
        "layers": list(range(layers)), "step_edges": list(range(0, 4 * steps + 1, 4)),
        "position_edges": [round(length * i / places) for i in range(places + 1)], "read": read,
    }  # fmt: skip


def make_run(**more: Any) -> dict[str, Any]:
    """Return run.json."""
    return {
        "model": "demo", "model_sha": "0123abcd", "tasks": TASKS, "methods": ["full", *QUALITY], "limit": 10, "seed": 0,
        "fractions": list(FRACTIONS), "lengths": list(LENGTHS), "filler": "pydoc", "threads": 2,
        "versions": {"farkv": "0.1.0", "torch": "2.13.0", "transformers": "5.16.0"},
        "machine": {"processor": "A processor of 2.4 GHz", "cores": 2, "memory_bytes": 8 * 2**30},
        "skipped": [{"method": "lowbit", "fraction": 0.01, "why": "its index alone reads more than this fraction"}],
        "command": "farkv eval --model demo --tasks all --methods all --fractions 0.02,0.05,0.1,0.2 --out DIR",
    } | more  # fmt: skip


def write_folder(folder: Path, rows: list[Row], reads: list[dict[str, Any]] | None = None, **run: Any) -> Path:
    """Write a folder as `farkv eval` does; reads.jsonl only where there are reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text("".join(row.to_json() + "\n" for row in rows), "utf-8", "backslashreplace")
    (folder / RUN).write_text(json.dumps(make_run(**run)), "utf-8")
    (folder / PROMPTS).write_text("", "utf-8")
    if reads is not None:
        (folder / READS).write_text("".join(json.dumps(line) + "\n" for line in reads), "utf-8")
    return folder
