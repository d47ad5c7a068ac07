"""Tables of speed from what `farkv bench ... --json` printed; every file is one such object.

python benchmarks/speed.py            # measure all of it: about half an hour on two cores, nothing else may run
python benchmarks/speed.py decode     # some of RUNS; for whole_* first: python benchmarks/real_models.py qwen05

In: a quiet machine. Out: benchmarks/results/bench_*.json, from which `tables.py` fills README and docs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from real_models import find_folder
from rows import RESULTS, Row, Rows, format_rows, group

from farkv.bench.shapes import format_tokens

# A real model of `real_models.py`, as a file that llama.cpp runs too.
WHOLE = (
    "e2e --model {models}/qwen05/model.gguf --contexts 2K,8K,16K,32K --weights int8 --rounds 6 --peer llama.cpp "
    "--threads"
)
# transformers' own attention in bfloat16 is no match on a CPU without it: it is measured in float32.
HALF = "--dtype bfloat16 --methods infinigen"
# What is measured, by name: the arguments of `farkv bench`.
RUNS = {
    "decode": "decode --contexts 8K,32K,128K --threads 1 --rounds 15 --peer llama.cpp",
    "threads": "decode --contexts 32K --threads 2 --rounds 15 --methods infinigen,dense-native",
    # On a processor of `avx512vbmi`: Ice Lake, Zen 4 and later.
    "wide": "decode --contexts 8K,32K,128K --threads 1 --rounds 15 --methods infinigen,dense-native,matmul-bf16",
    "prefill": "prefill --contexts 2K,4K --threads 2",
    "e2e": "e2e --contexts 4K,32K --threads 2 --rounds 4",
    "short": "e2e --contexts 128,256,512,1K,2K --threads 2 --layers 4 --rounds 9 --own-fraction",
    "calibrate": "decode --calibrate --threads 1",
    "whole_1": f"{WHOLE} 1 --dtype float32",
    "whole_2": f"{WHOLE} 2 --dtype float32",
    "whole_half_1": f"{WHOLE} 1 {HALF}",
    "whole_half_2": f"{WHOLE} 2 {HALF}",
}
COLUMNS = ("ms", "of ours", "of its floor")
# A gain that a noisy machine may make by itself.
NOISE = 1.05
OURS, BASE = "infinigen", "dense-native"


def read(name: str) -> Row:
    """Return what one run printed."""
    return json.loads((RESULTS / f"bench_{name}.json").read_text())


def format_ms(ms: float) -> str:
    """Write milliseconds with three digits."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def find(rows: Rows, method: str, context: int) -> Row | None:
    """Return a method's row at a context."""
    return next((r for r in rows if (r["method"], r["context"]) == (method, context)), None)


def format_decode(contexts: tuple[int, ...] = (), *, short: bool = False, name: str = "decode") -> str:
    """Return a row per method: ms per layer, times ours, percentage of the floor, at every context.

    Args:
        short: without floors, without methods that no one would use, and without the machine.
    """
    found = read(name)
    columns = COLUMNS[:2] if short else COLUMNS
    left_out = ("matmul-fp32", "matmul-bf16", "hf-sdpa-fp32") if short else ()
    rows = [r for r in found["rows"] if r["method"] not in left_out]
    contexts = contexts or tuple(sorted({r["context"] for r in rows}))
    lines = []
    for method, mine in group(rows, "method").items():
        fraction = mine[0]["read_fraction"]
        cells = [f"**{method}**" if method == OURS else method, "all" if fraction == 1 else f"{100 * fraction:.1f} %"]
        lines.append(cells + [cell for n in contexts for cell in make_cells(rows, method, n)[: len(columns)]])
    heads = [f"{format_tokens(n)}, {column}" for n in contexts for column in columns]
    return format_rows(["one layer, one token", "reads", *heads], lines, *([] if short else [describe(found)]))


def make_cells(rows: Rows, method: str, context: int) -> list[str]:
    """Return milliseconds, how many times ours, and the percentage of the floor."""
    row, ours = find(rows, method, context), find(rows, OURS, context)
    if row is None or ours is None:
        return ["–"] * 3
    floor = "–" if row["floor_percent"] is None else f"{row['floor_percent']:.0f} %"
    times = f"{row['ms_per_layer'] / ours['ms_per_layer']:.1f} x" if row is not ours else ""
    return [format_ms(row["ms_per_layer"]), times, floor]


def describe(found: Row) -> str:
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
    found, lines = read(name), []
    for row in found["rows"]:
        ours = find(found["rows"], OURS, row["context"])
        times = "" if ours is None or row is ours else f"{row['ms_per_token'] / ours['ms_per_token']:.2f} x"
        cells = [format_tokens(row["context"]), row["method"], format_ms(row["ms_per_token"])]
        lines.append([*cells, f"{row['tokens_per_s']:.2f}", times])
    settings = found["settings"]
    text = f"{settings['shape']}, {settings['layers']} layers, bfloat16, random weights. "
    growth = [f"{method} {slope['ms_per_1k_tokens']:.2f} ms" for method, slope in found["growth"].items()]
    if growth:
        text += f"A token costs more by, for every 1 K tokens of context: {', '.join(growth)}. "
    return format_rows(["context", "method", "ms per token", "tokens/s", "plain / ours"], lines, text + describe(found))


def format_whole() -> str:
    """Return whole steps of a real model beside llama.cpp on the same file, and from where on ours are faster."""
    lines, notes = [], list[str]()
    for name in ("whole_half_1", "whole_1", "whole_half_2", "whole_2"):
        found = read(name)
        threads, dtype = found["machine"]["threads"], found["settings"]["dtype"]
        gains: dict[int, float] = {}
        for context, mine in group(found["rows"], "context").items():
            ours, peer = find(mine, OURS, context), find(mine, "llama.cpp", context)
            assert ours is not None
            assert peer is not None
            gains[context] = peer["ms_per_token"] / ours["ms_per_token"]
            cells = [threads, dtype, format_tokens(context), format_ms(ours["ms_per_token"])]
            cells += [format_ms(peer["ms_per_token"]), f"{gains[context]:.2f} x", peer["kv"]]
            plain = [r for r in mine if r["method"].startswith("hf-")]
            cells += [c for r in plain for c in (format_ms(r["ms_per_token"]),
                                                 f"{r['ms_per_token'] / ours['ms_per_token']:.2f} x")]  # fmt: skip
            lines.append(cells)
        won = [n for n in sorted(gains) if all(gains[m] > NOISE for m in gains if m >= n)]
        said = (
            f"faster than llama.cpp from {format_tokens(won[0])} tokens on" if won else "nowhere faster than llama.cpp"
        )
        notes.append(f"{threads} thread{'s' if threads > 1 else ''}, {dtype}: {said}.")
    head = ["threads", "farkv's dtype", "context", "farkv, ms per token", "llama.cpp", "of ours", "its KV",
            "transformers", "of ours"]  # fmt: skip
    machine = read("whole_2")["machine"]
    text = f"{machine['cpu']}, kernel {machine['kernel']}. Medians of interleaved rounds."
    return format_rows(head, lines, f"{text} {' '.join(notes)}")


def format_prefill() -> str:
    """Return the ratio of prefill times."""
    found, lines = read("prefill"), []
    for context, rows in group(found["rows"], "context").items():
        ours = next(r for r in rows if r["method"] == OURS)
        plain = next(r for r in rows if r is not ours)
        cells = [format_tokens(context), f"{plain['s_per_1k_tokens']:.2f}", f"{ours['s_per_1k_tokens']:.2f}"]
        lines.append([*cells, f"{ours['ratio']:.3f}"])
    shape, layers, dtype, chunk = (found["settings"][name] for name in ("shape", "layers", "dtype", "chunk_tokens"))
    text = f"{shape}, {layers} layers, {dtype}, chunks of {chunk}. "
    return format_rows(["prompt", "plain, s per 1 K tokens", "attached", "ratio"], lines, text + describe(found))


def format_calibration() -> str:
    """Return both ways' times by context, and the crossover."""
    found = read("calibrate")
    times = {(r["context"], r["method"]): r["ms_per_layer"] for r in found["rows"]}
    contexts = sorted({context for context, _ in times})
    lines = [[format_tokens(n), *(f"{times[n, method]:.3f}" for method in (BASE, OURS))] for n in contexts]
    tokens = found["crossover_tokens"]
    said = "choosing never won" if tokens is None else f"choosing wins from {format_tokens(tokens)} tokens on"
    note = f"llama3.2-1b's records, the default fraction: {said}."
    return format_rows(["context", "all, by the native kernel: ms", "choosing: ms"], lines, note)


def main() -> None:
    """Run `farkv bench` and keep the last line."""
    names = sys.argv[1:] or list(RUNS)
    program = Path(sys.executable).with_name("farkv")
    for name in names:
        asked = RUNS[name].format(models=find_folder())
        sys.stderr.write(f"== {name}: farkv bench {asked} --json\n")
        with tempfile.TemporaryDirectory() as folder:
            # What is measured here must not change how this machine runs farkv, nor the other way round.
            done = subprocess.run(
                [program, "bench", *asked.split(), "--json"],
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
