"""RULER: files of its own generator (`TASK/validation.jsonl`), or rows with separate context and question.

In: .jsonl or .json. Out: items `ruler:TASK`. RULER's input contains text and question; it is split where the question
begins, without changing any byte, so that question and answer prefix pass through the method.

Source of the formats: github.com/NVIDIA/RULER, scripts/data/synthetic (fields index, input, outputs, length,
answer_prefix; older files without answer_prefix hold it in the input); evaluation/benchmarks/ruler of
github.com/NVIDIA/kvpress (fields context, question, answer_prefix, answer, task, max_new_tokens).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from farkv.evals.public.choose import Item, Wanted, choose
from farkv.evals.public.read import Record, find_files, read_records
from farkv.evals.sample import Sample, Turn

# How RULER's questions begin. The last match in an input is the question: examples and documents come before it.
QUESTIONS = ("What are all the special magic", "What is the special magic", "Question:")
# RULER's generation limits in tokens, by the task's first word.
TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def load(path: str, wanted: Wanted) -> Iterator[Sample]:
    """Read RULER's samples."""
    return choose(read_items(find_files(path, ".jsonl", ".json")), wanted)


def read_items(files: list[Path]) -> Iterator[Item]:
    """Yield every row of the files."""
    numbers: Counter[str] = Counter()
    for file in files:
        for record in read_records(file):
            task = f"ruler:{name_task(record)}"
            yield make_item(record, task, numbers[task])
            numbers[task] += 1


def name_task(record: Record) -> str:
    """Return the row's task, or else the folder's or file's name if it is a task's."""
    if "task" in record.fields:
        return record.text("task")
    names = (record.path.parent.name, record.path.stem)
    return next((n for n in names if n.partition("_")[0] in TOKENS), record.path.stem)


def make_item(record: Record, task: str, number: int) -> Item:
    """Make one row's item."""
    text, question, prefix, how = split_row(record)
    expected = record.texts("answer" if "context" in record.fields else "outputs")
    family = task.partition(":")[2].partition("_")[0]
    tokens = record.fields.get("max_new_tokens", TOKENS.get(family, 128))
    score = "any" if family == "qa" else "all"
    turn = Turn(question + prefix, question, expected[0] if score == "any" else ", ".join(expected), expected, score)
    at = text.find(expected[0]) if family == "niah" else -1
    depths = (at / max(1, len(text)),) if at >= 0 else ()
    meta = {"source": record.place, "max_new_tokens": str(tokens), "split": how}
    return Item(task, number, text, (turn,), depths, meta)


def split_row(record: Record) -> tuple[str, str, str, str]:
    """Return text, question, answer prefix, and how the question was found.

    text + question + prefix equals RULER's input + answer_prefix, byte for byte.
    """
    prefix = record.text("answer_prefix") if "answer_prefix" in record.fields else ""
    if "context" in record.fields:
        return record.text("context"), record.text("question"), prefix, "own field"
    whole = record.text("input")
    at, how = max(whole.rfind(q) for q in QUESTIONS), "question's beginning"
    if at <= 0:
        # A custom task: use the last non-empty line.
        at, how = whole.rstrip().rfind("\n") + 1, "last line"
    if at <= 0:
        raise record.refuse(f"an input whose question begins with {' or '.join(QUESTIONS)}, or is its last line")
    return whole[:at], whole[at:], prefix, how
