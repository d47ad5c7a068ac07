"""The harness's own command line, with `--model farkv` registered."""

from __future__ import annotations

from importlib import import_module

import farkv.evals.lm_eval  # noqa: F401 - registers the model

if __name__ == "__main__":
    # By name: the harness is an extra, and type checkers must pass with and without it.
    import_module("lm_eval.__main__").cli_evaluate()
