"""Files are replaced whole or not at all; what a killed process left is taken over, what a living one holds is not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farkv.files import InUseError, lock_file, replace_file, write_all, write_file

# A process that is killed, and one that waits, in the middle of writing.
WRITER = """
import os, signal, sys
from pathlib import Path
from farkv.files import replace_file, write_all
with replace_file(Path(sys.argv[1]), 9000) as fd:
    write_all(fd, memoryview(b"half"))
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_file_is_replaced_by_any_other_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"one", b"", b"longer than the number of any process", b"2"):
        write_file(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["a"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644 & ~mask


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_whatever_stops_a_writer_the_old_file_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")

    def write_half() -> None:
        with replace_file(path, 3) as fd:
            write_all(fd, memoryview(b"n"))
            raise error

    with pytest.raises(type(error)) as raised:
        write_half()
    assert raised.value is error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / ".link.part").symlink_to(tmp_path / "else")
    for path, says in ((tmp_path, "directory"), (tmp_path / "no/a", "No such file"), (tmp_path / "link", "symbolic")):
        with pytest.raises(OSError, match=says):
            write_file(path, b"x")
    with pytest.raises(OSError, match=r"File too large|No space left"):
        write_file_of(tmp_path / "a", 2**62)
    assert os.listdir(tmp_path) == [".link.part"]


def write_file_of(path: Path, n_bytes: int) -> None:
    with replace_file(path, n_bytes):
        raise AssertionError("there is no room for it")


def test_one_writes_at_a_time_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        try:
            assert child.stdout.readline() == "writing\n"
            # The number of the process was overwritten by what it writes.
            with pytest.raises(InUseError, match="in use by another process"):
                write_file(path, b"new")
            assert path.read_bytes() == b"old"
        finally:
            child.kill()
            child.wait()
    assert sorted(os.listdir(tmp_path)) == [".a.part", "a"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_lock_is_free_once_it_is_closed_and_says_whose_it_is(tmp_path: Path) -> None:
    fd = lock_file(tmp_path / "lock", 0o600)
    with pytest.raises(InUseError, match=f"in use by process {os.getpid()}") as caught:
        lock_file(tmp_path / "lock", 0o600)
    assert caught.value.who == f"process {os.getpid()}"
    os.close(fd)
    os.close(lock_file(tmp_path / "lock", 0o600))
    assert (tmp_path / "lock").read_text() == str(os.getpid())
