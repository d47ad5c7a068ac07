"""Where faults happen: a tiny random model, a text, its saved session, what each method answers. For `faults.py`."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import farkv
from farkv.errors import FarKVError
from farkv.hf.session import load_cache
from farkv.methods import Full, InfiniGen

N_TEXT, N_ASKED = 600, 4
METHODS = (InfiniGen(fraction=0.3), Full())
# Over pages a cap chooses among what has a copy in memory, and a fault leaves other copies there: no cap, no choice.
UNCAPPED = InfiniGen(fraction=1.0)
TIGHT = {"host": "560KiB"}


class Stage:
    """A model, a text and a question, what each method answers, and folders to work in."""

    def __init__(self, folder: Path, seed: int):
        self.rng, self.folder = random.Random(seed), folder
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=2048, initializer_range=0.2,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
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

    def answer(self, kind: str) -> torch.Tensor:
        """Read the text, or load its session, and ask."""
        with self.attach(kind) as far:
            return self.ask(load_cache(self.session, self.model) if kind == "session" else self.read(far))

    def judge(self, kind: str, work: Callable[[], torch.Tensor]) -> str:
        """Return what came of it."""
        try:
            same = torch.equal(work(), self.expected[type(self.method).__name__, kind])
        except FarKVError:
            return "refused"
        return "correct" if same else "wrong"


@contextmanager
def limit(which: int, n_bytes: int) -> Iterator[None]:
    """Lower a limit of this process for a while."""
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


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
