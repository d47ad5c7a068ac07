"""Files are replaced whole or not at all; what a name leads to is not believed; one writer at a time."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farkv.errors import StoreError
from farkv.files import InUseError, append_line, lock_file, open_file, read_file, replace_file, write_all, write_file
from farkv.names import RefusedError, check_ours

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
IS_ROOT = os.geteuid() == 0


def write(path: Path, data: bytes = b"new", *, private: bool = False) -> None:
    write_file(path, data, "file", private=private)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_file_is_replaced_by_any_other_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"one", b"", b"longer than the number of any process", b"2"):
        write(path, data)
        assert read_file(path) == data
        assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o000])
def test_a_new_file_has_the_usual_mode_or_is_the_users_alone(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        write(tmp_path / "plain")
        write(tmp_path / "private", private=True)
        append_line(tmp_path / "lines", "x")
    assert mode_of(tmp_path / "plain") == 0o666 & ~mask
    assert mode_of(tmp_path / "private") == mode_of(tmp_path / "lines") == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444, 0o666, 0o6755])
@pytest.mark.parametrize("private", [False, True])
def test_what_is_replaced_keeps_its_mode(tmp_path: Path, mode: int, private: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path, private=private)
    assert (mode_of(path), path.read_bytes()) == (mode & 0o777, b"new")


@pytest.mark.skipif(not IS_ROOT, reason="gives a file to another user")
def test_another_users_file_is_replaced_but_a_text_is_not_shown_to_them(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for private, mode in ((True, 0o600), (False, 0o664)):
        path.unlink(missing_ok=True)
        path.write_bytes(b"theirs")
        path.chmod(0o664)
        os.chown(path, 4321, 1234)
        write(path, private=private)
        found = path.stat()
        assert (found.st_uid, mode_of(path), path.read_bytes()) == (0, mode, b"new")
        assert private or found.st_gid == 1234


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_whatever_stops_a_writer_the_old_file_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    write(path, b"old")

    def write_half() -> None:
        with replace_file(path, 3) as fd:
            write_all(fd, memoryview(b"n"))
            raise error

    with pytest.raises(type(error)) as raised:
        write_half()
    assert raised.value is error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_without_room_nothing_is_left(tmp_path: Path) -> None:
    write(tmp_path / "a", b"old")
    append_line(tmp_path / "lines", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for name in ("a", "b"):
            with pytest.raises(StoreError, match=r"file .*: cannot be written \(File too large\), .* with room for"):
                write(tmp_path / name, bytes(2000))
        with pytest.raises(OSError, match="File too large"):
            append_line(tmp_path / "lines", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["a", "lines"]
    assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / "lines").read_text() == "old\n"
    with pytest.raises(OSError, match=r"File too large|No space left"), replace_file(tmp_path / "a", 2**62):
        raise AssertionError("there is no room for it")


# --- what a name may lead to -------------------------------------------------------------------------------------


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


PLANTED: dict[str, Callable[[Path, Path], None]] = {
    "is a link": lambda path, victim: path.symlink_to(victim),
    "is a link ": lambda path, victim: path.symlink_to("nothing"),
    "is a pipe": lambda path, victim: os.mkfifo(path),
    "is a socket": lambda path, victim: bind(path),
    "irectory": lambda path, victim: path.mkdir(),
}
# These are files, and only where what is in them is believed or added to are they refused.
OTHERS: dict[str, Callable[[Path, Path], None]] = {
    "is one file under 2 names": lambda path, victim: path.hardlink_to(victim),
    "belongs to user 4321": lambda path, victim: (path.touch(), os.chown(path, 4321, 4321))[0],
    "can be written by others": lambda path, victim: (path.touch(), path.chmod(0o666))[0],
    "holds something else": lambda path, victim: path.write_text("dear diary") and None,
}


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "victim"
    path.write_bytes(b"12345")
    yield path
    assert path.read_bytes() == b"12345"


@pytest.mark.parametrize("says", PLANTED)
def test_what_is_no_file_is_refused_as_it_is(tmp_path: Path, victim: Path, says: str) -> None:
    path = tmp_path / "folder" / "a"
    path.parent.mkdir()
    PLANTED[says](path, victim)
    before = path.lstat()
    with pytest.raises(StoreError, match=rf"file .*: cannot be written \(.*{says.strip()}"):
        write(path)
    says = says.strip().replace("irectory", "is a folder")
    with pytest.raises(OSError, match=says):
        append_line(path, "x")
    assert path.lstat() == before
    assert os.listdir(path.parent) == ["a"]
    if "link" not in says:
        with pytest.raises(OSError, match=says):
            read_file(path)


@pytest.mark.parametrize("says", [*PLANTED, *OTHERS])
def test_a_lock_that_is_none_is_refused_as_it_is(tmp_path: Path, victim: Path, says: str) -> None:
    if "user" in says and not IS_ROOT:
        pytest.skip("gives a file to another user")
    path = tmp_path / "lock"
    (PLANTED | OTHERS)[says](path, victim)
    before = path.lstat(), path.read_bytes() if path.is_file() else None
    with pytest.raises(OSError, match=says.strip().replace("irectory", "is a folder")):
        lock_file(path)
    after = path.lstat(), path.read_bytes() if path.is_file() else None
    # But for times.
    assert (after[0][:7], after[1]) == (before[0][:7], before[1])


@pytest.mark.parametrize("says", ["is a link", "is a pipe", *list(OTHERS)[:-1]])
def test_only_what_this_user_alone_can_have_written_is_ours(tmp_path: Path, victim: Path, says: str) -> None:
    if "user" in says and not IS_ROOT:
        pytest.skip("gives a file to another user")
    (PLANTED | OTHERS)[says](tmp_path / "a", victim)
    with pytest.raises(RefusedError, match=says):
        check_ours(tmp_path / "a")
    write(tmp_path / "b", private=True)
    check_ours(tmp_path / "b")


def test_a_hard_link_is_replaced_under_its_own_name_alone(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "a").hardlink_to(victim)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"
    with pytest.raises(RefusedError, match="2 names"):
        (tmp_path / "lines").hardlink_to(victim)
        append_line(tmp_path / "lines", "x")


def test_a_link_put_there_meanwhile_is_refused(tmp_path: Path, victim: Path) -> None:
    with pytest.raises(RefusedError, match="is a link"), replace_file(tmp_path / "a", 1) as fd:
        write_all(fd, memoryview(b"x"))
        (tmp_path / "a").symlink_to(victim)
    assert sorted(os.listdir(tmp_path)) == ["a", "victim"]


def test_devices_are_refused() -> None:
    for name in ("/dev/null", "/dev/zero", "/dev/full"):
        with pytest.raises(StoreError, match="is a device"):
            write(Path(name))
        with pytest.raises(OSError, match="is a device"):
            append_line(Path(name), "x")
        with pytest.raises(RefusedError, match="is a device, expected a file"):
            open_file(name)


@pytest.mark.parametrize("name", ["a\0b", "\0", "half \ud800"])
def test_what_cannot_be_a_name_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(StoreError, match="no file has such a name"):
        write(path)
    for use in (read_file, lock_file, check_ours, lambda path: append_line(path, "x")):
        with pytest.raises(RefusedError, match="no file has such a name"):
            use(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["n" * 255, "☺" * 85, "new\nline", os.fsdecode(b"\xff\xfe"), "-o", ".hidden", "a:b", " ", "[bold]", "'\""]
)
def test_unusual_names_are_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for data in (b"one", b"two"):
        write(path, data)
        assert read_file(path) == data
    append_line(path, "x")
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(StoreError) as caught:
        write(path / "below")
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_is_closed_or_missing_is_said(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path, "directory"),
        (tmp_path / "no/a", "No such file"),
        (tmp_path / ("n" * 256), "too lo"),
    ):
        with pytest.raises(StoreError, match=says):
            write(path)
    assert os.listdir(tmp_path) == []


# --- one writer at a time ----------------------------------------------------------------------------------------


def test_one_writes_at_a_time_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, b"old")
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        try:
            assert child.stdout.readline() == "writing\n"
            with pytest.raises(StoreError, match=f"is being written by process {child.pid}; wait"):
                write(path)
            write(tmp_path / "b")
            assert path.read_bytes() == b"old"
        finally:
            child.kill()
            child.wait()
    left = set(os.listdir(tmp_path)) - {"a", "b"}
    assert len(left) == 1
    assert mode_of(tmp_path / left.pop()) == 0o600
    write(path)
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_only_looks_like_a_writers_stays_and_stops_no_one(tmp_path: Path, victim: Path) -> None:
    with replace_file(tmp_path / "a", 1) as fd:
        (own,) = (name for name in os.listdir(tmp_path) if name.startswith(".a."))
        write_all(fd, memoryview(b"x"))
    names = [own.replace(own.split("-")[0].split(".")[-1], str(n)) for n in (1, 2, 3, 4)]
    (tmp_path / names[0]).symlink_to(victim)
    (tmp_path / names[1]).hardlink_to(victim)
    os.mkfifo(tmp_path / names[2])
    (tmp_path / ".a.part").symlink_to(victim)
    if IS_ROOT:
        (tmp_path / names[3]).touch()
        os.chown(tmp_path / names[3], 4321, 4321)
    before = set(os.listdir(tmp_path))
    write(tmp_path / "a")
    assert set(os.listdir(tmp_path)) == before


def test_a_lock_is_free_once_it_is_closed_and_says_whose_it_is(tmp_path: Path) -> None:
    fd = lock_file(tmp_path / "lock")
    with pytest.raises(InUseError, match=f"in use by process {os.getpid()}") as caught:
        lock_file(tmp_path / "lock")
    assert caught.value.who == f"process {os.getpid()}"
    os.close(fd)
    os.close(lock_file(tmp_path / "lock"))
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    assert mode_of(tmp_path / "lock") == 0o600
