"""The text that the demo model learns from: the Python standard library, split by file.

In: the running interpreter's `lib/python3.*`. Out: lines of training files, of held-out files, and
of installed third-party packages. The split is the package's own (`farkv.demo.filler`);
`pydoc_data` (English text) is in neither part.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

from farkv.demo.filler import STDLIB, read_sources

THIRD_PARTY = ("pip", "numpy", "sympy", "jinja2", "networkx")


def read_stdlib(*, held_out: bool) -> dict[str, str]:
    """Read one side of the standard library's split; English `pydoc_data` is in neither."""
    files = read_sources(STDLIB, held_out=held_out)
    return {n: t for n, t in files.items() if not n.startswith("pydoc_data")}


def read_third_party(packages: tuple[str, ...] = THIRD_PARTY) -> dict[str, str]:
    """Read the sources of those of `packages` that are installed: filler never trained on."""
    site = Path(sysconfig.get_paths()["purelib"])
    files: dict[str, str] = {}
    for package in packages:
        if (site / package).is_dir():
            found = read_sources(site / package, held_out=None)
            files |= {f"{package}/{name}": text for name, text in found.items()}
    return files


def collect_words(files: dict[str, str], forbidden: set[str]) -> list[str]:
    """Collect lowercase words of 3 to 9 letters found at least 5 times, less forbidden ones."""
    counts: dict[str, int] = {}
    for text in files.values():
        for word in re.findall(r"(?<![A-Za-z])[a-z]{3,9}(?![A-Za-z])", text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(w for w, n in counts.items() if n >= 5 and w not in forbidden)
