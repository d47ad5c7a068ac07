"""Help: every command has examples, and every example is a command line that its command takes."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from farkv.cli.commands import build_command
from tests.command import farkv

ROOT = build_command(lambda asked: None)


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Give every command with its path."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


COMMANDS = dict(walk(ROOT))


def list_examples(command: Any) -> list[list[str]]:
    """Return the words of every example in a command's help; a pipe's right side, no comment in brackets."""
    lines = [line.strip() for line in inspect.cleandoc(command.callback.__doc__ or "").splitlines()]
    texts = [re.sub(r"\s{2,}\(.*\)$", "", line.split("|")[-1].strip()) for line in lines]
    return [shlex.split(text)[1:] for text in texts if text.startswith("farkv ")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "farkv")
def test_every_example_is_taken(path: tuple[str, ...]) -> None:
    examples = list_examples(COMMANDS[path])
    assert examples, "no examples"
    for words in examples:
        command, name = ROOT, "farkv"
        while words and words[0] in getattr(command, "commands", {}):
            name = words.pop(0)
            command = command.commands[name]
        if words not in (["--help"], ["--calibrate"]):
            # Reads every option and argument, as before a run; runs nothing.
            command.make_context(name, words)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "farkv")
def test_help_fits_a_terminal_and_has_a_short_flag(path: tuple[str, ...]) -> None:
    shown = farkv(*path, "-h")
    assert shown.returncode == 0
    assert shown.stdout == farkv(*path, "--help").stdout
    assert "Examples" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_without_arguments_the_help_is_shown() -> None:
    done = farkv()
    assert "Commands" in done.stdout + done.stderr
    assert "farkv: " not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rnu"], "farkv: No such command 'rnu'. Did you mean 'run'?; see farkv --help"),
        (["bench", "all"], "farkv: No such command 'all'; see farkv bench --help"),
        (["run", "--modle", "x"], "see farkv run --help"),
        (["plan", "--ratio", "many"], "see farkv plan --help"),
    ],
)
def test_what_is_not_known_is_one_line_of_ours(words: list[str], says: str) -> None:
    done = farkv(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
