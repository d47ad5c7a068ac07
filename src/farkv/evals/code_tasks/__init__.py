"""The tasks, one file each; a task draws its own lines and turns, `farkv.evals.text` adds filler."""

from __future__ import annotations

from collections.abc import Callable

from farkv.evals.code_tasks import extraction, longgen, multiturn, niah, qa, vt, words
from farkv.evals.draw import Draw
from farkv.evals.sample import Made

# RULER's names where RULER has the task.
CODE_TASKS: dict[str, Callable[[Draw], Made]] = {
    "niah_single": niah.make_single,
    "niah_multikey": niah.make_multikey,
    "niah_multivalue": niah.make_multivalue,
    "niah_multiquery": niah.make_multiquery,
    "vt": vt.make,
    "cwe": words.make_common,
    "fwe": words.make_frequent,
    "qa": qa.make,
    "extraction": extraction.make,
    "multiturn": multiturn.make,
    "longgen": longgen.make,
}
