"""One suite that every task passes: its samples are reproducible, fit, can be answered, and ask for what is there."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from farkv.errors import ConfigError
from farkv.evals.code_tasks import TASKS
from farkv.evals.draw import Draw
from farkv.evals.sample import Made, lay
from farkv.evals.score import SCORES
from farkv.evals.text import FILLERS, PPL, Maker

EVERY = [*TASKS, PPL]
every_task = pytest.mark.parametrize("task", EVERY)


@cache
def maker(filler: str = "code") -> Maker:
    from transformers import AutoTokenizer

    from farkv.demo import MODEL_PATH

    return Maker(AutoTokenizer.from_pretrained(MODEL_PATH), filler)


def count_turns(sample: Any) -> int:
    return max((maker().count(t.completion + t.answer) for t in sample.turns), default=0)


@every_task
def test_the_same_seed_is_the_same_sample(task: str) -> None:
    first, again, other = (maker().make(task, 700, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.prompt_sha == again.prompt_sha
    assert first.prompt_sha != other.prompt_sha


@pytest.mark.parametrize("length", [512, 1500])
@every_task
def test_it_fills_the_length_and_no_more(task: str, length: int) -> None:
    sample = maker().make(task, length, 3)
    tokens = maker().count(sample.text) + count_turns(sample)
    assert 0.8 * length <= tokens <= length


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_1_and_a_wrong_one_less(task: str) -> None:
    for seed in range(3):
        for turn in maker().make(task, 600, seed).turns:
            score = SCORES[turn.score]
            assert score(turn.answer, turn.expected) == 1.0
            assert score("no idea", turn.expected) == 0.0
            assert "\n" not in turn.completion + turn.answer
            assert turn.instruction


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("cwe", "fwe", "extraction", "vt")])
def test_the_answer_stands_in_the_text_where_depths_say(task: str) -> None:
    sample = maker().make(task, 900, 5)
    for turn, depth in zip(sample.turns, sample.depths, strict=True):
        assert 0 <= depth <= 1
        line = sample.text[round(depth * len(sample.text)) :].split("\n", 1)[0]
        assert turn.expected[0] in line


def test_extraction_asks_for_a_table_of_the_text() -> None:
    sample = maker().make("extraction", 1500, 0)
    for row in json.loads(sample.turns[0].answer):
        assert f".add('{row['name']}', {row['code']}, " in sample.text


def test_common_words_are_the_most_common() -> None:
    for task, n in (("cwe", 10), ("fwe", 3)):
        sample = maker().make(task, 1500, 0)
        words = [w for line in sample.text.splitlines() if line.startswith("# ") for w in line[2:].split()]
        counts = {w: words.count(w) for w in set(words)}
        wanted = set(sample.turns[0].expected)
        assert len(wanted) == n
        assert min(counts[w] for w in wanted) > max(c for w, c in counts.items() if w not in wanted)


def test_links_can_be_walked_and_chains_hold_their_value() -> None:
    walk = maker().make("longgen", 900, 1)
    links = dict(line.split(".next = ") for line in walk.text.splitlines() if ".next = " in line)
    at = walk.turns[0].completion.removeprefix("walk(").split(",")[0]
    for name in walk.turns[0].expected:
        at = links[at]
        assert at == name
    chain = maker().make("vt", 900, 1)
    facts = dict(line.split(" = ") for line in chain.text.splitlines() if line.count(" = ") == 1)
    for name in chain.turns[0].expected:
        value = name
        while value in facts:
            value = facts[value]
        assert f"find({value})" in chain.turns[0].completion


def test_a_continuation_goes_on_where_the_text_ends() -> None:
    sample = maker().make(PPL, 600, 0)
    assert maker().count(sample.text) == 600
    assert sample.continuation
    assert not sample.turns


def test_english_filler_is_prose_and_code_is_not() -> None:
    english, code = (maker(f).make("niah_single", 600, 0).text for f in FILLERS[::-1])
    assert english.count(" the ") > 5
    assert english != code


def test_lines_keep_their_order_between_filler() -> None:
    made = Made(["x\n", "y\n", "z\n"], [], places=[0.0, 0.5, 1.0])
    lines, own = lay(made, ["1\n", "2\n", "3\n", "4\n"], Draw(0, 64).rng)
    assert lines == ["x\n", "1\n", "2\n", "y\n", "3\n", "4\n", "z\n"]
    assert own == [0, 3, 6]


@pytest.mark.parametrize(("task", "length"), [("niah", 600), ("qa", 100)])
def test_what_cannot_be_made_is_refused(task: str, length: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        maker().make(task, length, 0)
