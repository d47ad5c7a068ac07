"""The one boundary between what goes wrong and who typed the command: one line on stderr, an exit code, no traceback.

| code | what |
|---|---|
| 0 | done |
| 1 | the machine refuses (a full disk, no memory, a closed pipe), or farkv has a defect |
| 2 | what was asked cannot be done: an option, a file, a model, a limit |
| 130 | Ctrl-C |

`--debug` shows the traceback too. Knows no command.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from farkv.cli.interrupted import Interrupted
from farkv.errors import FarKVError
from farkv.files import InUseError
from farkv.quote import make_line, quote, show_controls

# What the system has no more of, or what is broken; everything else that it refuses can be asked for in another way.
MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOLCK,
}  # fmt: skip
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
INTERRUPTED = 130


def guard(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; whatever goes wrong becomes one line."""
    debug: list[bool] = []
    try:
        try:
            return run_command(arguments, debug)
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            code, line = explain(error)
            end_output()
            if debug:
                write_error(show_controls("".join(traceback.format_exception(error)), keep="\n\t"))
            if line:
                write_error(f"farkv: {make_line(line)}\n")
            return code
    except KeyboardInterrupt:
        # Once more, while the first one was told.
        return INTERRUPTED
    except MemoryError:
        os.write(2, b"farkv: out of memory\n")
        return 1


def run_command(arguments: Sequence[str], debug: list[bool]) -> int:
    """Run the command line; return what it ends with, or raise what went wrong.

    Args:
        debug: gets an entry where `--debug` is given.
    """
    # Takes seconds.
    with show_starting():
        import typer

        from farkv.cli.commands import build_command
        from farkv.cli.terminal import show_log

    command, code = build_command(debug.append), 0
    # Not `main`, which has a boundary of its own.
    try:
        with show_log(), command.make_context("farkv", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:
        code = end.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


@contextmanager
def show_starting() -> Iterator[None]:
    """Say on a terminal that something is under way, from the first moment; the line is taken back."""
    shows = sys.stderr is not None and sys.stderr.isatty()
    if shows:
        write_error("farkv: starting …")
    try:
        yield
    finally:
        if shows:
            write_error("\r\x1b[2K")


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line of an error; no line where nobody reads any more."""
    import typer

    usage_error = typer.BadParameter.__bases__[0]
    text = str(error).strip()
    line = f"internal error: {type(error).__name__}: {text}; run with --debug for the traceback"
    code = 1
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        code, line = INTERRUPTED, f"interrupted {text}".strip() if isinstance(error, Interrupted) else "interrupted"
    elif isinstance(error, usage_error):
        code, line = 2, explain_usage(error)
    elif isinstance(error, FarKVError):
        code, line = 1 if any(map(is_machine, walk_causes(error))) else 2, text
    elif isinstance(error, BrokenPipeError):
        # The process reading our output has exited, for example `| head`.
        line = ""
    elif is_memory(error):
        line = f"out of memory ({text or type(error).__name__}); ask for less: a shorter text, --host, --chunk-tokens"
    elif isinstance(error, OSError) and error.errno is not None:
        name = f", {quote(str(error.filename))}" if error.filename is not None else ""
        code = 1 if is_machine(error) else 2
        line = f"the system refuses: {error.strerror}{name}; run with --debug to see what was tried"
    return code, line


def explain_usage(error: BaseException) -> str:
    """Return what is wrong with the arguments, and where to read about them."""
    message = str(getattr(error, "format_message", lambda: error)()).strip().replace("\n", " ").rstrip(".")
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # The help was printed already.
        return ""
    return f"{message}; see {context.command_path if context else 'farkv'} --help"


def walk_causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and what it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def is_machine(error: BaseException) -> bool:
    """Return whether the machine had no more of something, or is broken; a limit of the user's is neither."""
    out = isinstance(error, OSError) and error.errno in MACHINE and not isinstance(error, InUseError)
    return out or is_memory(error)


def is_memory(error: BaseException) -> bool:
    """Return whether memory was refused: by Python, by torch or by a GPU."""
    if isinstance(error, FarKVError):
        return False
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
    return isinstance(error, MemoryError) or said


def end_output() -> None:
    """Write what is left for stdout; where that fails it is not tried again at the end, with a traceback."""
    out = sys.stdout
    if out is None:
        return
    try:
        out.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), out.fileno())


def write_error(text: str) -> None:
    """Write to stderr, if there is one that takes it."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()
