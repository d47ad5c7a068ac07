"""Files that somebody else prepared: at every name that farkv writes, locks or reads."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fault_stage import in_child, limit

import farkv
from attacks.base import Attack, Verdict
from attacks.written import (
    LONG,
    OTHERS,
    VICTIM,
    WRITTEN,
    attempt_write,
    folder_with_victim,
    is_mine,
    is_open,
    is_unharmed,
    leftovers,
    make_measured,
    make_rows,
    plant,
    save_report,
)
from farkv.calibrate.plan import Plan
from farkv.errors import FarKVError
from farkv.evals.report import write_report
from farkv.session.file import Saved
from farkv.store.far.page_file import DiskSpace


def planted_beside(rng: random.Random) -> Verdict:
    """Something is at the name of the temporary file of a writer."""
    save, reads, name, _ = WRITTEN[rng.choice(list(WRITTEN))]
    with folder_with_victim() as (folder, victim):
        planted = folder / f".{name}.part"
        plant(rng, planted, victim)
        before = planted.lstat()[:6]
        said = attempt_write(save, reads, folder / name)
        same = os.path.lexists(planted)
        if not is_unharmed(victim) or not same or planted.lstat()[:6] != before:
            return "wrong"
        if said == "right" and not is_mine(folder / name):
            return "wrong"
        return said if leftovers(folder) <= {planted.name} else "wrong"


def planted_as_target(rng: random.Random) -> Verdict:
    """Something is at the name that is to be written."""
    save, reads, name, private = WRITTEN[rng.choice(list(WRITTEN))]
    with folder_with_victim() as (folder, victim):
        kind = plant(rng, folder / name, victim)
        said = attempt_write(save, reads, folder / name)
        if not is_unharmed(victim) or leftovers(folder):
            return "wrong"
        if said == "right" and (
            not is_mine(folder / name) or (private and kind == "stranger's" and is_open(folder / name))
        ):
            return "wrong"
        return said


def planted_lock(rng: random.Random) -> Verdict:
    """Something is at the name of a disk folder's lock."""
    with folder_with_victim() as (folder, victim):
        lock = folder / ".farkv.lock"
        if rng.random() < 0.2:
            # A file of the user's own, moved there by somebody who can write the folder.
            lock.write_bytes(VICTIM)
        else:
            plant(rng, lock, victim)
        before = lock.lstat()[:6], lock.read_bytes() if lock.is_file() and not lock.is_symlink() else b""

        def work() -> str:
            try:
                DiskSpace(folder, 1000).close()
            except FarKVError:
                return "refused"
            # Only a fresh lock is one, and nothing here is.
            return "adopted"

        said = in_child(work, seconds=4.0)
        after = lock.lstat()[:6], lock.read_bytes() if lock.is_file() and not lock.is_symlink() else b""
        return "refused" if said == "refused" and is_unharmed(victim) and after == before else "wrong"


def planted_part(rng: random.Random) -> Verdict:
    """An unfinished measurement that somebody else left is taken up, or what is there instead is written to."""
    model, prompts, left = make_measured()
    with folder_with_victim() as (folder, victim):
        part = folder / "p.safetensors.part"
        kind = plant(rng, part, victim)
        if kind in ("open to all", "stranger's", "second name") and rng.random() < 0.7:
            # It fits: digest and form are those of this measurement, for everybody knows how they are made.
            (victim if kind == "second name" else part).write_bytes(left)
        expected = victim.read_bytes()

        def work() -> str:
            try:
                farkv.profile(model, prompts, resume=part)
            except FarKVError:
                return "refused"
            return "adopted"

        said = in_child(work, seconds=8.0)
        there = os.path.lexists(part)
        return "refused" if said == "refused" and victim.read_bytes() == expected and there else "wrong"


def odd_reading(rng: random.Random) -> Verdict:
    """A session, plan, profile or result that is a pipe, a device, a folder or no name: refused, never waited for."""
    readers: list[Callable[[Path], Any]] = [
        Saved.open, Plan.load, farkv.Profile.load, lambda path: write_report(path.parent, path.with_name("out.html")),
    ]  # fmt: skip
    read = rng.choice(readers)
    with folder_with_victim() as (folder, _):
        path = folder / "results.jsonl"
        kind = rng.choice(["pipe", "socket", "device", "folder", "nul", "half", "loop"])
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        elif kind == "device":
            path.symlink_to(rng.choice(["/dev/null", "/dev/full"]))
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        else:
            path = folder / ("a\0b" if kind == "nul" else "half \ud800") / "results.jsonl"

        def work() -> str:
            try:
                read(path)
            except FarKVError:
                return "refused"
            return "read"

        return "refused" if in_child(work, seconds=4.0) == "refused" else "wrong"


def odd_names(rng: random.Random) -> Verdict:
    """Names as long as may be, of several lines, of bytes that are no text, or none at all."""
    save, reads, _, _ = WRITTEN[rng.choice(["session", "plan", "report"])]
    names = [
        LONG,
        "☺" * 85,
        "two\nlines",
        os.fsdecode(b"\xff\xfe"),
        " ",
        "[bold]",
        "-o",
        "\x1b[2J",
        "a:b",
        "a\0b",
        "\ud800",
    ]
    name = rng.choice(names)
    with folder_with_victim() as (folder, _):
        said = attempt_write(save, reads, folder / name)
        if said == "refused":
            # Only what no file can be called.
            return "refused" if name in ("a\0b", "\ud800") and os.listdir(folder) == [] else "wrong"
        return said if os.listdir(folder) == [name] else "wrong"


def full_disk(rng: random.Random) -> Verdict:
    """The disk is full before the file or in the middle of it: the old one stays, and nothing beside it."""
    kind = rng.choice(["session", "plan", "report", "calibration", "profile", "picture"])
    save, _, name, _ = WRITTEN.get(kind) or OTHERS[kind]
    with folder_with_victim() as (folder, _):
        path = folder / name
        if kind == "report":
            save_report(folder / "whole")
        else:
            save(folder / name)
            path.rename(folder / "whole")
        whole = (folder / "whole").read_bytes()
        had_old = rng.random() < 0.5
        if had_old:
            shutil.copyfile(folder / "whole", path)
        before = sorted(os.listdir(folder))

        def work() -> str:
            with limit(resource.RLIMIT_FSIZE, rng.randrange(len(whole) // 2)):
                return str(attempt_here(save, path))

        said = in_child(work, seconds=30.0)
        same = sorted(os.listdir(folder)) == before and (not had_old or path.read_bytes() == whole)
        return "refused" if said == "refused" and same else "wrong"


def attempt_here(save: Callable[[Path], None], path: Path) -> str:
    # Old matplotlib files are written piece by piece, and Linux sends a signal before it says no.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        save(path)
    except FarKVError:
        return "refused"
    return "written"


def read_by_others(rng: random.Random) -> Verdict:
    """Whatever holds somebody's text can be read by no one else, unless its owner said so."""
    kind = rng.choice(["session", "report", "lines"])
    before = os.umask(rng.choice([0o022, 0o002, 0o000]))
    try:
        with folder_with_victim() as (folder, _):
            if kind == "lines":
                path = folder / "results.jsonl"
                append_result(folder)
            else:
                save, _, name, _ = WRITTEN[kind]
                path = folder / name
                save(path)
            return "wrong" if is_open(path) else "right"
    finally:
        os.umask(before)


def append_result(folder: Path) -> None:
    """Write a row as an evaluation does."""
    from farkv.evals.row import Row
    from farkv.evals.run import Runner

    class Plan:
        pass

    runner = Runner(Plan(), folder, [], lambda items: iter(()), None)  # type: ignore[arg-type]
    runner._write(Row(**json.loads(make_rows().splitlines()[0])))


def killed_writer(rng: random.Random) -> Verdict:
    """A writer is killed at any moment, twice; a reader finds old or new, and the next writer leaves nothing behind."""
    save, reads, name, _ = WRITTEN[rng.choice(["session", "plan", "calibration"])]
    with folder_with_victim() as (folder, _):
        path = folder / name
        save(path)
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                with suppress(BaseException):
                    while True:
                        save(path)
                os._exit(0)
            time.sleep(rng.uniform(0.0, 0.01))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if not reads(path):
                return "wrong"
        save(path)
        return "right" if reads(path) and os.listdir(folder) == [name] else "wrong"


ATTACKS = {
    "beside": Attack(6, "something planted at the name of a writer's temporary file", planted_beside, 4, 60),
    "target": Attack(6, "something planted at the name that is written", planted_as_target, 4, 60),
    "lock": Attack(6, "something planted at the name of a disk folder's lock", planted_lock, 4, 60),
    "part": Attack(6, "a foreign or open unfinished profile", planted_part, 3, 40),
    "reading": Attack(6, "pipes, devices and names that are none, to be read", odd_reading, 4, 60),
    "names": Attack(9, "odd file names to be written: 255 bytes, lines, no UTF-8, NUL", odd_names, 4, 60),
    "full_disk": Attack(9, "the disk is full while something is saved", full_disk, 4, 60),
    "others": Attack(6, "others read what holds a user's text", read_by_others, 3, 30),
    "killed": Attack(6, "writers killed at any moment", killed_writer, 2, 30),
}
