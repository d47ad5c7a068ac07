"""What somebody types, pipes in or stops: one clear line, an exit code, and a terminal that does as it did before."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from fault_stage import in_child, limit

from attacks.base import Attack, Verdict
from attacks.written import make_rows

# What a terminal would act upon: its title, a cleared screen, the cursor, colours, turned text.
CONTROLS = ["\x1b]0;owned\x07", "\x1b[2J", "\x1b[41m", "\x9b31m", "\x08\x08", "\rover", "\x0e", "\u202e"]
MARKUP = ["[bold red]x[/]", "[/bold]", "[link=file:///etc]x[/link]", ":boom:", "[a]"]
TEXT = "apple_river = 4821\n" + "import os\n\n\ndef f(path):\n    return os.path.join(path, 'x')\n" * 3
QUESTION = "print(apple_river)  # "
# A line that tells nothing but what was wrong; of an option's thousand digits it shows some.
MOST_LINE = 2500


class Done(NamedTuple):
    """How a command ended: its exit code, or the error that it let out."""

    code: Any
    out: str
    err: str


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def farkv(*arguments: str, text: bytes = b"", terminal: bool = False) -> Done:
    """Run a command in this process as its entry point does."""
    from farkv.cli import main

    kind = Terminal if terminal else io.StringIO
    out, err, code = kind(), kind(), 0
    stdin = io.TextIOWrapper(io.BytesIO(text))
    replaced = {"argv": ["farkv", *arguments], "stdin": stdin, "stdout": out, "stderr": err}
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(sys, name, value))
        stack.enter_context(patch.dict(os.environ, {"COLUMNS": "80", "TERM": "xterm"}))
        # As in tests/command.py: what it quiets would stay quiet for others in this process.
        stack.enter_context(patch("farkv.hf.load.quiet_libraries", lambda: None))
        stack.enter_context(patch("transformers.utils.logging._tqdm_active", False))
        stack.enter_context(patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        stack.enter_context(torch.random.fork_rng())
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            code = error
    return Done(code, out.getvalue(), err.getvalue())


def judge(done: Done, *codes: int, says: str = "") -> Verdict:
    """Return what came of a command: refused with one of the codes, in one line that a terminal can show."""
    if not isinstance(done.code, int) or done.code not in codes:
        return "wrong"
    if done.code == 0:
        return "right"
    line = done.err.removesuffix("\n")
    clean = line.isprintable() and 0 < len(line) <= MOST_LINE
    return "refused" if clean and "Traceback" not in line and says in line and not done.out else "wrong"


@contextmanager
def inputs() -> Iterator[Path]:
    """Give a folder with a text in it; what a command writes by default is written there."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        Path(name, "code.py").write_text(TEXT)
        yield Path(name)


# --- numbers -----------------------------------------------------------------------------------------------------

SIZES = ["9" * 400, "0." + "1" * 400, "1e400", "9" * 30 + "GiB", "-1", "nan", "inf", "8388608TiB", "٣GiB", "0" * 500]
SEEDS = [2**63, 2**64 - 1, 2**64, 2**70, -(2**63), -(2**63) - 1, 10**30, int("9" * 400)]
REALS = ["nan", "inf", "-inf", "1e-320", "5e-324", "1e-45", "1e30", "1e308", "-1", "9" * 400]
COUNTS = [2**31, 2**62, 2**63, 2**64, 10**30, int("9" * 400), -1]


def odd_numbers(rng: random.Random) -> Verdict:
    """Sizes, seeds, fractions, temperatures and counts that no machine has."""
    plan, run = ["plan", "--model", "demo"], ["run", "--max-new-tokens", "1", "--file"]
    options: list[tuple[list[str], str, list[Any]]] = [
        (run, "--near", SIZES), (run, "--host", SIZES), (plan, "--bytes", SIZES), (run, "--seed", SEEDS),
        (run, "--temperature", REALS), (run, "--fraction", REALS), ([*run, "--method", "xkv"], "--retention", REALS),
        (plan, "--ratio", REALS), ([*plan, "--ratio", "0.3"], "--floor", REALS), (plan, "--retention", REALS),
        ([*plan, "--ratio", "0.3"], "--weights", [f"1,{x},1" for x in REALS]), (run, "--max-new-tokens", COUNTS),
        ([*plan, "--retention", "0.9"], "--confidence", REALS), (plan, "--tokens", COUNTS),
        (run, "--chunk-tokens", COUNTS), (run, "--verify", COUNTS), (["bench", "decode"], "--fraction", ["nan"]),
        (["bench", "decode"], "--threads", COUNTS), (["eval"], "--fractions", ["nan", "0.1,inf"]),
        (["eval"], "--lengths", [str(n) for n in COUNTS]), (["demo"], "--seed", [2**64, -(2**63) - 1, 10**30]),
    ]  # fmt: skip
    command, option, values = rng.choice(options)
    with inputs() as folder:
        extra = [str(folder / "code.py"), QUESTION] if command[0] == "run" else []
        extra = ["--out", str(folder / "plan.json")] if command[0] in ("plan", "eval") else extra
        return judge(farkv(*command, *extra, f"{option}={rng.choice(values)}", "--json"), 0, 2)


# --- names and texts ---------------------------------------------------------------------------------------------


def odd_name(rng: random.Random) -> str:
    return rng.choice([
        f"a{rng.choice(CONTROLS)}b", "two\nlines", "nul\0", "half\ud800", os.fsdecode(b"\xff\xfe"), "n" * 300,
        "n" * 5000, rng.choice(MARKUP), " ",
    ])  # fmt: skip


def odd_paths(rng: random.Random) -> Verdict:
    """Names that are none, or that a terminal would act upon, in every place where a command takes one."""
    name = odd_name(rng)
    with inputs() as folder:
        text, missing = str(folder / "code.py"), str(folder / name)
        run = ["run", "--max-new-tokens", "1"]
        done = farkv(*rng.choice([
            [*run, "--file", missing, QUESTION], [*run, "--session", missing, QUESTION],
            [*run, "--file", text, "--plan", missing, QUESTION], [*run, "--file", text, "--profile", missing, QUESTION],
            [*run, "--file", text, "--model", missing, QUESTION], [*run, "--file", text, "--kernel", name, QUESTION],
            [*run, "--file", text, "--method", name, QUESTION], ["report", missing], ["profile", "--prompts", missing],
            [*run, "--file", text, "--disk", f"{text}/{name}", QUESTION], [*run, f"--{name}", QUESTION], [name],
            ["profile", "--prompts", text, "--out", f"{missing}/out"], ["plan", "--profile", missing],
            ["plan", "--ratio", "0.3", "--out", f"{missing}/out"], ["plan", "--rule", name, "--ratio", "0.3"],
            ["eval", "--tasks", f"ruler:{missing}"], ["eval", "--methods", name, "--out", str(folder / "e")],
            ["bench", "decode", "--shape", name], ["bench", "decode", "--contexts", name],
        ]))  # fmt: skip
        return judge(done, 2)


def odd_texts(rng: random.Random) -> Verdict:
    """Halves of letters, NUL, deep or huge JSON as question, text, prompt or title."""
    half = rng.choice(["\ud800", os.fsdecode(b"\xe9"), "a\udfffb"])
    lines = [
        json.dumps({"prompt": f"def f{half}"}), "[" * 100_000, '{"prompt": ' + "9" * 5000 + "}",
        json.dumps({"text": half}),
        '{"prompt": "a", "question": ' + "[" * 5000,
    ]  # fmt: skip
    with inputs() as folder:
        prompts = folder / "asked.jsonl"
        prompts.write_text(rng.choice(lines))
        results = folder / "results"
        results.mkdir()
        (results / "results.jsonl").write_text(make_rows().replace('"answer": "a"', f'"answer": {json.dumps(half)}'))
        text, page = str(folder / "code.py"), folder / "page.html"
        kind = rng.choice(["question", "stop", "prompts", "title", "nul", "bytes"])
        if kind == "title":
            done = farkv("report", str(results), "--out", str(page), "--title", f"a{half}\0<script>", "--json")
            shown = page.read_bytes() if page.exists() else b"\0"
            return judge(done, 0) if b"\0" not in shown and b"<script>" not in shown and shown.decode() else "wrong"
        if kind == "prompts":
            return judge(farkv("profile", "--prompts", str(prompts), "--out", str(folder / "p")), 2)
        if kind in ("nul", "bytes"):
            piped = TEXT.encode() + (b"\0" if kind == "nul" else b"\xff")
            return judge(farkv("run", QUESTION, text=piped), 2)
        stop = ["--stop", half] if kind == "stop" else []
        question = QUESTION if stop else f"print({half})"
        return judge(farkv("run", "--file", text, "--max-new-tokens", "1", *stop, question), 2)


# --- what the machine refuses ------------------------------------------------------------------------------------


def no_room(rng: random.Random) -> Verdict:
    """The disk is full while a command saves: exit code 1, and nothing is left behind."""
    with inputs() as folder:
        arguments = rng.choice([
            ["plan", "--ratio", "0.3", "--out", str(folder / "plan.json")],
            ["report", str(folder), "--out", str(folder / "page.html")],
            ["run", "--file", str(folder / "code.py"), "--session", str(folder / "s"), QUESTION],
        ])  # fmt: skip
        (folder / "results.jsonl").write_text(make_rows())
        before = sorted(os.listdir(folder))

        def work() -> str:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with limit(resource.RLIMIT_FSIZE, rng.randrange(500)):
                return judge(farkv(*arguments), 1, says="File too large")

        said = in_child(work, seconds=60.0)
        return "refused" if said == "refused" and sorted(os.listdir(folder)) == before else "wrong"


def stopped(rng: random.Random) -> Verdict:
    """Memory, a thread, a GPU, a finger on Ctrl-C or a defect of ours ends a command at some place in it."""
    errors: list[tuple[BaseException, int, str]] = [
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("[enforce fail at 1] DefaultCPUAllocator: can't allocate memory: 9"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (ValueError("a defect\nof ours\x1b[2J"), 1, "ValueError"),
        (RecursionError("maximum recursion depth exceeded"), 1, "RecursionError"),
    ]  # fmt: skip
    error, code, says = rng.choice(errors)
    places = ["hf.load.load_model", "hf.prompt.build_prompt", "hf.ask.prefill", "hf.ask.answer", "hf.attach.attach"]
    place = "farkv." + rng.choice(places)
    after = rng.random() < 0.3
    with inputs() as folder:
        original = resolve_name(place)

        def fail(*args: Any, **kwargs: Any) -> Any:
            if after:
                original(*args, **kwargs)
            raise error

        with patch(place, fail):
            done = farkv("run", "--file", str(folder / "code.py"), "--max-new-tokens", "1", "--json", QUESTION)
        if code == 130 and done.out and json.loads(done.out)["stop_reason"] == "interrupted":
            # What there was when it was stopped is printed: one object, whose answer has no end.
            done = done._replace(out="")
        return judge(done, code, says=says)


# --- the terminal ------------------------------------------------------------------------------------------------


@cache
def draw_hostile(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice([*CONTROLS, *MARKUP, "é☺", "\n", "\t", "word "]) for _ in range(12))


def hostile_answer(rng: random.Random) -> Verdict:
    """An answer with controls: to a terminal as escapes, into a pipe byte for byte."""
    said, terminal = draw_hostile(rng.randrange(1000)), rng.random() < 0.7

    def answer(far: Any, tokenizer: Any, prompt: Any, *, cache: Any, decoding: Any, listener: Any) -> str:
        for at in range(0, len(said), 5):
            listener.on_text(said[at : at + 5])
        return said

    with inputs() as folder, patch("farkv.hf.ask.answer", answer):
        file = str(folder / "code.py")
        done = farkv("run", "--file", file, "--max-new-tokens", "1", QUESTION, terminal=terminal)
    if done.code != 0:
        return "wrong"
    if not terminal:
        return "right" if done.out == said + "\n" else "wrong"
    harmless = not any(control in done.out for control in CONTROLS)
    kept = all(word in done.out for word in ("é☺", "word ", *MARKUP) if word in said)
    return "right" if harmless and kept and done.out.count("\n") == said.count("\n") + 1 else "wrong"


def hostile_names(rng: random.Random) -> Verdict:
    """Results, plans and files whose names hold controls or markup are shown as text on a terminal."""
    control, markup = rng.choice(CONTROLS), rng.choice(MARKUP)
    name = f"m{control}{markup}"
    with inputs() as folder:
        results = folder / f"r{control}{markup.replace('/', '')}"
        results.mkdir()
        (results / "results.jsonl").write_text(make_rows().replace('"vt"', json.dumps(name)))
        plan = folder / f"{markup.replace('/', '')}{control}.json"
        done = rng.choice([
            lambda: farkv("report", str(results), "--out", str(folder / "page.html"), terminal=True),
            lambda: farkv("plan", "--ratio", "0.3", "--out", str(plan), terminal=True),
            lambda: farkv("plan", "--ratio", "0.3", "--profile", str(plan), terminal=True),
            lambda: farkv("profile", "-p", str(folder / "code.py"), "-o", str(plan), "--light", terminal=True),
        ])()  # fmt: skip
    words = [part for part in (markup, markup.replace("/", "")) if part.strip("[]")]
    harmless = control not in done.err and "\x07" not in done.err
    shown = any(word in done.err for word in words)
    return "right" if done.code in (0, 2) and harmless and shown else "wrong"


ATTACKS = {
    "numbers": Attack(9, "sizes, seeds, fractions and counts that no machine has", odd_numbers, 6, 100),
    "paths": Attack(9, "names that are none, or that act, wherever a command takes one", odd_paths, 5, 100),
    "texts": Attack(9, "halves of letters, NUL, deep and huge JSON", odd_texts, 3, 60),
    "no_room": Attack(9, "the disk is full while a command saves", no_room, 2, 20),
    "stopped": Attack(9, "no memory, Ctrl-C or a defect somewhere in a command", stopped, 3, 40),
    "answer": Attack(10, "an answer with controls and markup", hostile_answer, 2, 30),
    "names": Attack(10, "names with controls and markup, shown on a terminal", hostile_names, 3, 40),
}
