"""`farkv run` on a terminal: a real pseudo-terminal of 80 columns."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.command import CODE, farkv

QUESTION = "def g(path):\n    return"


def run_on_terminal(*arguments: str) -> str:
    """Return all that a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
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
        assert process.wait(timeout=600) == 0, found.decode()
    os.close(ours)
    return found.decode()


@pytest.mark.parametrize("options", [[], ["--session"]])
def test_words_of_an_answer_stand_on_one_line(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    options = [*options, str(tmp_path / "code.farkv")] if options else []
    asked = ["run", "--model", "demo", "--file", str(path), *options, "--max-new-tokens", "12", QUESTION]
    answer = json.loads(farkv(*asked, "--json").stdout)["answer"]
    line = max(answer.splitlines(), key=len)
    assert len(line.split()) > 1, "an answer of several words on one line is what this is about"
    # Of a session nothing is read any more before the answer, so that no bar comes to its end.
    screen = run_on_terminal(*asked)
    assert answer.replace("\n", "\r\n") in screen
    assert "reading" in screen, "the bar was there"
