"""A script's run: its options, its file of results, its clock."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import RESULTS, Row


def make_parser(doc: str | None, out: str = "", threads: int = 1) -> argparse.ArgumentParser:
    """Return a parser with the script's own text, `--threads`, and `--out` and `--add` where there is a file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=threads, type=int)
    if out:
        parser.add_argument("--out", default=RESULTS / out, type=Path)
        parser.add_argument("--add", action="store_true", help="add to the file of results")
    return parser


class Recorder:
    """A run of a script: its options, its file of results, and its progress."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.args, self.started = parser.parse_args(), time.time()
        torch.set_num_threads(self.args.threads)
        if not self.args.add:
            self.args.out.write_text("")

    def write(self, *rows: Row) -> None:
        """Add rows to the file: a run that is stopped keeps what it has measured."""
        with self.args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def say(self, text: str) -> None:
        """Show how far the run is."""
        sys.stderr.write(f"{text}, {time.time() - self.started:.0f} s\n")


def read_numbers(text: str) -> list[int]:
    """Read whole numbers by commas."""
    return [int(n) for n in text.split(",")]


def read_names(text: str) -> list[str]:
    """Read names by commas."""
    return text.split(",")


def time_call(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and what it returned."""
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def find_versions() -> dict[str, str]:
    """Return what a row says of the software under it."""
    return {"torch": torch.__version__, "python": platform.python_version()}
