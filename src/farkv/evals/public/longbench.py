"""LongBench v2: a multiple-choice question with four options about a long text; guessing scores 25 %.

In: its `data.json`, or rows as JSON lines. Out: items `longbench-v2`. A text that is too long loses its middle, as in
its own code: the first and the last half of the target length are kept. The prompt wording is ours, so scores are
comparable between methods, not with published tables.

Source of the format: github.com/THUDM/LongBench, README.md and pred.py (fields _id, domain, sub_domain, difficulty,
length, question, choice_A to choice_D, answer, context); its file on the hub: THUDM/LongBench-v2, data.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from farkv.evals.public.choose import Item, Wanted, choose
from farkv.evals.public.read import HUB, fetch, find_files, read_records
from farkv.evals.sample import Sample, Turn

CHOICES = "ABCD"
CHANCE = 1 / len(CHOICES)


def load(path: str, wanted: Wanted) -> Iterator[Sample]:
    """Read LongBench v2's samples; `hub` downloads its file."""

    def cut(text: str, length: int, asked: int) -> str:
        return cut_middle(text, length, asked, wanted)

    files = [fetch("THUDM/LongBench-v2", "data.json", "longbench-v2")] if path == HUB else find_files(path, ".json")
    return choose(read_items(files), wanted, cut)


def read_items(files: list[Path]) -> Iterator[Item]:
    """Yield every row of the files."""
    records = (record for file in files for record in read_records(file))
    for number, record in enumerate(records):
        answer = record.text("answer").strip()
        if answer not in CHOICES or len(answer) != 1:
            raise record.refuse(f"the field answer to be one of {', '.join(CHOICES)}")
        choices = "".join(f"{c}. {record.text(f'choice_{c}').strip()}\n" for c in CHOICES)
        asked = f"\nQuestion: {record.text('question').strip()}\n{choices}"
        turn = Turn(f"{asked}Answer:", f"{asked}Answer with one letter alone.", f" {answer}", (answer,), "letter")
        text = record.text("context").strip() + "\n"
        names = ("_id", "domain", "sub_domain", "difficulty", "length")
        meta = {name: str(record.fields[name]) for name in names if name in record.fields}
        meta |= {"source": record.place, "chance": str(CHANCE)}
        yield Item("longbench-v2", number, text, (turn,), meta=meta)


def cut_middle(text: str, length: int, asked: int, wanted: Wanted) -> str:
    """Return the first `length / 2` and the last `length / 2 - asked` tokens of a text; empty if the latter is < 1.

    Args:
        text: longer than that.
        length: tokens of text, question and answer together.
        asked: tokens of question and answer, which follow the text.
        wanted: provides the tokenizer.
    """
    ends = wanted.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first, last = length // 2, length // 2 - asked
    return text[: ends[first - 1][1]] + text[ends[-last][0] :] if last > 0 else ""
