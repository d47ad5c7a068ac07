"""What was read when: per layer one map, position in the text to the right, decode steps downward.

In: lines of `reads.jsonl`. Out: SVG around images of one colour, whose opacity is the share that was read, so that they
fit light and dark pages.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farkv.errors import InputError
from farkv.evals.report.element import Html, el
from farkv.evals.report.looks import order_methods
from farkv.evals.row import READS
from farkv.evals.show import name_setting, percent
from farkv.evals.tables import Setting

WIDTH, HEIGHT, LEFT, TOP = 250, 96, 34, 4
# What the scale names. Opacity is the square root of the share: a tenth is still seen.
SCALE = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
BLUE = (47, 128, 225)


class Reads(NamedTuple):
    """One line: read, `[layers][steps][positions]`, the share of a bucket's records that a step and head read."""

    task: str
    setting: Setting
    length: int
    seed: int
    layers: list[int]
    steps: list[float]
    positions: list[float]
    read: list[NDArray[np.float64]]


def load_reads(folder: Path) -> list[Reads]:
    """Return the traced samples of a folder; none where there is no such file.

    Raises:
        InputError: a line is damaged.
    """
    path = folder / READS
    if not path.is_file():
        return []
    found = []
    for n, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        try:
            found.append(parse_reads(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"file {path}, line {n}: expected a trace of farkv eval, got {line[:60]!r} ({error!r}); remove it"
            ) from error
    return found


def parse_reads(line: dict[str, Any]) -> Reads:
    """Return one line, its shares as arrays."""
    read = [np.nan_to_num(np.asarray(layer, dtype=np.float64)) for layer in line["read"]]
    if not read or any(layer.ndim != 2 or not layer.size for layer in read):
        raise ValueError("read: expected layers of steps of positions")
    if len(line["layers"]) != len(read):
        raise ValueError(f"layers: expected {len(read)} ids")
    setting = Setting(str(line["method"]), float(line["fraction"]))
    steps, positions = ([float(edge) for edge in line[name]] for name in ("step_edges", "position_edges"))
    return Reads(
        str(line["task"]), setting, int(line["length"]), int(line["seed"]), list(line["layers"]), steps, positions, read
    )


def choose_reads(reads: Sequence[Reads], fraction: float) -> list[Reads]:
    """Return one traced sample per method: of the sample most methods have, the longest text first, near a fraction."""
    counts: dict[tuple[int, int, str], set[str]] = {}
    for line in reads:
        counts.setdefault((line.length, -line.seed, line.task), set()).add(line.setting.method)

    def rank(line: Reads) -> tuple[int, int, float]:
        place = (line.length, -line.seed, line.task)
        return -len(counts[place]), -line.length, abs(line.setting.fraction - fraction)

    chosen: dict[str, Reads] = {}
    for line in sorted(reads, key=rank):
        chosen.setdefault(line.setting.method, line)
    return [chosen[method] for method in order_methods(chosen)]


def write_png(shares: NDArray[np.float64]) -> str:
    """Return an image of one colour as a data address: opacity is the square root of the share.

    Args:
        shares: `[height, width]`, 0 to 1.
    """
    alpha = np.round(255 * np.sqrt(np.clip(shares, 0, 1))).astype(np.uint8)
    height, width = alpha.shape
    # Grey levels with a palette of opacities: one byte per pixel.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), alpha], axis=1).tobytes()
    blocks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(BLUE) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    made = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in blocks
    )
    return "data:image/png;base64," + base64.b64encode(made).decode("ascii")


def average_share(shares: NDArray[np.float64], steps: Sequence[float], positions: Sequence[float]) -> float:
    """Return the mean share of a layer, every bucket by its width."""
    for axis, edges in enumerate((steps, positions)):
        widths = np.diff(edges)
        if len(widths) == shares.shape[axis] and widths.sum() > 0:
            shares = np.average(shares, axis=axis, weights=widths, keepdims=True)
    return float(shares.mean())


def draw_layer(line: Reads, number: int) -> Html:
    """Return one layer's map with its axes."""
    shares = line.read[number]
    image = el(
        "image", x=LEFT, y=TOP, width=WIDTH, height=HEIGHT, preserveAspectRatio="none", class_="read",
        href=write_png(shares),
    )  # fmt: skip
    frame = el("rect", class_="frame", x=LEFT, y=TOP, width=WIDTH, height=HEIGHT)
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    names = [
        el("text", f"{line.steps[0]:.0f}", class_="tick", x=LEFT - 5, y=TOP + 10, text_anchor="end"),
        el("text", f"{line.steps[-1]:.0f}", class_="tick", x=LEFT - 5, y=bottom, text_anchor="end"),
        el("text", f"{line.positions[0]:.0f}", class_="tick", x=LEFT, y=bottom + 15),
        el("text", f"{line.positions[-1]:.0f}", class_="tick", x=right, y=bottom + 15, text_anchor="end"),
    ]
    name = f"layer {line.layers[number]}: {percent(average_share(shares, line.steps, line.positions))} read"
    said = f"{name}; position to the right, decode step downward"
    drawn = el("svg", image, frame, *names, viewBox=f"0 0 {right + 4} {bottom + 20}", role="img", aria_label=said)
    return el("figure", el("figcaption", name), drawn, class_="panel")


def draw_reads(line: Reads) -> Html:
    """Return all layers of one traced sample."""
    said = f"{name_setting(line.setting)}, {line.task}, {line.length} tokens, sample {line.seed}"
    layers = [draw_layer(line, number) for number in range(len(line.read))]
    return el("div", el("p", said, class_="soft"), el("div", *layers, class_="many"))


def draw_scale() -> Html:
    """Return what the opacities mean."""
    width = 46
    parts = []
    for i, share in enumerate(SCALE):
        box = {"x": 1 + width * i, "y": 1, "width": width - 2, "height": 14}
        parts.append(el("rect", class_="frame", **box))
        parts.append(el("rect", class_="read", fill_opacity=round(share**0.5, 3), **box))
        middle = width * (i + 0.5)
        parts.append(el("text", percent(share, 0), class_="tick", x=middle, y=30, text_anchor="middle"))
    size = width * len(SCALE) + 2
    said = "Scale: share of a bucket's records that a step and head read"
    return el(
        "svg", *parts, viewBox=f"0 0 {size} 34", width=size, height=34, class_="scale", role="img", aria_label=said
    )
