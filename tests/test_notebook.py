"""The notebook in `examples` runs as it is, in a kernel of its own, and is committed without what it printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook's library is in the extra dev")
nbclient = pytest.importorskip("nbclient", reason="the notebook's library is in the extra dev")

PATH = Path(__file__).parents[1] / "examples/first_steps.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_notebook_runs_and_finds_what_it_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing of the user's own, and nothing left behind.
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    # Other libraries say there that they have no widgets; we say nothing.
    assert "farkv" not in "".join(out["text"] for out in outputs if out.get("name") == "stderr")
    said = "".join(out["text"] for out in outputs if out.get("name") == "stdout")
    answers = re.findall(r"answer: (\d+) expected: (\d+)", said)
    assert len(answers) == 3
    assert all(answer == expected for answer, expected in answers)
    pages = [out["data"]["text/html"] for out in outputs if "data" in out and "text/html" in out["data"]]
    assert len(pages) == 1
    assert "read per layer" in pages[0]
    assert "infinigen" in said
    assert "bytes per token from the file" in said
