"""`farkv` on the command line: in this process, where the libraries are loaded already, or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
from transformers import modeling_gguf_pytorch_utils

from farkv.cli import main

FACTS = "apple_river = 4821\nstone_cloud = 1973\n"
QUESTION = "print(apple_river)  # "
CODE = FACTS + "import os\n\n\ndef f(path):\n    return os.path.join(path, 'x')\n" * 20


class Done(NamedTuple):
    """How a command ended."""

    returncode: Any
    stdout: str
    stderr: str


def farkv(*arguments: str, text: str = "") -> Done:
    """Run a command in this process, by its own `main`, without a network; `text` is piped in."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["farkv", *arguments])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        patch.setenv("COLUMNS", "80")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        # What it quiets would stay quiet for the tests after these.
        patch.setattr("farkv.hf.load.quiet_libraries", lambda: None)
        patch.setattr("transformers.utils.logging._tqdm_active", False)
        patch.setattr(modeling_gguf_pytorch_utils, "tqdm", lambda rows, **_: rows)
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def run_process(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "farkv.cli", *arguments],
        capture_output=True, text=True, input=text, timeout=600, env=environment, check=False,
    )  # fmt: skip
