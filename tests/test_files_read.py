"""What is read by its name: plain files of a bounded size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farkv.files import read_file


def test_only_plain_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match="at most 4 bytes, got 5"):
        read_file(path, 4)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        with pytest.raises((OSError, ValueError)):
            read_file(odd, 5)
    # What the system says is empty may have more to give.
    with pytest.raises(ValueError, match="being written"):
        read_file("/proc/self/status", 2**20)
