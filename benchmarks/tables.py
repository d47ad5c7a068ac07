"""Fill the generated tables of README and docs from `benchmarks/results`.

python benchmarks/tables.py            # rewrite them
python benchmarks/tables.py --check    # fail if one differs from what would be written
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import allocate
import disk
import eviction
import evidence
import faults
import hot
import limits
import overhead
import prefill
import quality
import quant
import speed
import xkv_batch
import xkv_coverage
import xkv_light
import xkv_memory
import xkv_tables

import session

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def make_tables() -> dict[Path, dict[str, str]]:
    """Return the tables of every page."""
    whole = quality.format_table(RESULTS / "infinigen_quality.jsonl")
    return {
        ROOT / "README.md": {
            "headline": quality.format_headline(RESULTS / "infinigen_quality.jsonl"),
            "eval": evidence.format_short(),
            "speed": speed.format_decode((32768, 131072), short=True),
        },
        ROOT / "docs/evaluation.md": {"eval": evidence.format_methods(), "grids": evidence.format_grids()},
        ROOT / "docs/papers/infinigen.md": {
            "quality": whole,
            "limits": limits.format_table(RESULTS / "near_limits.jsonl"),
        },
        ROOT / "docs/papers/xkv.md": {
            "plan": xkv_tables.format_headline(),
            "keep": xkv_tables.format_keep(),
            "code": xkv_tables.format_code(),
            "agnostic": xkv_tables.format_agnostic(),
            "fetch": xkv_tables.format_fetch(),
            "least": xkv_tables.format_least(),
            "layers": xkv_tables.format_layers(),
            "coverage": xkv_coverage.format_table(RESULTS / "xkv_coverage.jsonl"),
            "memory": xkv_memory.format_table(RESULTS / "xkv_memory.jsonl"),
            "batch": xkv_batch.format_table(RESULTS / "xkv_batch.jsonl"),
            "allocate": allocate.format_table(RESULTS / "allocate.jsonl"),
            "light": xkv_light.format_table(RESULTS / "xkv_light.jsonl"),
        },
        ROOT / "docs/tiers.md": {
            "eviction": eviction.format_table(RESULTS / "eviction.jsonl"),
            "disk": disk.format_table(RESULTS / "disk.jsonl"),
            "disk-quality": disk.format_quality(RESULTS / "disk.jsonl"),
            "quant": quant.format_table(RESULTS / "quant.jsonl"),
            "prefill": prefill.format_table(RESULTS / "prefill.jsonl"),
            "hot": hot.format_table(RESULTS / "hot.jsonl"),
            "session": session.format_table(RESULTS / "session.jsonl"),
            "faults": faults.format_table(RESULTS / "faults.jsonl"),
        },
        ROOT / "docs/speed.md": {
            "decode": speed.format_decode(),
            "threads": speed.format_decode(name="threads"),
            "e2e": speed.format_model("e2e"),
            "calibrate": speed.format_calibration(),
            "short": speed.format_model("short"),
            "overhead": overhead.format_table(RESULTS / "overhead.jsonl"),
            "prefill": speed.format_prefill(),
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
    """Write or check."""
    stale = []
    for path, tables in make_tables().items():
        before = path.read_text()
        after = before
        for name, table in tables.items():
            after = fill(after, name, table)
        if "--check" not in sys.argv:
            path.write_text(after)
        elif after != before:
            stale.append(path.name)
    if stale:
        raise SystemExit(f"stale tables in {', '.join(stale)}: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
