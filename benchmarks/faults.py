"""What comes of a fault? Real ones, injected at random moments: a right answer, a refusal in words, or a wrong answer.

    python benchmarks/faults.py --runs 20

In: a tiny random model, a text, its saved session. Out: a JSON line per fault with the runs that gave the right answer,
a farkv error, or anything else; a table at the end. Every run ends with a check that what was there before still
answers right; a run that fails it counts as wrong. Exits 1 where something was wrong.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fault_stage import METHODS, N_ASKED, Stage, both, damage, flip, in_child, limit, saver
from rows import RESULTS, format_rows, read_rows
from runs import Recorder, make_parser, read_names

from farkv import FarKVError, load_cache


def full_disk_while_saving(stage: Stage) -> str:
    """The disk is full before the session is written over an old one."""
    stage.method = METHODS[0]
    with stage.attach("ram") as far:
        cache = stage.read(far)
        with limit(resource.RLIMIT_FSIZE, stage.rng.randrange(stage.session.stat().st_size)):
            return "refused" if stage.save(cache) == "refused" else "wrong"


def full_disk_under_pages(stage: Stage) -> str:
    """The disk is full in the middle of the prompt; then there is room again, and the same cache goes on."""
    with stage.attach("pages") as far:
        cache, outcome = far.new_cache(), "correct"
        with limit(resource.RLIMIT_FSIZE, stage.rng.randrange(1, 300_000)):
            try:
                stage.model(stage.text, past_key_values=cache)
            except FarKVError:
                outcome = "refused"
        if outcome == "refused":
            stage.model(stage.text, past_key_values=cache)
        return stage.confirm(outcome, "pages", lambda: stage.ask(cache))


def flipped_bit_in_a_session(stage: Stage) -> str:
    """One bit of the file is another one."""
    at, bit = stage.rng.randrange(stage.session.stat().st_size), stage.rng.randrange(8)

    def change() -> None:
        with stage.session.open("r+b") as file:
            flip(file.fileno(), at, bit)

    return damage(stage, change)


def cut_session(stage: Stage) -> str:
    """The file is shorter than it was."""
    n_bytes = stage.rng.randrange(stage.session.stat().st_size)
    return damage(stage, lambda: os.truncate(stage.session, n_bytes))


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
        return stage.confirm(outcome, "pages", lambda: stage.ask(cache))


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
    """A process is killed at any moment of saving over an old session; what it leaves behind does no harm."""
    # What Full reads has no index, so another method could not ask it.
    stage.method = METHODS[0]
    with stage.attach("ram") as far:
        cache = stage.read(far)
        with saver(stage, cache) as pid:
            time.sleep(stage.rng.uniform(0.0, 0.05))
            os.kill(pid, signal.SIGKILL)
    outcome = stage.judge("session")
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
            return stage.confirm(outcome, "ram", lambda: stage.ask(stage.read(far)))

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
            cache = stage.load() if kind == "session" else far.new_cache()
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
    left = [stage.rng.randrange(1, 4)]  # What was used recently is near and does not cross, so few fetches come by.

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

    def other(_: Any) -> str:
        stage.model.set_attn_implementation("sdpa")
        return stage.judge("pages")

    return both(stage, "pages", stage.read, other)


def two_processes_on_one_session(stage: Stage) -> str:
    """Two processes write the same session at once."""
    stage.method = METHODS[0]
    with stage.attach("ram") as far:
        cache = stage.read(far)
        with saver(stage, cache, times=5):
            said = [stage.save(cache) for _ in range(5)]
    return stage.confirm("refused" if "refused" in said else "correct", "session")


def forked(stage: Stage) -> str:
    """A process forks with an open session; both go on asking it."""

    def start(_: Any) -> Any:
        cache = stage.load()
        stage.model(stage.question[:, :1], past_key_values=cache)
        cache.step_back(1)
        return cache

    return both(stage, "session", start, lambda cache: stage.judge("session", lambda: stage.ask(cache)))


FAULTS: dict[str, Callable[[Stage], str]] = {
    fault.__name__: fault
    for fault in (
        full_disk_while_saving, full_disk_under_pages, flipped_bit_in_a_session, cut_session, flipped_bit_in_pages,
        permission_denied, killed_while_saving, no_memory, exception_in_a_hook, cancelled_request,
        exception_in_the_worker, two_processes_on_one_disk, two_processes_on_one_session, forked,
    )
}  # fmt: skip


@torch.no_grad()
def run_fault(stage: Stage, name: str, seed: int) -> str:
    """Inject one fault; return "correct", "refused", or what else came of it."""
    stage.turn(seed)
    try:
        outcome = FAULTS[name](stage)
    except Exception as error:
        traceback.print_exc()
        outcome = f"other: {type(error).__name__}"
    after = stage.judge("session")
    return outcome if after == "correct" else f"lost: {after} after {outcome}"


def format_table(path: Path = RESULTS / "faults.jsonl") -> str:
    """Return one Markdown row per fault."""
    head = ["fault", "runs", "right answer", "refused in words", "wrong answer or other error"]
    columns = ("runs", "correct", "refused", "wrong")
    return format_rows(head, ([r["fault"].replace("_", " "), *(r[name] for name in columns)] for r in read_rows(path)))


@torch.no_grad()
def main() -> None:
    parser = make_parser(__doc__, "faults.jsonl")
    parser.add_argument("--runs", default=20, type=int)
    parser.add_argument("--faults", default=",".join(FAULTS), type=read_names, help="names, by commas")
    run = Recorder(parser)
    n, any_wrong = run.args.runs, 0
    with tempfile.TemporaryDirectory() as name:
        # Others must be able to reach what they may not write.
        os.chmod(name, 0o755)
        stage = Stage(Path(name), 0)
        for fault in run.args.faults:
            said = [run_fault(stage, fault, seed) for seed in range(n)]
            good = {kind: said.count(kind) for kind in ("correct", "refused")}
            wrong = n - sum(good.values())
            run.write(dict(fault=fault, runs=n, **good, wrong=wrong, other=sorted(set(said) - set(good))))
            run.say(fault)
            any_wrong |= wrong
    print(format_table(run.args.out))
    sys.exit(bool(any_wrong))


if __name__ == "__main__":
    main()
