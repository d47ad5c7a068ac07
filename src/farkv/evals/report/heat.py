"""Retrieval heat maps: the score of each method by the needle's depth and the text's length.

In: cells whose samples have the depth of the needle. Out: means and counts for `page.html`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from farkv.evals.cells import Cell, Setting, Study
from farkv.evals.report.looks import order_methods
from farkv.evals.stats import Floats

# Mean number of samples per field required to use more depth bins.
ENOUGH = 6
MOST_BINS = 10


class Map(NamedTuple):
    """One method's map: means and counts `[bins, lengths]`, NaN where there is no sample."""

    method: str
    lengths: list[int]
    means: Floats
    counts: Floats


def find_known(study: Study) -> list[Cell]:
    """Return the cells in which some sample has a depth."""
    return [cell for cell in study.cells if np.isfinite(cell.depths).any()]


def count_bins(cells: Sequence[Cell]) -> int:
    """Return the number of depth bins: 4 to 10, so that every field has a few samples."""
    by_length: Counter[int] = Counter()
    for cell in cells:
        by_length[cell.length] += int(np.isfinite(cell.depths).sum())
    return max(4, min(MOST_BINS, min(by_length.values()) // ENOUGH))


def bin_scores(cells: Sequence[Cell], setting: Setting, n_bins: int) -> tuple[list[int], Floats, Floats]:
    """Return the mean score of a setting by depth and length.

    Args:
        cells: with depths; those that the setting did not answer are skipped.
        setting: the setting to average.
        n_bins: number of depth bins.

    Returns:
        Lengths, means `[n_bins, lengths]`, NaN where there is no sample, and the counts.
    """
    lengths = sorted({cell.length for cell in cells})
    total, count = np.zeros((n_bins, len(lengths))), np.zeros((n_bins, len(lengths)))
    for cell in cells:
        if setting not in cell.settings:
            continue
        known = np.isfinite(cell.depths)
        bins = np.clip((cell.depths[known] * n_bins).astype(int), 0, n_bins - 1)
        column = lengths.index(cell.length)
        np.add.at(total[:, column], bins, cell.scores[known, cell.settings[setting]])
        np.add.at(count[:, column], bins, 1)
    return lengths, total / np.where(count > 0, count, np.nan), count


def make_maps(study: Study, fraction: float) -> list[Map]:
    """Return the maps of all methods at one fraction, the full cache's first."""
    cells = find_known(study)
    shown = {s.method: s for s in study.settings if s.is_full or s.fraction == fraction}
    maps = [Map(method, *bin_scores(cells, shown[method], count_bins(cells))) for method in order_methods(shown)]
    return [drawn for drawn in maps if drawn.counts.any()]


def count_samples(study: Study) -> dict[str, int]:
    """Return the tasks in the maps, and their samples per method."""
    tasks: Counter[str] = Counter()
    for cell in find_known(study):
        tasks[cell.task] += int(np.isfinite(cell.depths).sum())
    return tasks
