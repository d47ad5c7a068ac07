"""`farkv run --session`: written once, asked by other processes, the same answer from the same path."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from farkv.session.header import ALIGN_BYTES
from tests.command import CODE as TEXT
from tests.command import QUESTION, farkv, run_process

OTHER = "print(stone_cloud)  # "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text and its session, and what the first run answered."""
    path = tmp_path_factory.mktemp("session")
    (path / "code.py").write_text(TEXT)
    done = farkv("run", "--file", str(path / "code.py"), *asking(path), QUESTION)
    assert done.returncode == 0, done.stderr
    assert "session" in done.stderr
    (path / "first.json").write_text(done.stdout)
    return path


def asking(folder: Path) -> list[str]:
    return ["--session", str(folder / "book.farkv"), "--max-new-tokens", "4", "--json"]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "book.farkv").read_bytes()).hexdigest()


def test_later_runs_need_no_file_and_give_the_same_answer(folder: Path) -> None:
    before, first = digest(folder), json.loads((folder / "first.json").read_text())
    assert first["answer"] == "4821"
    again = json.loads(run_process("run", *asking(folder), QUESTION).stdout)
    with_file = json.loads(farkv("run", "--file", str(folder / "code.py"), *asking(folder), QUESTION).stdout)
    assert json.loads(farkv("run", *asking(folder), OTHER).stdout)["answer"] == "1973"
    for later in (again, with_file):
        assert later["answer"] == first["answer"]
        assert list(later) == list(first)
        assert later["context_tokens"] == first["context_tokens"]
        # The run that wrote it has read the text, the others have not.
        assert later["time"]["prefill_s"] < first["time"]["prefill_s"] < first["time"]["first_token_s"]
        assert 0 == first["session_tokens"] < later["session_tokens"] < first["context_tokens"]
        assert later["disk_bytes_per_token"] == first["disk_bytes_per_token"]
    assert digest(folder) == before


def test_a_longer_text_is_read_on_from_where_the_session_ends(folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    (tmp_path / "longer.py").write_text(TEXT + "green_field = 7316\n")
    done = farkv("run", "--file", str(tmp_path / "longer.py"), *asking(folder), "print(green_field)  # ")
    first, longer = json.loads((folder / "first.json").read_text()), json.loads(done.stdout)
    assert longer["answer"] == "7316"
    assert 0 < longer["context_tokens"] - first["context_tokens"] < 20
    assert digest(folder) == before


def test_what_does_not_fit_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(TEXT[:60] + "§" + TEXT[60:])
    session = str(folder / "book.farkv")
    new = ["--file", str(folder / "code.py"), "--session", str(tmp_path / "new.farkv")]
    cases = [
        (["--file", str(tmp_path / "other.py"), "--session", session], "they differ at 60"),
        (["--session", session, "--query-aware"], "--query-aware"),
        (["--session", session, "--method", "full", "--quant", "int8"], "its quant"),
        (["--session", session, "--method", "xkv", "--fraction", "0.5"], "levers keep and near"),
        (["--session", session, "--dtype", "bfloat16"], "its records"),
        (["--session", str(tmp_path)], "expected a file"),
        (["--session", str(tmp_path / "no/such/folder/a")], "with --file"),
        (["--file", str(folder / "code.py"), "--session", str(tmp_path / "no/a")], "missing or not writable"),
        (["--session", str(tmp_path / "none.farkv")], "with --file"),
        ([*new, "--host", "2MiB", "--evict", "lru"], "--evict"),
        ([*new, "--method", "xkv", "--fraction", "0.5"], "levers keep and near"),
    ]
    for arguments, says in cases:
        done = farkv("run", *arguments, "--max-new-tokens", "2", QUESTION)
        assert done.returncode == 2, arguments
        assert done.stdout == "", arguments
        assert says in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["other.py"]


def test_a_damaged_page_gives_no_answer(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "book.farkv").read_bytes())
    start = ALIGN_BYTES * -(-(8 + int.from_bytes(data[:8], "little")) // ALIGN_BYTES)
    data[start + 100] ^= 1
    (tmp_path / "book.farkv").write_bytes(data)
    arguments = [*asking(tmp_path), "--method", "full", QUESTION]
    done = farkv("run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is damaged" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_no_newline_at_the_end_and_no_question(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(TEXT + "print(apple_river)  #")
    end = ["--max-new-tokens", "4", "--json"]
    for i, question in enumerate(("", QUESTION)):
        session = ["--session", str(tmp_path / f"{i}.farkv"), *end]
        first = farkv("run", "--file", str(path), *session, question)
        again = farkv("run", *session, question)
        assert first.returncode == again.returncode == 0, first.stderr + again.stderr
        assert json.loads(first.stdout)["answer"] == json.loads(again.stdout)["answer"] != ""
        # A session that was written without a question takes one, and the other way round.
        crossed = farkv("run", *session, QUESTION if not question else "")
        assert crossed.returncode == 0, crossed.stderr
    assert sorted(os.listdir(tmp_path)) == ["0.farkv", "1.farkv", "code.py"]
