"""Commands on a terminal of 80 columns: the answer, how far they are, and nothing of that afterwards."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from farkv.cli.terminal import err, say, write_answer
from farkv.errors import InputError
from tests.command import CODE, farkv
from tests.evals.results import make_row
from tests.terminal import read_frames, read_screen, run_on_terminal

QUESTION = "def g(path):\n    return"


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
    written = run_on_terminal(*asked)
    assert answer.replace("\n", "\r\n") in written
    screen = read_screen(written)
    start = screen.index(answer.splitlines()[0])
    assert screen[: start + answer.count("\n") + 1] == answer.split("\n"), "nothing but the answer above the receipt"
    assert "receipt: infinigen" in screen
    for phase in ("loading", "reading", "question"):
        frames = [frame for frame in read_frames(written, phase) if " of " in frame]
        assert frames, f"{phase} has a total"
        assert frames[0].startswith("0 "), f"{phase} has it at once"


def test_progress_of_the_demo_and_its_answer(tmp_path: Path) -> None:
    written = run_on_terminal("demo", "--tokens", "400", "--facts", "4")
    screen = read_screen(written)
    answer = next(line for line in screen if line.startswith("3/3 expected: "))[-4:]
    assert answer in screen, "alone on its line"
    assert not [line for line in screen if "━━━" in line]


COMMANDS = {
    "measuring": ["profile", "--tokens", "64", "--limit", "2", "--light", "--prompts"],
    "eval": ["eval", "--tasks", "niah_single", "--methods", "window", "--fractions", "0.1", "--lengths", "256",
             "--limit", "1", "--threads", "1", "--trace", "0", "--out"],
    "decode": ["bench", "decode", "--contexts", "128", "--layers", "1", "--rounds", "1", "--threads", "1",
               "--methods", "matmul-bf16"],
}  # fmt: skip


@pytest.mark.parametrize("phase", COMMANDS)
def test_a_long_command_has_a_total_at_once_and_leaves_no_bar(phase: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    more = {"measuring": [str(tmp_path / "code.py"), "--out", str(tmp_path / "p")], "eval": [str(tmp_path / "eval")]}
    written = run_on_terminal(*COMMANDS[phase], *more.get(phase, []))
    frames = [frame for frame in read_frames(written, phase) if " of " in frame]
    assert frames[0].startswith("0 of ")
    assert not [line for line in read_screen(written) if "━━━" in line and phase in line]


def test_nothing_of_a_bar_where_no_one_looks(tmp_path: Path) -> None:
    """With --json, on a terminal too, and where stderr is none."""
    path = tmp_path / "code.py"
    path.write_text(CODE)
    asked = ["run", "--file", str(path), "--max-new-tokens", "2", QUESTION]
    written = run_on_terminal(*asked, "--json").removeprefix("farkv: starting …\r\x1b[2K")
    assert json.loads(written)["generated_tokens"] == 2
    assert "━" not in farkv(*asked).stderr


def test_a_screen_is_what_was_written_last() -> None:
    assert read_screen("one\r\nlong\r\x1b[2Kshort\r\n\x1b[1Aover") == ["one", "overt", ""]
    assert read_screen("x" * 81 + "\x1b[31m!\x1b[0m") == ["x" * 80, "x!"]
    assert read_screen("\x1b[?25lab\r\x1b[K") == [""]


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
