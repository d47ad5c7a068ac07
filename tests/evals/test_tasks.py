"""One suite that every task passes: its samples are reproducible, fit, can be answered, and ask for what is there."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from farkv.errors import ConfigError
from farkv.evals.code_tasks import CODE_TASKS
from farkv.evals.draw import Draw
from farkv.evals.sample import Made, Sample, lay
from farkv.evals.score import SCORES
from farkv.evals.tasks import TASKS
from farkv.evals.tasks.orders import FACTS, list_orders
from farkv.evals.text import PPL, Maker

CODE, WORDS = [f"code/{task}" for task in CODE_TASKS], [f"words/{task}" for task in TASKS]
EVERY = [*CODE, *WORDS, f"code/{PPL}", f"words/{PPL}"]
# Answers of these are written by the full cache.
WRITTEN = "words/longgen"
every_task = pytest.mark.parametrize("task", EVERY)


@cache
def maker(filler: str = "code", *, in_code: bool = True) -> Maker:
    from transformers import AutoTokenizer

    from farkv.demo import MODEL_PATH

    return Maker(AutoTokenizer.from_pretrained(MODEL_PATH), filler, in_code=in_code)


def make(task: str, length: int, seed: int) -> Sample:
    form, name = task.split("/")
    return maker("code" if form == "code" else "mixed", in_code=form == "code").make(name, length, seed)


def count_turns(sample: Any) -> int:
    """Tokens of all turns of a task in words, which are all in the cache; of the longest of one in code."""
    counts = [maker().count(t.completion + t.answer) for t in sample.turns]
    return (sum(counts) if sample.turns and sample.turns[0].prefix else max(counts, default=0)) + sample.n_written


@every_task
def test_the_same_seed_is_the_same_sample(task: str) -> None:
    first, again, other = (make(task, 900, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.prompt_sha == again.prompt_sha
    assert first.prompt_sha != other.prompt_sha


@pytest.mark.parametrize("length", [900, 1500])
@every_task
def test_it_fills_the_length_and_no_more(task: str, length: int) -> None:
    sample = make(task, length, 3)
    tokens = maker().count(sample.text) + count_turns(sample)
    assert 0.8 * length <= tokens <= length


@pytest.mark.parametrize("task", [t for t in (*CODE, *WORDS) if t != WRITTEN])
def test_the_right_answer_scores_1_and_a_wrong_one_less(task: str) -> None:
    for seed in range(3):
        for turn in make(task, 900, seed).turns:
            score = SCORES[turn.score]
            assert score(turn.answer, turn.expected) == 1.0
            assert score("no idea", turn.expected) == 0.0
            assert "\n" not in turn.completion.removeprefix("\nQuestion").replace("\nAnswer", "") + turn.answer
            assert turn.instruction


@pytest.mark.parametrize(
    "task", [t for t in (*CODE, *WORDS) if t.split("/")[1] not in ("cwe", "fwe", "extraction", "vt", "longgen")]
)
def test_the_answer_stands_in_the_text_where_depths_say(task: str) -> None:
    sample = make(task, 900, 5)
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


@pytest.mark.parametrize(("filler", "length", "seed"), [("code", 600, 0), ("mixed", 8192, 0), ("mixed", 8192, 1)])
def test_a_continuation_goes_on_where_the_text_ends(filler: str, length: int, seed: int) -> None:
    sample = maker(filler, in_code=filler == "code").make(PPL, length, seed)
    assert abs(maker().count(sample.text) - length) <= 1
    assert sample.continuation
    assert not sample.turns


def test_every_fact_is_asked_at_every_turn_and_all_orders_come() -> None:
    """The first four seeds are a square of depth and turn; twenty-four are all orders."""
    texts = [make("words/orders", 900, seed) for seed in range(24)]
    ranks = [tuple(sorted(s.depths).index(d) for d in s.depths) for s in texts]
    for turn in range(FACTS):
        assert {order[turn] for order in ranks[:FACTS]} == set(range(FACTS))
    assert set(ranks) == set(list_orders())


def test_two_hops_lead_to_the_answer() -> None:
    sample = make("words/qa_2", 900, 3)
    asked = sample.turns[0].instruction.removesuffix("? Answer with one word.").split("who taught ")[1]
    told = {line.split(" was born in ")[0]: line for line in sample.text.splitlines() if " was born in " in line}
    teacher = told[asked].split(" from ")[1].split(", and later")[0]
    assert told[teacher].startswith(f"{teacher} was born in {sample.turns[0].expected[0]},")


def test_english_filler_is_prose_and_code_is_not() -> None:
    english, code = (maker(f).make("niah_single", 600, 0).text for f in ("english", "code"))
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
