"""Filler for demo prompts: standard-library files that the demo model was not trained on.

In: the running interpreter's library. Out: lines of code. A hash of a file's path decides whether it is held out;
`pydoc_data` (English text) is always held out.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKIPPED = {"site-packages", "__pycache__", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
HELD_OUT_PERCENT = 8


def is_held_out(path: str) -> bool:
    """Return whether the file with this path, relative to the library, is excluded from training."""
    if path.startswith("pydoc_data"):
        return True
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_sources(root: Path, *, held_out: bool | None) -> dict[str, str]:
    """Read the Python sources below `root`; `held_out` selects one side of the split, None reads all files."""
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if held_out is not None and (SKIPPED & set(Path(name).parts) or is_held_out(name) is not held_out):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 500 and max(map(len, text.splitlines())) < 400:
            files[name] = text
    return files


def draw_filler(files: dict[str, str], size: int, seed: int, measure: Callable[[str], int] = len) -> list[str]:
    """Return runs of consecutive lines from random positions in random files, about `size` in total.

    Args:
        files: from `read_sources`; English text is skipped.
        size: maximum total, in characters or in the unit of `measure`.
        seed: makes the text reproducible.
        measure: returns the size of one line, for example in tokens.
    """
    rng = random.Random(seed)
    names = sorted(n for n in files if not n.startswith("pydoc_data"))
    lines: list[str] = []
    got = 0
    while True:
        file_lines = files[rng.choice(names)].splitlines(keepends=True)
        for line in file_lines[rng.randrange(len(file_lines)) :]:
            got += measure(line)
            if got > size:
                return lines
            lines.append(line)
