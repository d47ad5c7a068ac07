"""The command line: `farkv run`, `profile`, `plan`, `demo`, `eval`, `report`, `bench`; one file per command.

In: arguments. Out: the answer (or one JSON object) on stdout, everything else on stderr, and an exit code.
`commands.py` has all commands, `boundary.py` says what becomes of an error, `terminal.py` what may reach a terminal.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; whatever goes wrong becomes one line and an exit code."""
    # Light, so that Ctrl-C finds the boundary: what takes seconds is imported behind it.
    from farkv.cli.boundary import guard

    sys.exit(guard(sys.argv[1:]))
