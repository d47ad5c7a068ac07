"""An older torch or transformers is named in words, before anything of it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from farkv.requires import LEAST, check_versions

ROOT = Path(__file__).parent.parent


def attach_with(folder: Path) -> str:
    """Return what a process says that asks for farkv.attach, with the packages of a folder before all others."""
    path = os.pathsep.join([str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    code = "import farkv\ntry:\n    farkv.attach\nexcept farkv.FarKVError as error:\n    print(error)"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "old"), [("transformers", "5.9.2"), ("transformers", "4.57.0"), ("torch", "2.7.1+cpu")]
)
def test_an_older_release_is_refused(tmp_path: Path, name: str, old: str) -> None:
    info = tmp_path / f"{name}-{old}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {old}\n")
    wanted = ".".join(map(str, LEAST[name]))
    assert attach_with(tmp_path) == f"farkv: needs {name} >= {wanted}, found {old}: pip install -U {name}"


def test_what_is_installed_here_is_new_enough() -> None:
    check_versions()


def test_it_is_what_the_package_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, least in LEAST.items():
        line = next(line for line in asked if re.match(rf"{name}\b", line))
        assert f">={'.'.join(map(str, least))}" in line.replace(" ", "")
