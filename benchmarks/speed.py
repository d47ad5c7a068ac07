"""Tables of speed from what `farkv bench ... --json` printed; every file is one such object.

python benchmarks/speed.py            # measure all of it: about half an hour on two cores, nothing else may run
python benchmarks/speed.py decode     # one of decode, prefill, e2e, calibrate

In: a quiet machine. Out: benchmarks/results/bench_*.json, from which `tables.py` fills README and docs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# What is measured, by name: the arguments of `farkv bench`.
RUNS = {
    "decode": "decode --contexts 8K,32K,128K --threads 1 --rounds 15 --peer llama.cpp",
    "threads": "decode --contexts 32K --threads 2 --rounds 15 --methods infinigen,dense-native",
    "prefill": "prefill --contexts 2K,4K --threads 2",
    "e2e": "e2e --contexts 4K,32K --threads 2 --rounds 4",
    "short": "e2e --contexts 128,256,512,1K,2K --threads 2 --layers 4 --rounds 9 --own-fraction",
    "calibrate": "decode --calibrate --threads 1",
}
COLUMNS = ("ms", "of ours", "of its floor")
OURS, BASE = "infinigen", "dense-native"


def read(name: str) -> dict[str, Any]:
    """Return what one run printed."""
    return json.loads((RESULTS / f"bench_{name}.json").read_text())


def format_tokens(n: int) -> str:
    """Write a context."""
    return f"{n // 1024} K" if n % 1024 == 0 else str(n)


def format_ms(ms: float) -> str:
    """Write milliseconds with three digits."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def find(rows: list[dict[str, Any]], method: str, context: int) -> dict[str, Any] | None:
    """Return a method's row at a context."""
    return next((r for r in rows if (r["method"], r["context"]) == (method, context)), None)


def format_decode(contexts: tuple[int, ...] = (), *, short: bool = False, name: str = "decode") -> str:
    """Return a row per method: ms per layer, times ours, percentage of the floor, at every context.

    Args:
        short: without floors, without what nobody would use, and without the machine.
    """
    found = read(name)
    columns = COLUMNS[:2] if short else COLUMNS
    left_out = ("matmul-fp32", "matmul-bf16", "hf-sdpa-fp32") if short else ()
    rows = [r for r in found["rows"] if r["method"] not in left_out]
    contexts = contexts or tuple(sorted({r["context"] for r in rows}))
    heads = [f"{format_tokens(n)}, {column}" for n in contexts for column in columns]
    lines = [f"| one layer, one token | reads | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = [cell for n in contexts for cell in make_cells(rows, method, n)[: len(columns)]]
        read_fraction = next(r["read_fraction"] for r in rows if r["method"] == method)
        share = "all" if read_fraction == 1 else f"{100 * read_fraction:.1f} %"
        lines.append(f"| {f'**{method}**' if method == OURS else method} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines if short else [*lines, "", describe(found)])


def make_cells(rows: list[dict[str, Any]], method: str, context: int) -> list[str]:
    """Return milliseconds, how many times ours, and the percentage of the floor."""
    row, ours = find(rows, method, context), find(rows, OURS, context)
    if row is None or ours is None:
        return ["–"] * 3
    floor = "–" if row["floor_percent"] is None else f"{row['floor_percent']:.0f} %"
    times = f"{row['ms_per_layer'] / ours['ms_per_layer']:.1f} x" if row is not ours else ""
    return [format_ms(row["ms_per_layer"]), times, floor]


def describe(found: dict[str, Any]) -> str:
    """Return the machine and the run in a sentence."""
    machine = found["machine"]
    threads = machine["threads"]
    text = f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}, kernel {machine['kernel']}"
    if machine.get("read_gb_per_s"):
        text += (
            f"; reads {machine['read_gb_per_s']:.1f} GB/s in sequence, rows of {machine['gather_row_bytes']} bytes at "
            f"{machine['gather_gb_per_s']:.1f} GB/s"
        )
    return f"{text}. Medians of interleaved rounds."


def format_model(name: str) -> str:
    """Return tokens per second of whole models by context."""
    found = read(name)
    rows, settings = found["rows"], found["settings"]
    lines = ["| context | method | ms per token | tokens/s | plain / ours |", "|---|---|---|---|---|"]
    for row in rows:
        ours = find(rows, OURS, row["context"])
        times = "" if ours is None or row is ours else f"{row['ms_per_token'] / ours['ms_per_token']:.2f} x"
        lines.append(
            f"| {format_tokens(row['context'])} | {row['method']} | {format_ms(row['ms_per_token'])} "
            f"| {row['tokens_per_s']:.2f} | {times} |"
        )
    growth = found["growth"]
    notes = [f"{method} {slope['ms_per_1k_tokens']:.2f} ms" for method, slope in growth.items()]
    text = f"{settings['shape']}, {settings['layers']} layers, bfloat16, random weights. "
    if notes:
        text += f"A token costs more by, for every 1 K tokens of context: {', '.join(notes)}. "
    return "\n".join([*lines, "", text + describe(found)])


def format_prefill() -> str:
    """Return the ratio of prefill times."""
    found = read("prefill")
    lines = ["| prompt | plain, s per 1 K tokens | attached | ratio |", "|---|---|---|---|"]
    for row in found["rows"]:
        if row["method"] == OURS:
            plain = next(r for r in found["rows"] if r["context"] == row["context"] and r is not row)
            lines.append(
                f"| {format_tokens(row['context'])} | {plain['s_per_1k_tokens']:.2f} | {row['s_per_1k_tokens']:.2f} "
                f"| {row['ratio']:.3f} |"
            )
    settings = found["settings"]
    text = (
        f"{settings['shape']}, {settings['layers']} layers, {settings['dtype']}, chunks of {settings['chunk_tokens']}. "
    )
    return "\n".join([*lines, "", text + describe(found)])


def format_calibration() -> str:
    """Return both ways' times by context, and the crossover."""
    found = read("calibrate")
    lines = ["| context | all, by the native kernel: ms | choosing: ms |", "|---|---|---|"]
    for n in sorted({r["context"] for r in found["rows"]}):
        dense, ours = (find(found["rows"], m, n) for m in (BASE, OURS))
        assert dense is not None
        assert ours is not None
        lines.append(f"| {format_tokens(n)} | {dense['ms_per_layer']:.3f} | {ours['ms_per_layer']:.3f} |")
    tokens = found["crossover_tokens"]
    said = "choosing never won" if tokens is None else f"choosing wins from {format_tokens(tokens)} tokens on"
    return "\n".join([*lines, "", f"llama3.2-1b's records, the default fraction: {said}."])


def format_headline() -> str:
    """Return the README's sentence."""
    rows = read("decode")["rows"]
    longest = max(r["context"] for r in rows)
    ours = find(rows, OURS, longest)
    assert ours is not None
    times = {m: find(rows, m, longest) for m in (BASE, "matmul-bf16", "hf-sdpa-bf16", "llama.cpp")}
    said = {m: row["ms_per_layer"] / ours["ms_per_layer"] for m, row in times.items() if row is not None}
    return (
        f"Attention of one Llama-3-8B layer at {format_tokens(longest)} tokens, one CPU thread: "
        f"{format_ms(ours['ms_per_layer'])} ms, {said[BASE]:.1f} times\nfaster than reading everything with the same "
        f"kernel, {said['matmul-bf16']:.0f} than a bfloat16 matmul, "
        + (f"{said['llama.cpp']:.0f} than llama.cpp, " if "llama.cpp" in said else "")
        + f"{said['hf-sdpa-bf16']:.0f} than\nHugging Face's cache and sdpa."
    )


def main() -> None:
    """Run `farkv bench` and keep the last line."""
    names = sys.argv[1:] or list(RUNS)
    program = Path(sys.executable).with_name("farkv")
    for name in names:
        sys.stderr.write(f"== {name}: farkv bench {RUNS[name]} --json\n")
        with tempfile.TemporaryDirectory() as folder:
            # What is measured here must not change how this machine runs farkv, nor the other way round.
            done = subprocess.run(
                [program, "bench", *RUNS[name].split(), "--json"],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "FARKV_CACHE_DIR": folder},
            )
        found = json.loads(done.stdout.strip().splitlines()[-1])
        # A folder that is gone by now.
        found.pop("path", None)
        (RESULTS / f"bench_{name}.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
