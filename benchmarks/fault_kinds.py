"""The faults: each is injected once, at a random moment, and says what came of it. For `faults.py`.

In: a stage. Out: "correct", "refused" (farkv's own error), or "wrong".
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fault_stage import METHODS, N_ASKED, Stage, in_child, limit

from farkv.errors import FarKVError
from farkv.hf.session import load_cache


def full_disk_while_saving(stage: Stage) -> str:
    """The disk is full before the session is written over an old one."""
    stage.method = METHODS[0]
    with stage.attach("ram") as far:
        cache = stage.read(far)
        with limit(resource.RLIMIT_FSIZE, stage.rng.randrange(stage.session.stat().st_size)):
            try:
                cache.save(stage.session)
            except FarKVError:
                return "refused"
    return "wrong"


def full_disk_under_pages(stage: Stage) -> str:
    """The disk is full in the middle of the prompt; then there is room again, and the same cache goes on."""
    with stage.attach("pages") as far:
        cache, kept = far.new_cache(), "correct"
        with limit(resource.RLIMIT_FSIZE, stage.rng.randrange(1, 300_000)):
            try:
                stage.model(stage.text, past_key_values=cache)
            except FarKVError:
                kept = "refused"
        if kept == "refused":
            stage.model(stage.text, past_key_values=cache)
        went_on = stage.judge("pages", lambda: stage.ask(cache))
        return kept if went_on == "correct" else "wrong"


def flip(fd: int, at: int, bit: int) -> None:
    """Turn one bit of a file."""
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1 << bit]), at)


def flipped_bit_in_a_session(stage: Stage) -> str:
    """One bit of the file is another one, before it is opened or while it is open."""
    is_open = stage.rng.random() < 0.5
    fd = os.open(stage.session, os.O_RDWR)
    at, bit = stage.rng.randrange(stage.session.stat().st_size), stage.rng.randrange(8)

    def work() -> torch.Tensor:
        with stage.attach("session"):
            cache = load_cache(stage.session, stage.model) if is_open else None
            flip(fd, at, bit)
            return stage.ask(cache or load_cache(stage.session, stage.model))

    outcome = stage.judge("session", work)
    flip(fd, at, bit)
    os.close(fd)
    return outcome


def cut_session(stage: Stage) -> str:
    """The file is shorter than it was, before it is opened or while it is open."""
    whole, is_open = stage.session.read_bytes(), stage.rng.random() < 0.5

    def work() -> torch.Tensor:
        with stage.attach("session"):
            cache = load_cache(stage.session, stage.model) if is_open else None
            os.truncate(stage.session, stage.rng.randrange(len(whole)))
            return stage.ask(cache or load_cache(stage.session, stage.model))

    outcome = stage.judge("session", work)
    stage.session.write_bytes(whole)
    return outcome


def flipped_bit_in_pages(stage: Stage) -> str:
    """One bit of the page file is another one for a while; then the same cache goes on."""
    with stage.attach("pages") as far:
        cache = stage.read(far)
        fd = cache.engine.store.page_cache.pages.file._fd
        cache.engine.store.page_cache.make_room(2**40)
        path = f"/proc/self/fd/{fd}"
        other = os.open(path, os.O_RDWR)
        at, bit = stage.rng.randrange(os.stat(path).st_size), stage.rng.randrange(8)
        flip(other, at, bit)
        length = cache.get_seq_length()
        outcome = stage.judge("pages", lambda: stage.ask(cache))
        flip(other, at, bit)
        os.close(other)
        cache.step_back(cache.get_seq_length() - length)
        return outcome if stage.judge("pages", lambda: stage.ask(cache)) == "correct" else "wrong"


def permission_denied(stage: Stage) -> str:
    """Neither the session's folder nor the disk's can be written, or the session not be read."""
    closed = stage.folder / "closed"
    closed.mkdir(exist_ok=True)
    other = closed / "a.farkv"
    other.write_bytes(stage.session.read_bytes())
    other.chmod(0)
    closed.chmod(0o555)
    kind = stage.rng.choice(["save", "disk", "load"])
    is_root = os.geteuid() == 0

    def work() -> torch.Tensor:
        with stage.attach("session", **({"disk": f"{closed}:1MiB"} if kind == "disk" else {})) as far:
            cache = load_cache(other, stage.model) if kind == "load" else stage.read(far)
            cache.save(closed / "b.farkv")
            return stage.ask(cache)

    try:
        if is_root:
            os.seteuid(65534)
        return stage.judge("session", work)
    finally:
        if is_root:
            os.seteuid(0)
        closed.chmod(0o755)


def killed_while_saving(stage: Stage) -> str:
    """A process is killed at any moment of saving over an old session; its remains hinder nobody."""
    # What Full reads has no index, so another method could not ask it.
    stage.method = METHODS[0]
    with stage.attach("ram") as far:
        cache = stage.read(far)
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                while True:
                    cache.save(stage.session)
            os._exit(1)
        time.sleep(stage.rng.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    outcome = stage.judge("session", lambda: stage.answer("session"))
    with stage.attach("ram") as far:
        stage.read(far).save(stage.session)
    return outcome if sorted(p.name for p in stage.folder.glob("*book*")) == ["book.farkv"] else "wrong"


def no_memory(stage: Stage) -> str:
    """The system refuses memory for a long context; a shorter one still finds its own."""

    def work() -> str:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with limit(resource.RLIMIT_AS, used + 2**30), stage.attach("ram") as far:
            tokens = stage.rng.randrange(2**25, 2**28)
            outcome = stage.judge("ram", lambda: stage.ask(stage.read(far, tokens=tokens)))
            return outcome if stage.judge("ram", lambda: stage.ask(stage.read(far))) == "correct" else "wrong"

    return in_child(work)


def interrupt(stage: Stage, error: BaseException) -> str:
    """Stop a pass in some block of some step by `error`, then run it again on the same cache."""
    kind = stage.rng.choice(["pages", "session", "ram"])
    block = stage.model.model.layers[stage.rng.randrange(4)]
    place = stage.rng.choice([block, block.self_attn, block.mlp])
    when = stage.rng.randrange(0 if kind != "session" else 1, N_ASKED + 1)

    def fail(module: Any, args: Any, out: Any) -> None:
        raise error

    def run(tokens: torch.Tensor, step: int, cache: Any) -> torch.Tensor:
        if step == when:
            hook = place.register_forward_hook(fail)
            with suppress(type(error)):
                stage.model(tokens, past_key_values=cache)
            hook.remove()
        return stage.model(tokens, past_key_values=cache).logits

    def work() -> torch.Tensor:
        with stage.attach(kind) as far:
            cache = load_cache(stage.session, stage.model) if kind == "session" else far.new_cache()
            if kind != "session":
                run(stage.text, 0, cache)
            return torch.cat([run(t, i, cache) for i, t in enumerate(stage.question.split(1, 1), 1)], 1)

    return stage.judge(kind, work)


def exception_in_a_hook(stage: Stage) -> str:
    """Somebody's hook raises in the middle of a pass."""
    return interrupt(stage, ValueError("a hook fails"))


def cancelled_request(stage: Stage) -> str:
    """Ctrl-C in the middle of a pass: torch calls no hook after it."""
    return interrupt(stage, KeyboardInterrupt())


def exception_in_the_worker(stage: Stage) -> str:
    """The link's thread fails; the step is asked again."""
    left = [stage.rng.randrange(1, 4)]  # What is hot does not cross, so few fetches come by.

    def work() -> torch.Tensor:
        with stage.attach("near") as far:
            cache = stage.read(far)
            count = cache.engine.store.on_fetch

            def fail(n_bytes: int) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError("the link fails")
                count(n_bytes)

            cache.engine.store.on_fetch = fail
            out = []
            for token in stage.question.split(1, 1):
                with suppress(OSError):
                    out.append(stage.model(token, past_key_values=cache).logits)
                    continue
                out.append(stage.model(token, past_key_values=cache).logits)
            return torch.cat(out, 1)

    return stage.judge("near", work)


def two_processes_on_one_disk(stage: Stage) -> str:
    """Another process wants the folder that is in use."""

    def other() -> str:
        stage.model.set_attn_implementation("sdpa")
        return stage.judge("pages", lambda: stage.answer("pages"))

    def work() -> torch.Tensor:
        with stage.attach("pages") as far:
            cache = stage.read(far)
            said.append(in_child(other))
            return stage.ask(cache)

    said: list[str] = []
    outcome = stage.judge("pages", work)
    return said[0] if outcome == "correct" else "wrong"


def two_processes_on_one_session(stage: Stage) -> str:
    """Two processes write the same session at once."""

    def work() -> str:
        try:
            cache.save(stage.session)
        except FarKVError:
            return "refused"
        return "correct"

    stage.method = METHODS[0]
    with stage.attach("ram") as far:
        cache = stage.read(far)
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                for _ in range(5):
                    work()
            os._exit(0)
        said = [work() for _ in range(5)]
        os.waitpid(pid, 0)
    whole = stage.judge("session", lambda: stage.answer("session"))
    return ("refused" if "refused" in said else "correct") if whole == "correct" else "wrong"


def forked(stage: Stage) -> str:
    """A process forks with an open session; both go on asking it."""

    def work() -> torch.Tensor:
        with stage.attach("session"):
            cache = load_cache(stage.session, stage.model)
            stage.model(stage.question[:, :1], past_key_values=cache)
            cache.step_back(1)
            said.append(in_child(lambda: stage.judge("session", lambda: stage.ask(cache))))
            return stage.ask(cache)

    said: list[str] = []
    outcome = stage.judge("session", work)
    return said[0] if outcome == "correct" else "wrong"


FAULTS: dict[str, Callable[[Stage], str]] = {
    fault.__name__: fault
    for fault in (
        full_disk_while_saving, full_disk_under_pages, flipped_bit_in_a_session, cut_session, flipped_bit_in_pages,
        permission_denied, killed_while_saving, no_memory, exception_in_a_hook, cancelled_request,
        exception_in_the_worker, two_processes_on_one_disk, two_processes_on_one_session, forked,
    )
}  # fmt: skip
