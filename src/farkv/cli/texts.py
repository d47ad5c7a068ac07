"""The text that a command reads: of files, of a pipe, of documents. In: names. Out: one text, or what is wrong."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path

from farkv.cli.documents import find_kind, read_document
from farkv.errors import InputError
from farkv.files import read_file
from farkv.names import RefusedError
from farkv.quote import quote

STREAM = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")


def read_texts(files: list[Path] | None, *, raw: bool = False, quiet: bool = False) -> str:
    """Return the texts of all files, in order, each begun on a line of its own; without files that of a pipe.

    Args:
        raw: leave HTML as it is.
        quiet: show no progress.

    Raises:
        InputError: a file is missing, unreadable, empty, no text, or named by `-` a second time.
    """
    if not files:
        # Piped input needs no flag; a terminal is not read.
        return "" if sys.stdin is None or sys.stdin.isatty() else read_text(Path("-"), raw=raw, quiet=quiet)
    if [str(file) for file in files].count("-") > 1:
        raise InputError("--file -: given twice, and stdin can be read once; drop one")
    texts: list[str] = []
    for file in files:
        text = read_text(file, raw=raw, quiet=quiet)
        if not text.strip():
            raise InputError(f"file {name_of(file)}: it is empty; expected a text: drop it to ask without one")
        texts.append(text)
    # Whole lines follow each other as they are.
    texts[:-1] = [text if text.endswith("\n") else text + "\n" for text in texts[:-1]]
    return "".join(texts)


def name_of(file: Path) -> str:
    """Return a file's name as it is shown."""
    return "stdin" if str(file) == "-" else quote(file)


def read_text(file: Path, *, raw: bool = False, quiet: bool = False) -> str:
    """Return the text of a file, of standard input for `-`, or of a PDF or HTML document.

    Raises:
        InputError: the file is missing, unreadable, or neither UTF-8 text nor a document with text.
    """
    name = name_of(file)
    try:
        if str(file) == "-":
            data = b"" if sys.stdin is None else sys.stdin.buffer.read()
        else:
            data = read_stream(file) if STREAM.fullmatch(str(file)) else read_file(file)
    except OSError as error:
        raise InputError(f"file {name}: cannot be read ({error.strerror}); expected a text file") from error
    kind = None if raw else find_kind(data, file.suffix)
    if kind is not None:
        return read_document(kind, data, name, quiet=quiet)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file {name}: not UTF-8 text (byte {error.start}); expected a text file") from error
    if "\0" in text:
        raise InputError(f"file {name}: contains NUL bytes; expected a text file")
    return text


def read_stream(file: Path) -> bytes:
    """Read what the caller has opened for this process: `/dev/stdin`, or `<(command)` of a shell.

    A pipe by any other name has a writer perhaps, and perhaps not; a device may never end.
    """
    with file.open("rb") as opened:
        if stat.S_ISCHR(os.fstat(opened.fileno()).st_mode) and not opened.isatty():
            raise RefusedError("is a device, expected a file or a pipe")
        return opened.read()
