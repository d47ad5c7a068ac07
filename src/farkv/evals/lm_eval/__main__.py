"""The harness's own command line, with `--model farkv` known to it."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports] - an extra

import farkv.evals.lm_eval  # noqa: F401 - registers the model

if __name__ == "__main__":
    cli_evaluate()
