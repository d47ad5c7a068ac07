"""Text of others in messages: one line, short, nothing in it acted upon, and plain text as it is."""

from __future__ import annotations

import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv.errors import CapacityError, FarKVError, SessionError, StoreError
from farkv.quote import MOST_CHARACTERS, make_line, quote, shorten, show_controls, show_value

ANY = st.text(st.characters(), max_size=40) | st.text("\x1b[]\n\t\x07\x9b\u202e\ud800ab ", max_size=40)


@given(ANY)
def test_no_text_reaches_a_terminal_but_as_text(text: str) -> None:
    shown = show_controls(text, keep="\n\t")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown.replace("\n", "").replace("\t", ""))
    shown.encode()
    for line in (make_line(text), quote(text), str(StoreError(text))):
        assert len(line.splitlines()) <= 1
        line.encode()
    assert show_controls(shown, keep="\n\t") == shown


@pytest.mark.parametrize("text", ["", "plain", "é☺ 漢字 עברית", "a\\x1b[0m", "C:\\x", "[bold]x[/bold]"])
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    assert show_controls(text) == text == make_line(text)


def test_escapes_are_those_of_python() -> None:
    assert show_controls("\x1b[2J\n\x9b\u202e\ud800\x7f") == r"\x1b[2J\n\x9b\u202e\ud800\x7f"
    assert show_controls("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"


def test_names_are_quoted_where_they_are_not_plain() -> None:
    for name in ("/data/kv", "a.b-c_d:e", "~/x", "漢字.txt", "owner/name@main"):
        assert quote(name) == name
    assert quote("two words") == "'two words'"
    assert quote("a\nb") == r"'a\nb'"
    assert quote(os.fsdecode(b"\xff")) == r"'\udcff'"
    assert quote("") == "''"


def test_long_things_are_cut_in_their_middle() -> None:
    assert shorten("a" * 10, 10) == "a" * 10
    assert shorten("a" * 9 + "b" * 9, 10) == "aaaaa[…8 more…]bbbbb"
    assert len(show_value("9" * 5000)) < 120
    assert show_value(10**5000) == "a number of thousands of digits"
    line = make_line("begin " + "9" * 400 + " end")
    assert len(line) < 250
    assert line.startswith("begin 999")
    assert line.endswith("999 end")
    assert len(make_line("word " * 5000)) < MOST_CHARACTERS + 50


@pytest.mark.parametrize("kind", [FarKVError, SessionError, StoreError, CapacityError])
def test_every_error_of_ours_is_one_line_in_another_process_too(kind: type[FarKVError]) -> None:
    error = kind("file a\nb\x1b[2J: no")
    assert str(error) == r"file a\nb\x1b[2J: no"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
