"""What the attacks on files let farkv write, how it is read back, and what is planted. No attack is here."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fault_stage import in_child
from random_models import make_llama

import farkv
from attacks.base import Verdict
from farkv.calibrate.plan import Allocation, Plan
from farkv.errors import FarKVError
from farkv.evals.report import write_report
from farkv.session.file import Saved, write_saved

VICTIM = b"12345 dear diary"
STRANGER = 4321
IS_ROOT = os.geteuid() == 0
LONG = "n" * 255


@contextmanager
def folder_with_victim() -> Iterator[tuple[Path, Path]]:
    """Give a folder to work in, and a file beside it that nobody may touch."""
    with tempfile.TemporaryDirectory() as name:
        victim, folder = Path(name, "victim"), Path(name, "folder")
        victim.write_bytes(VICTIM)
        folder.mkdir()
        yield folder, victim


# --- what farkv writes, and how it is read back ------------------------------------------------------------------


def make_plan(share: float = 0.25) -> Plan:
    part = Allocation((share, 0.5), 0, "xkv", {"ratio": 0.3}, (0.9, 0.9), (0.8, 0.8))
    return Plan({"architecture": "tiny"}, (0, 1), {"keep": part})


def save_session(path: Path) -> None:
    pages = torch.arange(64, dtype=torch.uint8).view(4, 16)
    write_saved(path, {"who": "me"}, {"ids": torch.arange(4)}, [pages], 4, 16)


def reads_session(path: Path) -> bool:
    saved = Saved.open(path)
    try:
        return saved.notes == {"who": "me"} and saved.tensor("ids").tolist() == [0, 1, 2, 3]
    finally:
        saved.close()


@cache
def make_rows() -> str:
    one: dict[str, Any] = dict(task="vt", length=2048, seed=0, answer="a", expected=["a"], score=1.0, prompt_sha="0")
    one |= dict.fromkeys(("read_fraction", "index_fraction", "resident_fraction", "kept_fraction"), 1.0)
    one |= dict(gated=False, tokens=9, steps=3, agrees=True, kl=None, nll=None, depth=0.5)
    rows = [one | dict(method="full", fraction=1.0), one | dict(method="infinigen", fraction=0.1)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@cache
def make_results() -> tempfile.TemporaryDirectory[str]:
    """Return a folder of results, made before any disk is full."""
    made = tempfile.TemporaryDirectory()
    Path(made.name, "results.jsonl").write_text(make_rows())
    return made


def save_report(path: Path) -> None:
    write_report(Path(make_results().name), path)


def save_calibration(path: Path) -> None:
    from farkv.calibrate import crossover

    with environment("FARKV_CACHE_DIR", str(path.parent)):
        made = crossover.save_crossover("plain", crossover.RecordShape(2, 8, 2, "float32"), 5, {})
        if made != path:
            made.replace(path)


def read_calibration(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["entries"]


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


# What is written: how, whether it is right when it is read, the name that it must have, whether it is private.
Written = tuple[Callable[[Path], None], Callable[[Path], bool], str, bool]
WRITTEN: dict[str, Written] = {
    "session": (save_session, reads_session, "book.farkv", True),
    "plan": (lambda path: make_plan().save(path), lambda path: Plan.load(path) == make_plan(), "plan.json", False),
    "report": (save_report, lambda path: path.read_text().rstrip().endswith("</html>"), "report.html", True),
    "calibration": (save_calibration, lambda path: bool(read_calibration(path)), "calibration.json", False),
}  # fmt: skip


def plant(rng: random.Random, path: Path, victim: Path) -> str:
    """Put something at a name that is not what farkv would have put there; return what."""
    kinds = ["link", "dangling link", "second name", "pipe", "socket", "folder", "open to all"]
    kind = rng.choice(kinds + ["stranger's"] * 2 * IS_ROOT)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(path.parent.parent / "elsewhere")
    elif kind == "second name":
        path.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"")
        path.chmod(0o666)
        if kind == "stranger's":
            os.chown(path, STRANGER, STRANGER)
    return kind


def is_unharmed(victim: Path) -> bool:
    return victim.read_bytes() == VICTIM and not (victim.parent / "elsewhere").exists()


def attempt_write(save: Callable[[Path], None], reads: Callable[[Path], bool], path: Path) -> Verdict:
    """Write in a process of its own, which may hang; say what came of it."""

    def work() -> str:
        try:
            save(path)
        except FarKVError:
            return "refused"
        return "right" if reads(path) else "wrong"

    said = in_child(work, seconds=4.0)
    return said if said in ("right", "refused") else "wrong"  # type: ignore[return-value]


def is_mine(path: Path) -> bool:
    info = path.lstat()
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and info.st_nlink == 1


def is_open(path: Path) -> bool:
    """Return whether others can read a file, or write it."""
    return bool(path.stat().st_mode & 0o066)


def leftovers(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith(".part")}


@cache
def make_measured() -> tuple[Any, list[torch.Tensor], bytes]:
    """Return a tiny model, prompts, and what an interrupted measurement of them leaves."""
    model = make_llama(512, seed=0, layers=2, heads=2, kv_heads=1, hidden=16, mlp=16, vocabulary=37)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 37, (40,), generator=generator) for _ in range(2)]

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as name:
        with suppress(KeyboardInterrupt):
            farkv.profile(model, prompts, resume=Path(name, "part"), on_prompt=stop)
        return model, prompts, Path(name, "part").read_bytes()


def save_profile(path: Path) -> None:
    make_profile().save(path)


@cache
def make_profile() -> Any:
    model, prompts, _ = make_measured()
    return farkv.profile(model, prompts)


def save_picture(path: Path) -> None:
    from farkv.plot import plot_plan

    curves = make_profile().curves()
    plot_plan(make_plan(), curves, path)


OTHERS: dict[str, Written] = {
    "profile": (save_profile, lambda path: bool(farkv.Profile.load(path).tensors), "p.safetensors", False),
    "picture": (save_picture, lambda path: path.read_bytes()[:4] == b"\x89PNG", "plan.png", False),
}
