"""Filler text that every machine has: code, manuals, licences and prose from the running interpreter's own packages.

In: a kind, a side. Out: texts by name, and lines drawn from them. Every text is on one of two sides, by a hash of its
name: what a model is calibrated with (`farkv profile`) is not what it is measured on.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, distributions
from pathlib import Path

from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.errors import ConfigError
from farkv.files import read_file

# Texts of `code` are those that the demo model was not trained on; `english` is the same as `manuals`, on both sides.
FILLERS = ("mixed", "code", "manuals", "licences", "prose", "english")
MIXED = ("manuals", "licences", "prose", "code")
CALIBRATION_PERCENT = 25
LEAST_CHARACTERS, MOST_CHARACTERS = 1500, 120_000
# A text of which so much stands in others, line by line, is a copy; shorter lines are no one's own.
COPIED, TELLING = 0.5, 30
# Filler may be so many tokens short.
LEAST_LEFT = 40
MAX_FILE_BYTES = 2**24
LICENCE = re.compile(r"licen[cs]e|copying|notice", re.IGNORECASE)
# Where Linux distributions keep them.
COMMON_LICENCES = Path("/usr/share/common-licenses")


def calibrates(name: str) -> bool:
    """Return whether the text of this name is for calibration, not for measuring."""
    return int(hashlib.sha256(f"filler/{name}".encode()).hexdigest(), 16) % 100 < CALIBRATION_PERCENT


def read_filler(kind: str, *, calibration: bool = False) -> dict[str, str]:
    """Return the texts of a kind that measure, or those that calibrate, by name.

    Raises:
        ConfigError: the kind is unknown.
    """
    if kind not in FILLERS:
        raise ConfigError(f"filler: expected {', '.join(FILLERS[:-1])} or {FILLERS[-1]}, got {kind!r}")
    if kind == "english":
        return read_manuals()
    if kind == "mixed":
        return {n: text for each in MIXED for n, text in read_filler(each, calibration=calibration).items()}
    return read_calibration(kind) if calibration else read_side(kind, calibration=False)


def read_side(kind: str, *, calibration: bool) -> dict[str, str]:
    """Return the texts of one kind on one side, by their names alone."""
    if kind == "code":
        return read_code(calibration=calibration)
    texts = {"manuals": read_manuals, "licences": read_licences, "prose": read_prose}[kind]()
    return {name: text for name, text in texts.items() if calibrates(name) is calibration}


@cache
def read_calibration(kind: str) -> dict[str, str]:
    """Return what calibrates, less the near copies of what measures: most licences differ in names and years alone."""
    known = {line for text in read_side(kind, calibration=False).values() for line in list_telling(text)}
    texts = read_side(kind, calibration=True)
    return {name: text for name, text in texts.items() if share_known(text, known) < COPIED}


def list_telling(text: str) -> list[str]:
    """Return a text's lines that are long enough to be its own."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= TELLING]


def share_known(text: str, known: set[str]) -> float:
    """Return the share of a text's telling lines that are known."""
    lines = list_telling(text)
    return sum(line in known for line in lines) / max(1, len(lines))


def draw_lines(
    kind: str, size: int, seed: int, measure: Callable[[str], int], *, calibration: bool = False
) -> list[str]:
    """Return runs of consecutive lines from random places of random texts, of at most `size` together.

    `mixed` takes a run of each kind in turn, none longer than a quarter of the text, so that every text is of all of
    them.

    Args:
        measure: the size of a line, for example in tokens.
    """
    if kind != "mixed":
        return draw_filler(read_filler(kind, calibration=calibration), size, seed, measure)
    rng, lines, left = random.Random(seed), list[str](), size
    # All licences of a small installation may be copies of those that measure.
    kinds = [each for each in rng.sample(MIXED, len(MIXED)) if read_filler(each, calibration=calibration)]
    for turn in range(max(1, size)):
        each = kinds[turn % len(kinds)]
        run = draw_run(read_filler(each, calibration=calibration), min(left, size // 4), rng, measure)
        left -= sum(map(measure, run))
        lines += run
        # Less than a line is left, or a long one did not fit.
        if left < size // 50 or left < LEAST_LEFT:
            break
    return lines


def draw_run(texts: dict[str, str], size: int, rng: random.Random, measure: Callable[[str], int]) -> list[str]:
    """Return consecutive lines from a random place of a random text, as far as they fit."""
    lines = texts[rng.choice(sorted(texts))].splitlines(keepends=True)
    run: list[str] = []
    for line in lines[rng.randrange(len(lines)) :]:
        size -= measure(line)
        if size < 0:
            break
        run.append(line if line.endswith("\n") else line + "\n")
    return run


@cache
def read_code(*, calibration: bool) -> dict[str, str]:
    """Return library sources: those that trained the demo model calibrate, the others measure."""
    return read_sources(STDLIB, held_out=not calibration)


@cache
def read_manuals() -> dict[str, str]:
    """Return the interpreter's help texts: English prose about Python."""
    topics = import_module("pydoc_data.topics").topics
    return {name: text for name, text in sorted(topics.items()) if len(text) > 500}


@cache
def read_licences() -> dict[str, str]:
    """Return the licences of the installed packages and of the system, each text once."""
    found: dict[str, str] = {}
    for package in distributions():
        for file in package.files or []:
            if LICENCE.search(file.name) and file.suffix not in {".py", ".pyc", ".so"}:
                text = read_quietly(Path(str(package.locate_file(file))))
                found[f"{package.name}/{file.name}"] = text
    if COMMON_LICENCES.is_dir():
        found |= {path.name: read_quietly(path) for path in sorted(COMMON_LICENCES.iterdir())}
    return keep_distinct(found)


@cache
def read_prose() -> dict[str, str]:
    """Return the descriptions of the installed packages, as their authors wrote them for readers."""
    return keep_distinct({package.name: describe(package) for package in distributions()})


def describe(package: Distribution) -> str:
    """Return a package's long description; empty if it has none."""
    found = package.metadata.json.get("description", "")
    return found if isinstance(found, str) else ""


def read_quietly(path: Path) -> str:
    """Return the text of a file; empty where it cannot be read."""
    try:
        return read_file(path, MAX_FILE_BYTES).decode("utf-8")
    except (OSError, ValueError):
        return ""


def keep_distinct(texts: dict[str, str]) -> dict[str, str]:
    """Return the texts that are long enough, by name, without copies; the beginning of very long ones."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted(texts.items()):
        start = "".join(text.split())[:400]
        if len(text) >= LEAST_CHARACTERS and start not in seen:
            seen.add(start)
            found[name] = text[:MOST_CHARACTERS]
    return found


@cache
def read_vocabulary() -> tuple[str, ...]:
    """Return common English words of four to ten letters, from the manuals; the most frequent come first."""
    words = Counter(re.findall(r"\b[a-z]{4,10}\b", " ".join(read_manuals().values())))
    return tuple(sorted(words, key=lambda word: (-words[word], word))[:3000])
