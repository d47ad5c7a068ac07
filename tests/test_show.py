"""How far a command is: a total at once, the time that remains as soon as there is a rate, nothing afterwards."""

from __future__ import annotations

import io

from rich.console import Console

from farkv.show import show_phases, show_progress
from tests.terminal import read_frames, read_screen


def make_console(*, terminal: bool = True) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=80, color_system="standard"), out


def test_the_phase_that_tells_last_is_the_one_that_is_shown() -> None:
    console, out = make_console()
    with show_phases(console, quiet=False) as phases:
        loading, reading = phases.begin("loading", in_bytes=True), phases.begin("reading")
        for tell, total in ((loading, 3 << 30), (reading, 20_000)):
            for part in range(3):
                tell(total * part // 2, total)
    assert read_frames(out.getvalue(), "loading")[0].startswith("0 B of 3.0 GiB")
    frames = read_frames(out.getvalue(), "reading")
    assert frames[0].startswith("0 of 20,000")
    assert frames[-1].startswith("20,000 of 20,000 0:00:00"), "two steps give a rate"
    last = out.getvalue()[out.getvalue().index("reading") :]
    assert "loading" not in last
    assert "".join(read_screen(out.getvalue().replace("\n", "\r\n"))) == "", "nothing stays"


def test_a_phase_of_unknown_length_has_no_total() -> None:
    console, out = make_console()
    with show_progress(console, "waiting", quiet=False) as tell:
        tell(1, 2)
    assert " of " not in read_frames(out.getvalue(), "waiting")[0]
    assert read_frames(out.getvalue(), "waiting")[-1].startswith("1 of 2")


def test_nothing_is_written_where_nobody_looks() -> None:
    for quiet, terminal in ((True, True), (False, False)):
        console, out = make_console(terminal=terminal)
        with show_progress(console, "reading", quiet=quiet) as tell:
            tell(1, 2)
        assert out.getvalue() == ""
