"""What may reach a terminal: text as text, in which nothing moves a cursor, turns a line or is taken for markup.

In: answers of a model, names of files, tables. Out: stderr for people, stdout for the answer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.text import Text

from farkv.errors import InputError
from farkv.quote import show_controls


class _Shown:
    """Something to be printed, whose text has no control character but line ends when it is."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else segment._replace(text=show_controls(segment.text, keep="\n"))


class _ShowControls(RenderHook):
    """Whatever is printed, tables and errors too, goes through `_Shown`."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


# Nothing in a string is an instruction: neither [bold] nor :smile:, in cells and titles of tables neither.
err = Console(stderr=True, markup=False, emoji=False, highlight=False)
err.push_render_hook(_ShowControls())


def say(text: str) -> None:
    """Print a line of any length on stderr."""
    err.print(Text(show_controls(text)), soft_wrap=True)


class _Saying(logging.Handler):
    """Prints what the library logs, above a line that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def show_log() -> Iterator[None]:
    """Print the warnings of the library on stderr, one line each."""
    log, handler = logging.getLogger("farkv"), _Saying(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def show_waiting(text: str) -> AbstractContextManager[Any]:
    """Show on a terminal that something takes a while."""
    return err.status(Text(show_controls(text))) if err.is_terminal else nullcontext()


def write_answer(piece: str) -> None:
    """Write a piece of an answer to stdout: to a terminal with controls as escapes, elsewhere as it is.

    Raises:
        InputError: the encoding of stdout cannot write it.
    """
    out = sys.stdout
    if out.isatty():
        piece = show_controls(piece.replace("\r\n", "\n"), keep="\n\t")
        piece = piece.encode(out.encoding, "backslashreplace").decode(out.encoding)
    try:
        out.write(piece)
    except UnicodeEncodeError as error:
        raise InputError(
            f"answer: {error.object[error.start : error.end]!r} cannot be written in the encoding {error.encoding} of "
            "stdout; set PYTHONIOENCODING=utf-8"
        ) from error
    out.flush()
