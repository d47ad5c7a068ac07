"""Whatever goes wrong in a command is one line and an exit code; `--debug` shows the traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from farkv.cli.boundary import explain, is_machine
from farkv.cli.commands import app, build_command
from farkv.errors import CapacityError, FarKVError, PlanError, StoreError
from farkv.files import InUseError
from tests.command import CODE, QUESTION, farkv, run_process


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    return str(path)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


NO_CPU_MEMORY = RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
ERRORS: list[tuple[BaseException, int, str]] = [
    (PlanError("plan a: is none"), 2, "plan a: is none"),
    (CapacityError("host limit"), 2, "host limit"),
    (caused(StoreError("no"), OSError(errno.ENOSPC, "full")), 1, "no"),
    (caused(StoreError("no"), OSError(errno.ENOENT, "none")), 2, "no"),
    (caused(StoreError("no"), InUseError("process 1")), 2, "no"),
    (caused(CapacityError("no"), NO_CPU_MEMORY), 1, "no"),
    (MemoryError(), 1, "out of memory"),
    (NO_CPU_MEMORY, 1, "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"), 1, "out of memory"),
    (OSError(errno.ENOSPC, "No space left", "a\nb"), 1, r"No space left, 'a\nb'"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "Permission denied, a"),
    (ValueError("odd\nthing\x1b[2J"), 1, r"internal error: ValueError: odd\nthing\x1b[2J; run with --debug"),
    (RecursionError(), 1, "internal error: RecursionError"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("error", "code", "says"), ERRORS, ids=lambda value: str(value)[:30])
def test_an_error_in_a_command_is_one_line_and_its_code(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("farkv.calibrate.profile.Profile.load", fail)
    done = farkv("plan", "--ratio", "0.3")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("farkv: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.strip().isprintable()
    for arguments in (["--debug", "plan", "--ratio", "0.3"], ["plan", "--ratio", "0.3", "--debug"]):
        shown = farkv(*arguments)
        assert shown.returncode == code
        assert "Traceback (most recent call last)" in shown.stderr
        assert "in fail" in shown.stderr
        assert shown.stderr.endswith(done.stderr)
        assert "\x1b" not in shown.stderr


def test_a_closed_pipe_is_said_to_no_one() -> None:
    assert explain(BrokenPipeError(errno.EPIPE, "Broken pipe")) == (1, "")


def test_a_limit_of_the_users_is_not_the_machines() -> None:
    assert not is_machine(CapacityError("no"))
    assert not is_machine(FarKVError("out of memory"))
    assert is_machine(MemoryError())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--no-such\x1b[2J"], r"--no-such\x1b[2J; see farkv run --help"),
        (["no\nsuch"], r"no\nsuch"),
        (["run", "--seed", "9" * 400], "64 bits"),
        (["run", "--seed", "9" * 5000], "Invalid value for '--seed'"),
        (["run", "--max-new-tokens", "9" * 30], "expected at most 2147483647"),
        (["run", "--temperature", "nan"], "Invalid value for '--temperature'"),
        (["run", "--fraction", "nan"], "finite"),
        (["run", "--temperature", "1e-320", "q"], "expected 0 (greedy), or a number from 1e-06"),
        (["plan", "--ratio", "inf"], "finite"),
        (["plan", "--weights", "1,nan"], "finite"),
        (["run", "--near", "9" * 400, "q"], "at most 9,223,372,036,854,775,807 bytes"),
        (["run", "--stop", "\udcff", "q"], "--stop: expected text"),
        (["run", "half \ud800"], "question: expected text"),
        (["run", "--file", "a\0b"], "null byte"),
        (["run", "--profile", "a\0b", "--file", __file__, "q"], "a NUL stands in it"),
        (["run", "--file", "/dev/zero"], "is a device, expected a file"),
        (["run", "--session", "n" * 300, "q"], "too long"),
        (["run", "--model", "m" * 5000, "q"], "too long"),
    ],
)
def test_what_no_one_can_mean_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    done = farkv(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.strip().isprintable()
    assert len(done.stderr) < 1000


def list_commands(command: Any) -> list[Any]:
    return [command, *(c for inner in getattr(command, "commands", {}).values() for c in list_commands(inner))]


def test_every_command_takes_debug_and_has_its_numbers_checked() -> None:
    told: list[bool] = []
    for command in list_commands(build_command(told.append)):
        assert [p.name for p in command.params].count("debug") == 1, command.name
        assert all(p.callback is not None for p in command.params if p.name != "help"), command.name
    # The application itself stays as it was made.
    assert all(p.name != "debug" for p in get_command(app).params)


def test_a_pipe_that_is_named_is_not_waited_for_and_one_that_is_open_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for option in ("--file", "--session", "--plan", "--profile"):
        done = farkv("run", *(["--file", __file__] if option in ("--plan", "--profile") else []), option,
                     str(tmp_path / "pipe"), "q")  # fmt: skip
        assert done.returncode == 2, option
        assert "is a pipe, expected a file" in done.stderr, option
    reading, writing = os.pipe()
    os.write(writing, CODE.encode())
    os.close(writing)
    done = farkv("run", "--file", f"/dev/fd/{reading}", "--max-new-tokens", "4", QUESTION)
    os.close(reading)
    assert (done.returncode, done.stdout) == (0, "4821\n")


def test_a_full_disk_is_code_1_and_leaves_the_old_file(file: str, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "plan.json"
    out.parent.mkdir()
    out.write_text("old")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\nfrom farkv.cli import main; main()"
    command = [sys.executable, "-c", code, "plan", "--ratio", "0.3", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [(p.name, p.read_text()) for p in out.parent.iterdir()] == [("plan.json", "old")]


@pytest.mark.parametrize("when", ["while it waits for a text", "while it is imported"])
def test_ctrl_c_is_one_line_and_130(when: str) -> None:
    # A shell lets what it starts in the background ignore Ctrl-C.
    code = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    if when == "while it is imported":
        # The first import behind the boundary that takes long.
        code += "class Stop:\n    def find_spec(self, name, *more):\n        if name == 'torch':\n"
        code += "            os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, Stop())\n"
    else:
        code += (
            "import io\nclass Wait(io.BytesIO):\n    def read(self, *n):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        )
        code += "        return b''\nsys.stdin = io.TextIOWrapper(Wait())\n"
    code += "sys.argv = ['farkv', 'run', 'q']\nfrom farkv.cli import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "farkv: interrupted\n")


@pytest.mark.parametrize("device", ["/dev/full", "a closed pipe"])
def test_output_that_no_one_takes_is_no_traceback(device: str) -> None:
    if device == "/dev/full":
        with open(device, "wb") as out:
            done = run_into(out)
        assert (
            done.stderr
            == "farkv: the system refuses: No space left on device; run with --debug to see what was tried\n"
        )
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = run_into(writing)
        os.close(writing)
        assert done.stderr == ""
    assert done.returncode == 1


def run_into(out: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "farkv.cli", "--version"]
    return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)


def test_a_process_says_it_as_its_main_does() -> None:
    arguments = ("run", "--file", "/no/such\nfile", "q")
    done, process = farkv(*arguments), run_process(*arguments)
    assert (process.returncode, process.stdout, process.stderr) == done
    assert "'/no/such\\nfile'" in done.stderr
