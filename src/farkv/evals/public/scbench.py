"""SCBench: several consecutive questions over one cache.

In: `scbench_NAME.jsonl`, or a folder with such files. Out: items `scbench:NAME` with one turn per question. Seven of
its twelve tasks are supported: those scored by what an answer contains. The prompt wording is ours.

Source of the format: github.com/microsoft/MInference, scbench/readme.md, eval_utils.py and compute_scores.py (fields
id, context, multi_turns: a list of input, answer and, for choices, options); the hub: microsoft/SCBench,
data/scbench_NAME.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from farkv.errors import InputError
from farkv.evals.public.choose import Item, Wanted, choose
from farkv.evals.public.read import HUB, Record, fetch, find_files, read_records
from farkv.evals.sample import Sample, Turn

# SCBench's rules: the answer contains one value; all of them; names the option; its first number is correct.
SCORES = {
    "kv": "any",
    "prefix_suffix": "any",
    "vt": "all",
    "qa_eng": "any",
    "many_shot": "any",
    "choice_eng": "letter",
    "mf": "number",
}
# The metrics of SCBench's other tasks.
LEFT_OUT = {
    "summary": "ROUGE",
    "summary_with_needles": "ROUGE",
    "repoqa": "parsed functions",
    "repoqa_and_kv": "parsed functions",
    "qa_chn": "F1 over Chinese characters",
}
LETTERS = "ABCDEFGH"


def load(path: str, wanted: Wanted) -> Iterator[Sample]:
    """Read SCBench's samples; `hub/scbench_NAME.jsonl` downloads one of its files."""
    if path.startswith(f"{HUB}/"):
        name = path.partition("/")[2]
        check_name(name_task(Path(name)), path)
        files = [fetch("microsoft/SCBench", f"data/{name}", "scbench")]
    elif Path(path).expanduser().is_dir():
        files = [f for f in find_files(path, ".jsonl", ".json") if name_task(f) in SCORES]
        if not files:
            raise InputError(
                f"{path}: expected files scbench_NAME.jsonl with NAME one of {', '.join(SCORES)}; got none"
            )
    else:
        files = find_files(path, ".jsonl", ".json")
    for file in files:
        check_name(name_task(file), str(file))
    return choose(read_items(files), wanted)


def name_task(file: Path) -> str:
    """Return `kv` for `scbench_kv.jsonl`, or for `multi_turn_kv.jsonl`, an older file name."""
    return file.stem.removeprefix("scbench_").removeprefix("multi_turn_")


def check_name(name: str, path: str) -> None:
    """Raise InputError for a task that is not SCBench's, or has a metric that farkv does not compute."""
    if name not in SCORES:
        why = f"is scored by {LEFT_OUT[name]}, which farkv does not compute" if name in LEFT_OUT else "is not SCBench's"
        raise InputError(f"{path}: expected scbench_NAME.jsonl with NAME one of {', '.join(SCORES)}; {name} {why}")


def read_items(files: list[Path]) -> Iterator[Item]:
    """Yield every row of the files."""
    for file in files:
        name = name_task(file)
        for number, record in enumerate(read_records(file)):
            context, turns = record.fields.get("context"), record.fields.get("multi_turns")
            # `mf` asks about a list of numbers.
            text = str(context) if isinstance(context, list) else record.text("context")
            if not isinstance(turns, list) or not turns:
                raise record.refuse("the field multi_turns to be a list of questions, at least one")
            made = tuple(make_turn(name, turn, record) for turn in turns)
            text = text if text.endswith("\n") else text + "\n"
            yield Item(f"scbench:{name}", number, text, made, meta={"source": record.place})


def make_turn(name: str, turn: Any, record: Record) -> Turn:
    """Make one question's turn."""
    inner = Record(record.path, record.line, turn if isinstance(turn, dict) else {})
    asked, score = inner.text("input"), SCORES[name]
    answer = inner.fields.get("answer")
    answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
    if answer is None or not answers:
        raise inner.refuse("each of multi_turns to have an answer: a string, a number or a list")
    if score == "letter":
        options = inner.texts("options")
        answers = (name_choice(answers, options, inner),)
        listed = "".join(f"{c}. {option}\n" for c, option in zip(LETTERS, options, strict=False))
        asked = f"Question: {asked}\n{listed}"
        return Turn(f"\n{asked}Answer:", f"{asked}Answer with one letter alone.", f" {answers[0]}", answers, score)
    prompt = f"Question: {asked}\nAnswer:" if name == "qa_eng" else asked
    joined = ", ".join(answers) if score == "all" else answers[0]
    return Turn(f"\n{prompt}", asked, joined, answers, score)


def name_choice(answers: tuple[str, ...], options: tuple[str, ...], record: Record) -> str:
    """Return the letter of the correct option; files give the letter or the option's text."""
    for answer in answers:
        if answer in options:
            return LETTERS[options.index(answer)]
    for answer in answers:
        if answer in LETTERS[: len(options)] and len(answer) == 1:
            return answer
    raise record.refuse("the answer to be one of the options, or its letter")
