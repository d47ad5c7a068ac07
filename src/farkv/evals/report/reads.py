"""Maps of reads: one per layer, position in the text to the right, decode steps downward.

In: lines of `reads.jsonl`. Out: images of one colour whose opacity shows the fraction read, so that they work in light
and dark mode.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farkv.config import is_number
from farkv.errors import InputError
from farkv.evals.cells import Setting
from farkv.evals.report.looks import order_methods
from farkv.evals.row import MAX_BYTES, READS
from farkv.files import read_file
from farkv.quote import quote
from farkv.untrusted import parse_json

BLUE = (47, 128, 225)


class Reads(NamedTuple):
    """One traced sample. read: `[layers][steps][positions]`, mean fraction of a bucket's records that a step and head
    read.
    """

    task: str
    setting: Setting
    length: int
    seed: int
    layers: list[int]
    steps: list[float]
    positions: list[float]
    read: list[NDArray[np.float64]]


def load_reads(folder: Path) -> list[Reads]:
    """Return the traced samples of a folder; empty if there is no such file.

    Raises:
        InputError: a line is damaged.
    """
    path = folder / READS
    if not path.is_file():
        return []
    try:
        lines = read_file(path, MAX_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"file {quote(path)}: cannot be read ({error}); remove it, or run farkv eval again") from error
    found = []
    for n, line in enumerate(lines, start=1):
        try:
            found.append(parse_reads(parse_json(line)))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"file {quote(path)}, line {n}: expected a trace of farkv eval, got {line[:60]!r} ({error!r:.200}); "
                "remove it"
            ) from error
    return found


def parse_reads(line: dict[str, Any]) -> Reads:
    """Parse one line; a bucket that nothing was read of may be null."""
    read = [np.nan_to_num(np.asarray(layer, dtype=np.float64)) for layer in line["read"]]
    if not read or any(layer.ndim != 2 or not layer.size or not (layer >= 0).all() for layer in read):
        raise ValueError("read: expected layers of steps of positions, fractions of 0 or more")
    layers = line["layers"]
    if not isinstance(layers, list) or len(layers) != len(read) or not all(type(i) is int for i in layers):
        raise ValueError(f"layers: expected {len(read)} ids")
    fraction, steps, positions = line["fraction"], line["step_edges"], line["position_edges"]
    for edges in (steps, positions):
        if not isinstance(edges, list) or not edges or not all(is_number(edge) for edge in edges):
            raise ValueError("step_edges and position_edges: expected numbers")
    length, seed = line["length"], line["seed"]
    if not is_number(fraction) or type(length) is not int or type(seed) is not int:
        raise ValueError("fraction, length and seed: expected numbers")
    setting = Setting(str(line["method"]), float(fraction))
    steps, positions = [float(edge) for edge in steps], [float(edge) for edge in positions]
    return Reads(str(line["task"]), setting, length, seed, layers, steps, positions, read)


def choose_reads(reads: Sequence[Reads], fraction: float) -> list[Reads]:
    """Return one trace per method: of the sample that most methods have, longest first, nearest to a fraction."""
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


def write_png(read: NDArray[np.float64]) -> str:
    """Return a single-colour image as a data URL; opacity is the square root of a value, so that 0.1 is visible.

    Args:
        read: `[height, width]`, 0 to 1.
    """
    alpha = np.round(255 * np.sqrt(np.clip(read, 0, 1))).astype(np.uint8)
    height, width = alpha.shape
    # A palette of 256 opacities of one colour: one byte per pixel.
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


def average_read(read: NDArray[np.float64], steps: Sequence[float], positions: Sequence[float]) -> float:
    """Return the mean fraction that a layer read, with buckets weighted by their width."""
    for axis, edges in enumerate((steps, positions)):
        widths = np.diff(edges)
        if len(widths) == read.shape[axis] and widths.sum() > 0:
            read = np.average(read, axis=axis, weights=widths, keepdims=True)
    return float(read.mean())
