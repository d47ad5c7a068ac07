"""How text that others wrote stands in messages and on a terminal: on one line, short, and nothing in it acted upon.

In: file names, options, answers, errors of other libraries. Out: text that shows what cannot be seen.
"""

from __future__ import annotations

import os
import re

# What moves a terminal's cursor, ends or turns a line, or is half a letter (a byte of a name that is not UTF-8).
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = re.compile(r"[\w./:~@%+,=#^-]+")
_LONG = re.compile(r"\S{301,}")
MOST_CHARACTERS = 2000


def show_controls(text: str, keep: str = "") -> str:
    r"""Return a text with controls, turned directions and halves of letters as escapes: `\x1b`, `\u202e`, `\udcff`.

    Args:
        keep: controls that stay as they are.
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def make_line(text: str) -> str:
    """Return a message as one line: controls as escapes, words of more than 300 and lines of 2,000 characters cut."""
    line = _LONG.sub(lambda found: shorten(found[0], 200), show_controls(text.strip()))
    return shorten(line, MOST_CHARACTERS)


def shorten(text: str, most: int) -> str:
    """Return a text of at most `most` characters and a mark: what is too much is left out of its middle."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}[…{len(text) - 2 * half} more…]{text[-half:]}"


def show_value(value: object) -> str:
    """Return an option's value for a message, as Python writes it, cut in its middle where it is long."""
    try:
        return shorten(repr(value), 80)
    except ValueError:
        # Python writes no integers of more than some thousand digits.
        return "a number of thousands of digits"


def quote(name: str | os.PathLike[str]) -> str:
    """Return a name for a message: as it is where it is plain, else in quotes with escapes, as Python writes it."""
    text = os.fspath(name)
    # `\w` has letters of every script, and they can be seen.
    return text if _PLAIN.fullmatch(text) and text.isprintable() else repr(text)
