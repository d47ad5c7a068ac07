"""`farkv run` on a terminal: a real pseudo-terminal of 80 columns."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from farkv.cli.terminal import err, say, write_answer
from farkv.errors import InputError
from tests.command import CODE, farkv
from tests.evals.results import make_row

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


# --- what may reach a terminal ------------------------------------------------------------------------------------

CONTROLS = "\x1b]0;owned\x07 \x1b[2J \x9b31m \x08 \r \u202e"
ESCAPED = r"\x1b]0;owned\x07 \x1b[2J \x9b31m \x08 \r \u202e"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def say_on(out: io.StringIO, name: str, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(sys, name, out)
    return out


def test_an_answer_is_shown_on_a_terminal_and_kept_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = f"{CONTROLS} [bold]é☺\n\tnext\r\n"
    screen = say_on(Terminal(), "stdout", monkeypatch)
    write_answer(answer)
    assert screen.getvalue() == f"{ESCAPED} [bold]é☺\n\tnext\n"
    pipe = say_on(io.StringIO(), "stdout", monkeypatch)
    write_answer(answer)
    assert pipe.getvalue() == answer


def test_an_answer_that_stdout_cannot_write_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1"))
    with pytest.raises(InputError, match=r"answer: '☺' cannot be written in the encoding latin-1 of stdout; set"):
        write_answer("a ☺")
    screen = Terminal()
    screen.encoding = "latin-1"
    say_on(screen, "stdout", monkeypatch)
    write_answer("é ☺")
    assert screen.getvalue() == r"é \u263a"


def test_lines_and_tables_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = say_on(Terminal(), "stderr", monkeypatch)
    say(f"{CONTROLS} [bold]x[/bold] :boom: {'long ' * 60}")
    table = Table(title="[red]title \x1b[2J")
    table.add_column("[a] \x1b[2J")
    table.add_row("[/b] \x1b[2J :boom:")
    err.print(table)
    err.print(Text("text \x1b[2J"))
    err.print("plain [bold] \x1b[2J")
    shown = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
    assert "\x1b" not in shown
    assert shown.startswith(f"{ESCAPED} [bold]x[/bold] :boom: {'long ' * 60}\n")
    for text in (
        r"[red]title \x1b[2J",
        r"[a] \x1b[2J",
        r"[/b] \x1b[2J :boom:",
        r"text \x1b[2J",
        r"plain [bold] \x1b[2J",
    ):
        assert text in shown


def test_results_of_others_are_shown_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row("vt", "full", 1.0, 2048, 0), make_row("vt", "m[bold]\x1b[2J", 0.1, 2048, 0)]
    (tmp_path / "results.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    done = farkv("report", str(tmp_path), "--out", str(tmp_path / "[a]\x1b[2J.html"))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    assert "m[bold]" in done.stderr
    assert r"/[a]\x1b[2J.html'" in done.stderr
    page = (tmp_path / "[a]\x1b[2J.html").read_text()
    assert "\x1b" not in page
    assert r"m[bold]\x1b[2J" in page
