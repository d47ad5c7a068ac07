"""Draw what a GPU copied and computed, when, of a trace that torch.profiler wrote.

In: a chrome trace (JSON). Out: a picture with one line per stream, and the share of the copying that computation hid.

    python benchmarks/gpu_timeline.py trace.json timeline.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from farkv.plot import import_matplotlib

COLOURS = {"copy": "#c0504d", "compute": "#4f81bd"}
# Kernels of ours that read host memory themselves.
LINK_KERNELS = ("_fetch", "_gather", "_sum_rows")


class Interval(NamedTuple):
    """One operation of the device, in microseconds from the trace's first."""

    kind: str
    stream: int
    start_us: float
    stop_us: float


def read_intervals(trace: dict[str, Any]) -> list[Interval]:
    """Return the device's operations, in order: copies over the link, and everything that computes.

    A copy from device to device crosses no link and counts as computation, as the profiler's memory sets do.
    """
    found = []
    for event in trace.get("traceEvents", ()):
        category, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X" or category not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        crosses = category == "gpu_memcpy" and "DtoD" not in name and "Device -> Device" not in name
        crosses |= category == "kernel" and name.startswith(LINK_KERNELS)
        stream, start = int(event.get("args", {}).get("stream", 0)), float(event["ts"])
        kind = "copy" if crosses else "compute"
        found.append(Interval(kind, stream, start, start + float(event.get("dur", 0.0))))
    first = min((i.start_us for i in found), default=0.0)
    moved = [i._replace(start_us=i.start_us - first, stop_us=i.stop_us - first) for i in found]
    return sorted(moved, key=lambda i: i.start_us)


def merge(intervals: list[Interval], kind: str) -> list[tuple[float, float]]:
    """Return the spans of time in which something of a kind ran on any stream."""
    spans: list[tuple[float, float]] = []
    for i in sorted((i for i in intervals if i.kind == kind), key=lambda i: i.start_us):
        if spans and i.start_us <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], i.stop_us)
        else:
            spans.append((i.start_us, i.stop_us))
    return spans


def measure_overlap(intervals: list[Interval]) -> dict[str, float]:
    """Return the microseconds of copying, computing, and both at once, and the share of the copying that is hidden."""
    copy, compute = merge(intervals, "copy"), merge(intervals, "compute")
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in copy for c, d in compute)
    copy_us, compute_us = (sum(b - a for a, b in spans) for spans in (copy, compute))
    hidden = both / copy_us if copy_us else 0.0
    return {"copy_us": copy_us, "compute_us": compute_us, "both_us": both, "hidden_share": hidden}


def draw_timeline(trace: Path, picture: Path) -> dict[str, float]:
    """Draw a trace, and return what `measure_overlap` says of it."""
    import_matplotlib()
    from matplotlib import pyplot

    intervals = read_intervals(json.loads(trace.read_text()))
    overlap = measure_overlap(intervals)
    lines = sorted({(i.kind, i.stream) for i in intervals}, reverse=True)
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.5 * max(1, len(lines))))
    for y, (kind, stream) in enumerate(lines):
        bars = [(i.start_us, i.stop_us - i.start_us) for i in intervals if (i.kind, i.stream) == (kind, stream)]
        axes.broken_barh(bars, (y - 0.35, 0.7), color=COLOURS[kind])
    axes.set_yticks(range(len(lines)), [f"{kind}, stream {stream}" for kind, stream in lines])
    axes.set_xlabel("microseconds")
    axes.set_title(
        f"copying {overlap['copy_us']:.0f} µs, computing {overlap['compute_us']:.0f} µs; "
        f"{overlap['hidden_share']:.0%} of the copying is hidden",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
    return overlap


def main() -> None:
    """Draw one trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    print(json.dumps(draw_timeline(args.trace, args.picture)))


if __name__ == "__main__":
    main()
