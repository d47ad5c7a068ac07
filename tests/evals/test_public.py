"""Public sets from small files in the originals' formats."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farkv.demo import MODEL_PATH
from farkv.errors import ConfigError, InputError
from farkv.evals.public import SETS, load_public
from farkv.evals.public.read import Record
from farkv.evals.public.ruler import QUESTIONS, split_row
from farkv.evals.sample import Sample
from farkv.evals.score import SCORES
from farkv.evals.text import CONTINUATION

LINES = [f"The grass of field {i} is green and the sky above it is blue.\n" for i in range(400)]
GOOD = json.dumps({"input": "x\nQuestion: y", "outputs": ["1"]}) + "\n"
NIAH = "What are all the special magic numbers for fox mentioned in the provided text?"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_PATH)


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def make_ruler(n_lines: int, at: int = 3) -> dict[str, Any]:
    text = "".join([*LINES[:at], "One of the numbers for fox is: 4821.\n", *LINES[at:n_lines]])
    return {"index": 0, "input": f"Memorize.\n{text}{NIAH}", "outputs": ["4821", "77"], "length": 500,
            "answer_prefix": " The special magic numbers are"}  # fmt: skip


def load(spec: str, tokenizer: Any, *lengths: int, limit: int | None = None, seed: int = 0) -> list[Sample]:
    return list(load_public(spec, tokenizer, lengths, limit, seed))


def test_ruler_own_files_are_cut_where_the_question_begins(tmp_path: Path, tokenizer: Any) -> None:
    rows = [make_ruler(25), make_ruler(27, at=20), make_ruler(300)]
    write_lines(tmp_path / "4096" / "niah_multivalue" / "validation.jsonl", rows)
    found = load(f"ruler:{tmp_path}", tokenizer, 1024)
    assert [(s.task, s.length, s.seed) for s in found] == [("ruler:niah_multivalue", 1024, n) for n in (0, 1)]
    for sample, row in zip(found, rows, strict=False):
        (turn,) = sample.turns
        assert sample.text + turn.completion == row["input"] + row["answer_prefix"]
        assert turn.completion.startswith(NIAH) and turn.instruction == NIAH
        assert (turn.expected, turn.score) == (("4821", "77"), "all")
        assert sample.depths[0] == pytest.approx(row["input"].index("4821") / len(sample.text))
        assert 512 < count(tokenizer, sample.text + turn.completion) <= 1024
    assert found[0].meta["source"].endswith("validation.jsonl:1") and found[0].meta["max_new_tokens"] == "128"


def test_ruler_rows_with_context_and_question_apart(tmp_path: Path, tokenizer: Any) -> None:
    row = {"context": "".join(LINES[:25]), "question": "Question: Who?", "answer_prefix": "Answer:",
           "answer": ["Ann", "Anna"], "task": "qa_1", "max_new_tokens": 32}  # fmt: skip
    (sample,) = load(f"ruler:{write_lines(tmp_path / 'test.jsonl', [row])}", tokenizer, 1024)
    (turn,) = sample.turns
    assert (sample.task, sample.text, sample.depths) == ("ruler:qa_1", row["context"], ())
    assert (turn.completion, turn.instruction, turn.score) == ("Question: Who?Answer:", "Question: Who?", "any")
    assert SCORES[turn.score](" anna.", turn.expected) == 1.0


@given(st.text(max_size=200), st.sampled_from(QUESTIONS), st.text(max_size=80), st.booleans())
def test_ruler_split_loses_no_byte(text: str, opening: str, rest: str, apart: bool) -> None:
    # An older file has no answer_prefix; a task of somebody's own asks on its last line.
    whole = "x\n" + text + opening + rest
    fields = {"input": whole, "outputs": ["1"], **({"answer_prefix": " A:"} if apart else {})}
    before, question, prefix, how = split_row(Record(Path("f"), 1, fields))
    assert before + question + prefix == whole + (" A:" if apart else "") and how == "question's beginning"
    assert question.startswith(QUESTIONS) and not any(q in question[1:] for q in QUESTIONS if q not in rest)


def test_ruler_falls_back_to_the_last_line_or_says_so() -> None:
    fields = {"input": "one\ntwo\nask me\n\n", "outputs": ["1"]}
    assert split_row(Record(Path("f"), 1, fields)) == ("one\ntwo\n", "ask me\n\n", "", "last line")
    with pytest.raises(InputError, match=r"f:1: expected an input whose question begins .* got input \(str\)"):
        split_row(Record(Path("f"), 1, {"input": "no line"}))


def make_longbench(n_lines: int, answer: str = "B") -> dict[str, Any]:
    return {"_id": "6", "domain": "Code", "sub_domain": "Repo", "difficulty": "easy", "length": "short",
            "question": "Which colour?", "choice_A": "red", "choice_B": "blue", "choice_C": "pink", "choice_D": "grey",
            "answer": answer, "context": "".join(LINES[:n_lines])}  # fmt: skip


def test_longbench_loses_its_middle_and_no_more(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([make_longbench(5), make_longbench(22), make_longbench(400)]))
    found = load(f"longbench-v2:{path}", tokenizer, 1024, 2048)
    assert [(s.length, s.seed, s.meta["cut"]) for s in found] == [
        (1024, 1, "no"),
        (1024, 2, "middle"),
        (2048, 2, "middle"),
    ]
    for sample in found:
        (turn,) = sample.turns
        whole = sample.text + turn.completion + turn.answer
        assert sample.length * (0.5 if sample.meta["cut"] == "no" else 0.97) < count(tokenizer, whole) <= sample.length
        assert sample.text.startswith(LINES[0]) and (turn.answer, turn.expected, turn.score) == (" B", ("B",), "letter")
        assert "C. pink\nD. grey\nAnswer:" in turn.completion and sample.meta["chance"] == "0.25"
    assert found[1].text.endswith(LINES[399])


def test_scbench_asks_turn_by_turn(tmp_path: Path, tokenizer: Any) -> None:
    context = "".join(LINES[:25])
    turns = [{"input": f"Key {i}?", "answer": f"v{i}"} for i in range(3)]
    write_lines(tmp_path / "scbench_kv.jsonl", [{"id": 1, "context": context, "multi_turns": turns}])
    choice = {"input": "Which?", "answer": "ash", "options": ["oak", "ash", "elm", "fir"]}
    write_lines(tmp_path / "scbench_choice_eng.jsonl", [{"id": 1, "context": context, "multi_turns": [choice]}])
    numbers = {"id": 1, "context": list(range(300)), "multi_turns": [{"input": "The largest is", "answer": 299}]}
    write_lines(tmp_path / "scbench_mf.jsonl", [numbers])
    # Scored by what is not computed here: left out of a folder, refused by name.
    summary = write_lines(tmp_path / "scbench_summary.jsonl", [])
    found = {s.task: s for s in load(f"scbench:{tmp_path}", tokenizer, 1024, 2048)}
    assert sorted(found) == ["scbench:choice_eng", "scbench:kv", "scbench:mf"]
    kv = found["scbench:kv"]
    assert kv.text == context and [t.completion for t in kv.turns] == [f"\nKey {i}?" for i in range(3)]
    (asked,) = found["scbench:choice_eng"].turns
    assert asked.expected == ("B",) and "B. ash\n" in asked.completion
    (asked,) = found["scbench:mf"].turns
    assert found["scbench:mf"].text.startswith("[0, 1, ") and SCORES[asked.score](" 299, I think", asked.expected) == 1
    with pytest.raises(InputError, match="summary is scored by ROUGE"):
        load(f"scbench:{summary}", tokenizer, 1024)


def test_pg19_continues_books_byte_for_byte(tmp_path: Path, tokenizer: Any) -> None:
    books = {f"{i}.txt": "\n\n".join("".join(LINES[j : j + 3]) for j in range(i, 350, 3)) for i in range(3)}
    for name, text in {**books, "short.txt": "Too short."}.items():
        (tmp_path / name).write_text(text)
    found = load(f"pg19:{tmp_path}", tokenizer, 512)
    assert [(s.task, s.seed, s.turns) for s in found] == [("pg19", i, ()) for i in range(3)]
    for sample, text in zip(found, books.values(), strict=True):
        assert sample.text + sample.continuation in text
        ids = tokenizer(sample.text + sample.continuation, add_special_tokens=False)["input_ids"]
        assert len(ids) == 512 + CONTINUATION and count(tokenizer, sample.text) == pytest.approx(512, abs=2)
    jsonl = write_lines(tmp_path / "books.jsonl", [{"text": text} for text in books.values()])
    assert [s.text for s in load(f"pg19:{jsonl}", tokenizer, 512)] == [s.text for s in found]
    with pytest.raises(InputError, match=f"at least {100_000 + CONTINUATION} tokens; 3 books are all shorter"):
        load(f"pg19:{jsonl}", tokenizer, 100_000)


def test_seed_and_limit_choose_the_same_samples_again(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "niah_single_1.jsonl", [make_ruler(24 + i % 3) for i in range(12)])
    few, same, more, other = (
        [s.seed for s in load(f"ruler:{path}", tokenizer, 1024, limit=n, seed=seed)]
        for n, seed in ((4, 0), (4, 0), (7, 0), (4, 1))
    )
    assert few == same == sorted(few) and set(few) < set(more) and few != other


@pytest.mark.parametrize(
    ("spec", "name", "text", "told"),
    [
        ("ruler", "a.jsonl", GOOD + '{"input": 3}\n', r"a.jsonl:2: .* input to be a string; got input \(int\)"),
        ("ruler", "a.jsonl", '{"input": "x\\nQuestion: y"}\n', r"a.jsonl:1: expected the field outputs to be a list"),
        ("ruler", "a.jsonl", '\n{"input": \n', r"a.jsonl:2: expected JSON; got"),
        ("ruler", "a.json", "[3]", r"a.json:1: expected a JSON object; got int"),
        ("ruler", "a.parquet", "x", r"a.parquet: expected .jsonl or .json; .* pandas.read_parquet"),
        ("longbench-v2", "a.json", "{}", r"a.json: expected a JSON list of objects; got dict"),
        ("longbench-v2", "a.json", '[{"answer": "E"}]', r"a.json:1: expected the field answer to be one of A, B, C, D"),
        ("scbench", "scbench_vt.jsonl", '{"context": "x"}', r"scbench_vt.jsonl:1: expected the field multi_turns"),
        ("scbench", "other.jsonl", "{}", r"other is not SCBench's"),
        ("pg19", "a.jsonl", "{}", r"a.jsonl:1: expected the field text to be a string; got no fields"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path: Path, tokenizer: Any, spec: str, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told):
        load(f"{spec}:{tmp_path / name}", tokenizer, 512)


def test_nothing_of_a_wanted_length_says_what_there_is(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "vt.jsonl", [make_ruler(25)])
    with pytest.raises(
        InputError, match=r"fit in 8192 tokens and are longer than half of that; got 1 between \d+ and .*--lengths"
    ):
        load(f"ruler:{path}", tokenizer, 8192)
    with pytest.raises(InputError, match="expected a file or a folder"):
        load(f"ruler:{tmp_path / 'none'}", tokenizer, 512)
    with pytest.raises(InputError, match="expected UTF-8; got the byte 0xff"):
        path.write_bytes(b"\xff{}")
        load(f"ruler:{path}", tokenizer, 512)


def test_specs() -> None:
    for spec in ("longbench:x", "ruler", "ruler:"):
        with pytest.raises(ConfigError, match=f"expected SET:PATH with SET one of {', '.join(SETS)}"):
            load_public(spec, None, [512])


def test_offline_says_where_the_file_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    for spec, file in (
        ("longbench-v2:hub", "THUDM/LongBench-v2/data.json"),
        ("scbench:hub/scbench_kv.jsonl", "microsoft/SCBench/data/scbench_kv.jsonl"),
    ):
        with pytest.raises(
            InputError, match=f"{file}: expected the file on the hub .* give {spec.partition(':')[0]}:PATH"
        ):
            load_public(spec, None, [512])


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" B", 1), ("B. blue", 1), ("(B)", 1), ("The answer is B.", 1), (" A", 0), ("Blue", 0), ("", 0)],
)
def test_letters(answer: str, right: float) -> None:
    assert SCORES["letter"](answer, ("B",)) == right
