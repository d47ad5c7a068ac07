"""The text that the demo model learns from: the Python standard library, split by file.

In: the running interpreter's `lib/python3.*`. Out: lines of training files, of held-out files, and
of installed third-party packages. A file is held out when a hash of its relative path says so;
`pydoc_data` (English text) is in neither part.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKIPPED = {"site-packages", "__pycache__", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
HELD_OUT_PERCENT = 8
THIRD_PARTY = ("pip", "numpy", "sympy", "jinja2", "networkx")


def is_held_out(path: str) -> bool:
    """Say whether the file with this path, relative to the library, is never trained on."""
    if path.startswith("pydoc_data"):
        return True
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_files(root: Path, *, held_out: bool | None) -> dict[str, str]:
    """Read the Python sources below `root`; `held_out` chooses the split's side, None takes all."""
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if held_out is not None and SKIPPED & set(Path(name).parts):
            continue
        if held_out is not None and is_held_out(name) is not held_out:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 500 and len(max(text.splitlines(), key=len)) < 400:
            files[name] = text
    return files


def read_stdlib(*, held_out: bool) -> dict[str, str]:
    """Read one side of the standard library's split; English `pydoc_data` is in neither."""
    files = read_files(STDLIB, held_out=held_out)
    return {n: t for n, t in files.items() if not n.startswith("pydoc_data")}


def read_third_party(packages: tuple[str, ...] = THIRD_PARTY) -> dict[str, str]:
    """Read the sources of those of `packages` that are installed: filler never trained on."""
    site = Path(sysconfig.get_paths()["purelib"])
    files: dict[str, str] = {}
    for package in packages:
        if (site / package).is_dir():
            found = read_files(site / package, held_out=None)
            files |= {f"{package}/{name}": text for name, text in found.items()}
    return files


def collect_words(files: dict[str, str], forbidden: set[str]) -> list[str]:
    """Collect lowercase words of 3 to 9 letters found at least 5 times, less forbidden ones."""
    counts: dict[str, int] = {}
    for text in files.values():
        for word in re.findall(r"(?<![A-Za-z])[a-z]{3,9}(?![A-Za-z])", text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(w for w, n in counts.items() if n >= 5 and w not in forbidden)
