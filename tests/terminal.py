"""A real pseudo-terminal of 80 columns: what a command writes to it, and what then stands on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

COLUMNS = 80
# What moves the cursor or wipes a line; colours and the cursor's visibility change no text.
CONTROL = re.compile(r"\x1b\[(?P<number>\d*)(?P<letter>[AK])|\x1b\[[\d;?]*[hlm]|(?P<return>\r)|(?P<line>\n)")


def run_on_terminal(*arguments: str, code: int = 0) -> str:
    """Return all that a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "farkv.cli", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        found = b""
        try:
            while piece := os.read(ours, 65536):
                found += piece
        except OSError:
            pass  # Linux says so that the last writer has gone.
        assert process.wait(timeout=600) == code, found.decode()
    os.close(ours)
    return found.decode()


def read_screen(written: str) -> list[str]:
    """Return the lines that stand on the screen in the end, those that scrolled away too."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(written):
        found = CONTROL.match(written, at)
        if found is None:
            assert written[at] != "\x1b", f"an escape that the tests do not know: {written[at : at + 8]!r}"
            if column == COLUMNS:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            line = lines[row].ljust(column)
            lines[row] = line[:column] + written[at] + line[column + 1 :]
            column, at = column + 1, at + 1
            continue
        at = found.end()
        if found["return"]:
            column = 0
        elif found["line"]:
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif found["letter"] == "A":
            row = max(0, row - int(found["number"] or 1))
        elif found["letter"] == "K":
            # 2: the whole line; nothing: from the cursor on.
            lines[row] = "" if found["number"] == "2" else lines[row][:column]
    return [line.rstrip() for line in lines]


def read_frames(written: str, phase: str) -> list[str]:
    """Return what a phase's bar said, frame by frame, without colours."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)
    return re.findall(rf"{phase} [━╸╺]+ ([^\r\n\x1b]*)", plain)
