"""Where faults happen: a tiny random model, a text, its saved session, what each method answers. For `faults.py`."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from random_models import make_llama

import farkv
from farkv import FarKVError, Full, InfiniGen, load_cache

N_TEXT, N_ASKED = 600, 4
METHODS = (InfiniGen(fraction=0.3), Full())
# Over pages a cap chooses among what has a copy in memory, and a fault leaves other copies there: no cap, no choice.
UNCAPPED = InfiniGen(fraction=1.0)
TIGHT = {"host": "560KiB"}


class Stage:
    """A model, a text and a question, what each method answers, and folders to work in."""

    def __init__(self, folder: Path, seed: int):
        self.rng, self.folder = random.Random(seed), folder
        shape = dict(layers=4, heads=4, kv_heads=2, hidden=32, mlp=48, vocabulary=97)
        self.model = make_llama(2048, seed=0, **shape, initializer_range=0.2)
        self.text = torch.randint(1, 97, (1, N_TEXT))
        self.question = torch.randint(1, 97, (1, N_ASKED))
        self.method = METHODS[0]
        self.session = folder / "book.farkv"
        with self.attach("ram") as far:
            self.read(far).save(self.session)
        self.expected: dict[tuple[str, str], torch.Tensor] = {}
        for method in METHODS:
            self.method = method
            for name in ("pages", "session", "ram", "near"):
                self.expected[type(method).__name__, name] = self.answer(name)

    def turn(self, seed: int) -> None:
        """Begin another run."""
        self.rng = random.Random(seed)
        self.method = METHODS[seed % len(METHODS)]

    def attach(self, kind: str, **options: Any) -> Any:
        pages = {"disk": f"{self.folder}/kv:50MiB", "host": "1100KiB"}
        own = {"pages": pages, "session": TIGHT, "ram": {}, "near": {"near": "200KiB"}}[kind]
        method = UNCAPPED if kind in ("pages", "session") and isinstance(self.method, InfiniGen) else self.method
        return farkv.attach(self.model, method, **{**own, **options})

    def read(self, far: Any, **options: Any) -> Any:
        cache = far.new_cache(**options)
        self.model(self.text, past_key_values=cache)
        return cache

    def ask(self, cache: Any) -> torch.Tensor:
        return torch.cat([self.model(t, past_key_values=cache).logits for t in self.question.split(1, 1)], 1)

    def load(self) -> Any:
        return load_cache(self.session, self.model)

    def answer(self, kind: str) -> torch.Tensor:
        """Read the text, or load its session, and ask."""
        with self.attach(kind) as far:
            return self.ask(self.load() if kind == "session" else self.read(far))

    def judge(self, kind: str, work: Callable[[], torch.Tensor] | None = None) -> str:
        """Return what came of some work, or of asking as usual."""
        try:
            same = torch.equal(work() if work else self.answer(kind), self.expected[type(self.method).__name__, kind])
        except FarKVError:
            return "refused"
        return "correct" if same else "wrong"

    def confirm(self, outcome: str, kind: str, work: Callable[[], torch.Tensor] | None = None) -> str:
        """Return an outcome if asking afterwards gives the right answer."""
        return outcome if self.judge(kind, work) == "correct" else "wrong"

    def save(self, cache: Any) -> str:
        """Save over the session; return what came of it."""
        try:
            cache.save(self.session)
        except FarKVError:
            return "refused"
        return "correct"


def flip(fd: int, at: int, bit: int) -> None:
    """Turn one bit of a file."""
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1 << bit]), at)


@contextmanager
def limit(which: int, n_bytes: int) -> Iterator[None]:
    """Lower a limit of this process for a while."""
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@contextmanager
def saver(stage: Stage, cache: Any, times: int = 10**9) -> Iterator[int]:
    """Give the id of a forked process that saves over and over; wait for its end."""
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            for _ in range(times):
                stage.save(cache)
        os._exit(0)
    try:
        yield pid
    finally:
        os.waitpid(pid, 0)


def in_child(work: Callable[[], str], seconds: float = 60.0) -> str:
    """Run in a forked process; return what it returned, or how it ended."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = work()
        except BaseException as error:
            said = f"other: {error!r}"
        os.write(into, said.encode()[:4000])
        os._exit(0)
    os.close(into)
    until = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    with os.fdopen(out, "rb") as file:
        return file.read().decode() or "other: it hung or was killed"


def damage(stage: Stage, change: Callable[[], None]) -> str:
    """Change the session's file before it is opened or while it is open, and put it back."""
    whole, is_open = stage.session.read_bytes(), stage.rng.random() < 0.5

    def work() -> torch.Tensor:
        with stage.attach("session"):
            cache = stage.load() if is_open else None
            change()
            return stage.ask(cache or stage.load())

    outcome = stage.judge("session", work)
    # In place: whoever has the file open sees it whole again.
    with stage.session.open("r+b") as file:
        file.write(whole)
    return outcome


def both(stage: Stage, kind: str, start: Callable[[Any], Any], other: Callable[[Any], str]) -> str:
    """Do something in a forked process while a cache is open; both must be right."""
    said: list[str] = []

    def work() -> torch.Tensor:
        with stage.attach(kind) as far:
            cache = start(far)
            said.append(in_child(lambda: other(cache)))
            return stage.ask(cache)

    return said[0] if stage.judge(kind, work) == "correct" else "wrong"
