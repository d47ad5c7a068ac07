"""A whole evaluation on the demo model: rows, proofs, gates, resuming, refusals; sharing a prefill is honest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError, ConfigError, InputError
from farkv.evals.ask import Prompter, ask_turns
from farkv.evals.describe import EvalPlan, Variant
from farkv.evals.judge import Judge, check_reads
from farkv.evals.methods import list_methods
from farkv.evals.prefill import fill_cache, prefill_once
from farkv.evals.row import RESULTS, RUN, Key, read_rows
from farkv.evals.run import run_eval
from farkv.evals.sample import Sample, Turn
from farkv.evals.text import Maker
from farkv.files import append_line
from farkv.hf.ask import Listener, prefill
from farkv.hf.load import load_model

# What the issue wants of every line.
KEYS = (
    "task", "method", "fraction", "length", "seed", "answer", "expected", "score", "read_fraction", "index_fraction",
    "prompt_sha", "gated",
)  # fmt: skip
PLAN = EvalPlan("demo", ("niah_multikey",), ("full", "infinigen", "window"), (0.1,), (512,), limit=2, threads=1)


@cache
def demo() -> tuple[Any, Any]:
    return load_model("demo", device="cpu")


@cache
def judge() -> Judge:
    return Judge(*demo())


def make(task: str, length: int = 512, seed: int = 0) -> Sample:
    return Maker(demo()[1]).make(task, length, seed)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a whole run of PLAN wrote."""
    out = tmp_path_factory.mktemp("done")
    run_eval(PLAN, out)
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


def test_every_sample_has_a_row_per_method_and_fraction(tmp_path: Path) -> None:
    plan = PLAN._replace(fractions=(0.05, 0.1), tasks=("niah_multikey", "ppl"), limit=1)
    summary = run_eval(plan, tmp_path)
    rows = read_lines(tmp_path)
    assert len(rows) == len(summary.rows) == 2 * (1 + 2 * 2)
    assert len({tuple(row[k] for k in Key._fields) for row in rows}) == len(rows)
    assert all(k in row for row in rows for k in KEYS)
    for row in rows:
        full = row["method"] == "full"
        assert row["proof"] == ("everything" if full else "sparse")
        assert row["steps"] > 0
        assert row["read_fraction"] <= row["fraction"] + 2 / row["tokens"]
        assert (row["bytes_per_step"] < row["full_bytes_per_step"]) is not full
        assert (row["kl"] is not None) == (row["task"] == "ppl")
    assert all(row["kl"] == 0 for row in rows if row["method"] == "full" and row["task"] == "ppl")
    run = json.loads((tmp_path / RUN).read_text())
    assert run["model_sha"]
    assert run["versions"]["torch"]
    reads = [json.loads(line) for line in (tmp_path / "reads.jsonl").read_text().splitlines()]
    assert {(r["method"], r["task"]) for r in reads} == {(m, t) for m in ("infinigen", "window") for t in plan.tasks}


def test_a_run_goes_on_where_it_was_cut(out: Path) -> None:
    path = out / RESULTS
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    assert run_eval(PLAN, out).written == len(lines) - 3

    def steady(line: str) -> dict[str, Any]:
        row = json.loads(line)
        return {k: v for k, v in row.items() if k not in ("decode_s", "tokens_per_s")}

    assert sorted(map(repr, map(steady, lines))) == sorted(map(repr, map(steady, path.read_text().splitlines())))
    assert run_eval(PLAN, out).written == 0


def test_more_methods_join_the_same_folder(out: Path) -> None:
    assert run_eval(PLAN._replace(methods=("random",)), out).written == 2
    assert json.loads((out / RUN).read_text())["methods"] == ["full", "infinigen", "window", "random"]


def test_a_folder_of_another_run_is_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run with seed 0"):
        run_eval(PLAN._replace(seed=5), out)
    (out / RESULTS).write_text("{}\n")
    with pytest.raises(InputError, match=r"results.jsonl, line 1"):
        run_eval(PLAN, out)


def test_tasks_that_the_full_cache_fails_are_gated(tmp_path: Path) -> None:
    """The demo model never learned to count words."""
    plan = PLAN._replace(tasks=("cwe",), methods=("window",))
    assert all(row["gated"] for row in read_lines_of(plan, tmp_path / "all"))
    assert len(read_lines(tmp_path / "all")) == 4
    skipping = read_lines_of(plan._replace(skip_gated=True), tmp_path / "some")
    assert [row["method"] for row in skipping] == ["full", "full"]


def read_lines_of(plan: EvalPlan, out: Path) -> list[dict[str, Any]]:
    run_eval(plan, out)
    return read_lines(out)


def test_what_a_method_cannot_do_is_skipped_and_said(tmp_path: Path) -> None:
    summary = run_eval(PLAN._replace(methods=("infinigen-paper",), limit=1), tmp_path)
    assert [(s["method"], s["fraction"]) for s in summary.skipped] == [("infinigen-paper", 0.1)]
    assert "must be above" in summary.skipped[0]["why"]
    assert [row.method for row in summary.rows] == ["full"]


def test_several_processes_write_the_same(done: Path, tmp_path: Path) -> None:
    two = run_eval(PLAN._replace(methods=("window",), workers=2), tmp_path)
    one = [row for row in read_rows(done / RESULTS) if row.key.method in {"full", "window"}]
    assert len(one) == 4
    assert {(r.key, r.answer, r.score) for r in one} == {(r.key, r.answer, r.score) for r in two.rows}


@pytest.mark.parametrize("plan", [PLAN._replace(methods=("magic",)), PLAN._replace(tasks=("magic",)),
                                  PLAN._replace(lengths=(10**6,)), PLAN._replace(filler="latin")])  # fmt: skip
def test_unknown_names_are_refused(plan: EvalPlan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected|positions"):
        run_eval(plan, tmp_path)


def test_a_method_that_reads_too_much_stops_the_run() -> None:
    prompt, prefilled = judge().read(make("niah_multikey"))
    row = judge()._judge(Variant("window", 0.1), make("niah_multikey"), prompt, prefilled, None)[0].row
    check_reads(row)
    with pytest.raises(CacheStateError, match="expected at most"):
        check_reads(replace(row, read_fraction=0.5))
    with pytest.raises(CacheStateError, match="no saving is proven"):
        check_reads(replace(row, bytes_per_step=row.full_bytes_per_step))


@pytest.mark.parametrize("name", list_methods())
def test_a_shared_prefill_answers_as_an_own_one(name: str) -> None:
    """The same predictions, bit for bit, as a cache whose method read the text itself, in chunks."""
    model, tokenizer = demo()
    sample = make("niah_multikey")
    prompt = Prompter(tokenizer).build(sample)
    prefilled = prefill_once(model, prompt.text, chunk=200)
    logits = []
    for shared in (True, False):
        with judge().attach(Variant(name, 1.0 if name == "full" else 0.2), 2**22) as far:
            if shared:
                cache = fill_cache(far, prefilled, 64)
            else:
                cache = far.new_cache(tokens=prefilled.n_tokens + 64)
                prefill(far, cache, prompt.text, 200, Listener())
            steps = [model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits for t in prompt.question]
            logits.append(torch.cat(steps))
    assert torch.equal(*logits)


def test_full_answers_as_plain_transformers_do() -> None:
    model, tokenizer = demo()
    sample = make("multiturn", 700)
    prompt = Prompter(tokenizer).build(sample)
    prefilled = prefill_once(model, prompt.text)
    with farkv.attach(model, farkv.Full()) as far:
        cache = fill_cache(far, prefilled, 200)
        said = ask_turns(far, cache, Prompter(tokenizer), sample, list(prompt.question))
    context = sample.text
    for turn, told in zip(sample.turns, said.turns, strict=True):
        context += turn.completion
        ids = tokenizer(context, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=len(told.ids), do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(out) == told.text
        context += told.text + "\n"


def test_chat_models_are_asked_in_their_template() -> None:
    _, tokenizer = demo()
    tokenizer = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompter = Prompter(tokenizer)
    turns = (Turn("q(1)  # ", "Say one.", "1", ("1",)), Turn("q(2)  # ", "Say two.", "2", ("2",)))
    prompt = prompter.build(Sample("t", 64, 0, "some text\n", turns))
    assert tokenizer.decode(prompt.text + prompt.question) == "<user>some text\nSay one.</user><assistant>"
    assert tokenizer.decode(prompter.follow(turns[1])) == "</assistant><user>Say two.</user><assistant>"
    with pytest.raises(InputError, match="no chat template"):
        Prompter(demo()[1], "chat")


def test_results_are_the_users_alone_and_half_letters_survive(done: Path, tmp_path: Path) -> None:
    assert {p.stat().st_mode & 0o777 for p in done.iterdir()} == {0o600}
    row = replace(read_rows(done / RESULTS)[0], answer="half \ud800 \u2028 ☺")
    append_line(tmp_path / RESULTS, row.to_json())
    assert read_rows(tmp_path / RESULTS) == [row]
    whole = (tmp_path / RESULTS).read_bytes()
    # Cut in the middle of a letter.
    (tmp_path / RESULTS).write_bytes(whole + whole[: whole.index("☺".encode()) + 1])
    assert read_rows(tmp_path / RESULTS, mend=True) == [row]
    assert (tmp_path / RESULTS).read_bytes() == whole


def test_rows_survive_being_written(done: Path) -> None:
    rows = read_rows(done / RESULTS)
    assert [json.loads(row.to_json()) for row in rows] == read_lines(done)
