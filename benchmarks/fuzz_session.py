"""Does any damaged or forged session file pass, crash the reader or eat memory? Random changes for a given time.

    python benchmarks/fuzz_session.py --minutes 10

In: small session files of several forms, changed at random: bytes (the digest no longer fits), headers (sealed again
with a right digest, as someone who knows the format would), or the file under an open session. Out: one JSON line. A
change must be refused with farkv's own error or change nothing; a sealed one may also be read, exactly as the
safetensors library reads it. Exits 1 where one was read otherwise, or raised any other error.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from farkv.errors import SessionError, StoreError
from farkv.session.file import Saved, write_saved
from farkv.session.header import ALIGN_BYTES, DTYPES, MAX_HEADER_BYTES, seal_header

# (notes, tensors as (name, dtype, shape, bytes), pages)
Content = tuple[Any, list[tuple[Any, ...]], bytes]
WARM_UP = 200
SIZES = [0, 1, -1, 2**31, 2**32 - 1, 2**53, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400]
TEXTS = ["", "pages", "page_crc", "__metadata__", "\ud800", "\0", "../x", "x" * 300, *DTYPES]
NASTY = [*SIZES, *TEXTS, 0.0, 1.5, 1e300, float("nan"), None, True, False, [], {}, [[]], {"": 0}]
LENGTHS = [0, 50, 4087, 4089, 2**20, 2**32, 2**63, 2**64 - 1]
BOMBS = ["[" * 100_000, '{"a":' * 50_000, "[[]" + ",[]" * 300_000 + "]", " " * 10**6]


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_bases(folder: Path) -> list[Path]:
    """Write sessions of several forms."""
    made = {name.lower(): torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    some = {"ids": torch.arange(40, dtype=torch.int32), "flags": torch.ones(5).bool(), "none": torch.empty(0, 3)}
    forms: list[tuple[dict[str, Any], dict[str, torch.Tensor], int, int]] = [
        ({"model": "tiny", "layers": [0, 1], "more": {"a": None}}, some, 5, 48),
        ({}, {}, 0, 64),
        ({"n": 1.5}, made, 1, 1),
        ({"text": "☺" * 20}, {"one": torch.tensor(3)}, 64, 512),
    ]
    paths = []
    for i, (notes, tensors, n_pages, page_bytes) in enumerate(forms):
        paths.append(folder / f"base{i}")
        pages = torch.randint(0, 256, (n_pages, page_bytes), dtype=torch.uint8)
        write_saved(paths[-1], notes, tensors, [pages], n_pages, page_bytes)
    return paths


def read_all(saved: Saved) -> Content:
    """Return all that is in a session."""
    pages = torch.empty(saved.n_pages, saved.page_bytes, dtype=torch.uint8)
    saved.reader.read(torch.arange(saved.n_pages), pages)
    named = [(n, t.dtype, tuple(t.shape), to_bytes(t)) for n in saved.names for t in [saved.tensor(n)]]
    return saved.notes, named, to_bytes(pages)


def read_otherwise(path: Path, names: list[str]) -> Content:
    """Return the same through the safetensors library."""
    with safe_open(str(path), framework="pt") as file:
        assert set(file.keys()) == {*names, "pages", "page_crc"}
        named = [(n, t.dtype, tuple(t.shape), to_bytes(t)) for n in names for t in [file.get_tensor(n)]]
        return json.loads(file.metadata()["notes"]), named, to_bytes(file.get_tensor("pages"))


def change_bytes(data: bytearray, rng: random.Random) -> None:
    """Make one change of a few bytes, half of them in the parts that are not padding."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 1500)
    at, n = rng.randrange(max(1, end)), rng.choice([1, 1, 2, 4, 8, 40])
    kind = rng.choice("flip set random insert delete cut extend move length".split())
    if kind == "flip":
        data[at : at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in data[at : at + 1])
    elif kind == "set":
        data[at : at + n] = bytes([rng.choice([0, 32, 34, 91, 123, 255])]) * len(data[at : at + n])
    elif kind == "random":
        data[at : at + n] = rng.randbytes(len(data[at : at + n]))
    elif kind == "insert":
        data[at:at] = rng.randbytes(n)
    elif kind == "delete":
        del data[at : at + n]
    elif kind == "cut":
        del data[at:]
    elif kind == "extend":
        data += rng.randbytes(n)
    elif kind == "move":
        to = rng.randrange(max(1, len(data)))
        data[to : to + n] = data[at : at + n]
    else:
        data[:8] = rng.choice([*LENGTHS, rng.randrange(2**64)]).to_bytes(8, "little")


def list_spots(tree: Any) -> list[tuple[Any, Any]]:
    """Return every place in a tree, as what holds it and its key there."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [spot for key in keys for spot in [(tree, key), *list_spots(tree[key])]]


def change_tree(root: dict[str, Any], rng: random.Random) -> None:
    """Change one value or key anywhere in a header; notes and checks are opened, too."""
    meta = root["__metadata__"]
    inner = rng.choice(["notes", "checks", None, None, None])
    tree = json.loads(meta[inner]) if inner else root
    spots = list_spots(tree)
    if spots:
        change_spot(*rng.choice(spots), rng.choice(spots)[0], rng)
    if inner:
        meta[inner] = json.dumps(tree) if isinstance(tree, dict) else str(tree)


def change_spot(where: Any, key: Any, other: Any, rng: random.Random) -> None:
    """Change one value or key; `other` is something from elsewhere."""
    value = where[key]
    kind = rng.choice("nasty nasty nudge nudge wrap drop rename copy dtype".split())
    if kind == "nudge" and type(value) is int:
        where[key] = rng.choice([value + 1, value - 1, -value, value * 2, value * 2**32, float(value), str(value)])
    elif kind == "wrap":
        where[key] = rng.choice([[value], {"a": value}, [value, value], str(value)])
    elif kind == "drop":
        del where[key]
    elif kind == "rename" and isinstance(where, dict):
        where[rng.choice(["pages", "page_crc", "dtype", "é", "a b", "new"])] = where.pop(key)
    elif kind == "copy":
        # A copy: a tree must not hold itself.
        where[key] = copy.deepcopy(other)
    elif kind == "dtype" and isinstance(where, dict) and "dtype" in where:
        where["dtype"] = rng.choice(list(DTYPES))
    else:
        # A copy: what is put into it later must not be in the next one, or in itself.
        where[key] = copy.deepcopy(rng.choice(NASTY))


def change_text(text: str, rng: random.Random) -> str:
    """Change a header's text where JSON's own structure is not kept."""
    at = rng.randrange(len(text))
    kind = rng.choice("bomb twice digits flip wide space".split())
    if kind == "bomb" and rng.random() < 0.1:
        return text[:at] + rng.choice(BOMBS) + text[at:]
    if kind == "twice":
        end = min(len(text), at + rng.randrange(1, 120))
        return text[:end] + text[at:end] + text[end:]
    if kind == "digits":
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        at = rng.choice(digits)
        return text[:at] + rng.choice(["9" * 25, "9" * 5000, "-", "1e5", "0.", "00"]) + text[at:]
    if kind == "wide":
        return text[:at] + rng.choice(["☺", "\\ud800", "\\u0000", "\0", "NaN", "Infinity", "//", "\\"]) + text[at:]
    if kind == "space":
        return text[:at] + rng.choice([" ", "\n", "\t"]) + text[at:]
    return text[:at] + chr(rng.randrange(32, 127)) + text[at + 1 :]


def seal(data: bytes, rng: random.Random) -> bytes:
    """Change a header and give it its right length and digest again."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].rstrip().decode("ascii")
    if rng.random() < 0.7:
        root = json.loads(text)
        try:
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                change_tree(root, rng)
            text = json.dumps(root, separators=(",", ":"))
        except (KeyError, TypeError, ValueError, OverflowError):
            # A first change has left nothing for the second one, or a number that is no float.
            text = change_text(text, rng)
    else:
        text = change_text(text, rng)
    head = text.encode("utf-8", "replace")[: MAX_HEADER_BYTES + 100]
    if rng.random() < 0.9:
        # As a writer pads it: what is wrong is the text alone.
        head += b" " * (-(8 + len(head)) % ALIGN_BYTES)
    tail = bytearray(data[end:])
    if rng.random() < 0.1 and tail:
        change_bytes(tail, rng)
    return seal_header(len(head).to_bytes(8, "little") + head) + tail


def try_changed(path: Path, base: bytes, right: Content, rng: random.Random) -> str:
    """Change bytes, then open and read."""
    data = bytearray(base)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        change_bytes(data, rng)
    path.write_bytes(data)
    return judge(Saved.open(path), lambda: right, "unchanged")


def try_open(path: Path, base: bytes, right: Content, rng: random.Random) -> str:
    """Open, then change bytes in place and read."""
    path.write_bytes(base)
    saved = Saved.open(path)
    data = bytearray(base)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        change_bytes(data, rng)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    return judge(saved, lambda: right, "unchanged")


def try_sealed(path: Path, base: bytes, right: Content, rng: random.Random) -> str:
    """Change a header, seal it again, then open and read."""
    path.write_bytes(seal(base, rng))
    saved = Saved.open(path)
    return judge(saved, lambda: read_otherwise(path, saved.names), "as safetensors reads it")


def judge(saved: Saved, expect: Callable[[], Content], name: str) -> str:
    """Read all and compare it."""
    try:
        return name if read_all(saved) == expect() else "wrong"
    finally:
        saved.close()


WAYS = {"bytes": try_changed, "sealed": try_sealed, "open": try_open}


def try_once(folder: Path, bases: list[tuple[bytes, Content]], rng: random.Random) -> str:
    """Make one change and return what came of it."""
    way = rng.choice(list(WAYS))
    path, (base, right) = folder / "changed", rng.choice(bases)
    try:
        outcome = WAYS[way](path, base, right, rng)
    except (SessionError, StoreError) as error:
        outcome = type(error).__name__
    except Exception as error:
        traceback.print_exc()
        outcome = f"other: {type(error).__name__}"
    if outcome == "wrong" or outcome.startswith("other"):
        kept = Path.cwd() / f"fuzz-{rng.getrandbits(32):08x}.farkv"
        kept.write_bytes(path.read_bytes())
        print(f"{way}: {outcome}, kept as {kept.name}", file=sys.stderr)
    return f"{way}: {outcome}"


def main() -> None:
    """Parse the command line, change files until the time is over, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default=10.0, type=float)
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng, outcomes = random.Random(args.seed), collections.Counter[str]()
    started = time.perf_counter()
    warm_rss = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = [(path.read_bytes(), read_all(Saved.open(path))) for path in write_bases(folder)]
        while time.perf_counter() - started < args.minutes * 60 or outcomes.total() <= WARM_UP:
            outcomes[try_once(folder, bases, rng)] += 1
            if outcomes.total() == WARM_UP:
                warm_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        open_files = len(os.listdir("/proc/self/fd"))
    wrong = sum(n for outcome, n in outcomes.items() if outcome.endswith("wrong"))
    other = sum(n for outcome, n in outcomes.items() if ": other: " in outcome)
    line = {
        "iterations": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong_answers": wrong,
        "other_exceptions": other,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_growth_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - warm_rss,
        "open_files": open_files,
        "seed": args.seed,
    }
    print(json.dumps(line))
    sys.exit(1 if wrong or other else 0)


if __name__ == "__main__":
    main()
