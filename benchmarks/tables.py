"""Fill the generated tables of README and docs from `benchmarks/results`.

python benchmarks/tables.py            # rewrite them
python benchmarks/tables.py --check    # fail if one differs from what would be written
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import allocate
import chunking
import demo_eval
import disk
import drift
import eviction
import evidence_every
import evidence_tables
import far
import far_quality
import faults
import gpu
import hot
import limits
import matrix_table
import overhead
import page_sizes
import prefill
import quality
import quant
import reliability
import rss
import speed
import weights
import xkv_batch
import xkv_coverage
import xkv_light
import xkv_memory
import xkv_tables

import session

ROOT = Path(__file__).parent.parent
# By page and by the name in the page's markers.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "headline": evidence_tables.format_headline,
        "eval": evidence_tables.format_short,
        "speed": partial(speed.format_decode, (32768, 131072), short=True),
    },
    "docs/evaluation.md": {
        "models": evidence_tables.format_models,
        "tasks": evidence_tables.format_tasks,
        "every": evidence_every.format_every,
        "orders": evidence_tables.format_orders,
        "index": evidence_tables.format_index,
        "ahead": evidence_tables.format_ahead,
        "profile": evidence_tables.format_profile,
        "kept": evidence_tables.format_kept,
        "kvpress": evidence_tables.format_kvpress,
    },
    "docs/evaluation_demo.md": {"eval": demo_eval.format_methods, "grids": demo_eval.format_grids},
    "docs/papers/infinigen.md": {
        "quality": quality.format_table,
        "chunking": chunking.format_table,
        "drift": drift.format_table,
        "limits": limits.format_table,
    },
    "docs/papers/xkv.md": {
        **xkv_tables.TABLES,
        "coverage": xkv_coverage.format_table,
        "memory": xkv_memory.format_table,
        "batch": xkv_batch.format_table,
        "allocate": allocate.format_table,
        "light": xkv_light.format_table,
    },
    "docs/tiers.md": {
        "eviction": eviction.format_table,
        "far": far.format_table,
        "far-quality": far_quality.format_table,
        "page-sizes": page_sizes.format_table,
        "disk-quality": disk.format_quality,
        "quant": quant.format_table,
        "prefill": prefill.format_table,
        "hot": hot.format_table,
        "session": session.format_table,
        "faults": faults.format_table,
    },
    "docs/reliability.md": {"attacks": reliability.format_table, "rss": rss.format_table},
    "docs/supported.md": {"summary": matrix_table.format_summary, "matrix": matrix_table.format_table},
    "docs/speed.md": {
        "decode": speed.format_decode,
        "threads": partial(speed.format_decode, name="threads"),
        "wide": partial(speed.format_decode, name="wide"),
        "e2e": partial(speed.format_model, "e2e"),
        "whole": speed.format_whole,
        "calibrate": speed.format_calibration,
        "short": partial(speed.format_model, "short"),
        "overhead": overhead.format_table,
        "prefill": speed.format_prefill,
        "weights": weights.format_table,
        "gpu": gpu.format_published,
    },
}


def fill(text: str, name: str, table: str) -> str:
    """Put a table between its markers."""
    pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    filled, n = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    if n != 1:
        raise SystemExit(f"expected one pair of markers {name}:begin and {name}:end, found {n}")
    return filled


def main() -> None:
    stale = []
    for page, tables in TABLES.items():
        path = ROOT / page
        before = after = path.read_text()
        for name, make in tables.items():
            after = fill(after, name, make())
        if "--check" not in sys.argv:
            path.write_text(after)
        elif after != before:
            stale.append(path.name)
    if stale:
        raise SystemExit(f"stale tables in {', '.join(stale)}: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
