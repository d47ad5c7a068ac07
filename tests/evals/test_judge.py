"""Samples, alone and in batches, judged on the demo model: a shared prefill, right answers fed, own answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.evals.ask import Asker, align
from farkv.evals.describe import Variant
from farkv.evals.forced import compare_turn
from farkv.evals.judge import Judge, check_reads
from farkv.evals.methods import list_methods
from farkv.evals.prefill import fill_cache, prefill_once
from farkv.evals.prompter import Prompter
from farkv.evals.row import RESULTS, read_rows, write_rows
from farkv.evals.run import run_eval
from farkv.evals.sample import Sample
from farkv.hf.ask import Listener, prefill
from farkv.hf.prompt import Prompt
from tests.evals.asked import PLAN, demo, judge, make


def test_a_method_that_reads_too_much_stops_the_run() -> None:
    texts = judge().read([make("niah_multikey")])
    (row,) = judge().answer(Variant("window", 0.1), texts)[1]
    check_reads(row)
    with pytest.raises(CacheStateError, match="expected at most"):
        check_reads(replace(row, managed_read_fraction=0.5))
    with pytest.raises(CacheStateError, match="no saving is proven"):
        check_reads(replace(row, bytes_per_step=row.full_bytes_per_step))


# The demo model has no indexer of its own.
@pytest.mark.parametrize("name", [name for name in list_methods() if name != "indexer"])
def test_a_shared_prefill_answers_as_an_own_one(name: str) -> None:
    """The same predictions, bit for bit, as a cache whose method read the text itself, in chunks."""
    model, tokenizer = demo()
    prompt = Prompter(tokenizer).build(make("niah_multikey"))
    aware = list_methods()[name].aware
    questions = [prompt.question[:-1]] if aware else None
    text = prompt.text + prompt.question[:-1] if aware else prompt.text
    prefilled = prefill_once(model, [prompt.text], chunk=200, questions=questions)
    logits = []
    for shared in (True, False):
        with judge().attach(Variant(name, 1.0 if name == "full" else 0.2), 2**22) as far:
            if shared:
                cache = fill_cache(far, prefilled, 64, with_question=aware)
            else:
                cache = far.new_cache(tokens=len(text) + 64)
                prefill(far, cache, text, 200, Listener())
            fed = prompt.question[-1:] if aware else prompt.question
            steps = [model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits for t in fed]
            logits.append(torch.cat(steps))
    if aware:
        # The shared question is a pass of its own; here it is part of the last chunk, so sums are rounded otherwise.
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(*logits)


def ask_full(samples: list[Sample]) -> tuple[list[Prompt], Any]:
    model, tokenizer = demo()
    prompter = Prompter(tokenizer)
    prompts = align([prompter.build(sample) for sample in samples], prompter.encode("\n")[-1])
    prefilled = prefill_once(model, [prompt.text for prompt in prompts])
    with farkv.attach(model, farkv.Full()) as far:
        cache = fill_cache(far, prefilled, 200)
        found = Asker(far, cache, prompter).ask(samples, [prompt.question for prompt in prompts])
    return prompts, found.answers


def test_full_answers_and_predicts_as_plain_transformers_do() -> None:
    """Own answers are those of `generate`, predictions those of one dense pass; turns go on from the right answers."""
    model, tokenizer = demo()
    sample = make("multiturn", 700)
    _, (answers,) = ask_full([sample])
    context = sample.text
    for turn, told in zip(sample.turns, answers, strict=True):
        ids = tokenizer(context + turn.completion, return_tensors="pt").input_ids
        n_own = max(1, len(Prompter(tokenizer).encode(told.text)))
        out = model.generate(ids, max_new_tokens=n_own, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(out) == told.text
        right = torch.tensor([Prompter(tokenizer).encode(turn.answer)])
        with torch.no_grad():
            dense = model(torch.cat([ids, right], 1)).logits[0, -right.shape[1] - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(told.logs, dense, atol=2e-4, rtol=1e-4)
        context += turn.completion + turn.answer + "\n"


@pytest.mark.parametrize("task", ["niah_multikey", "multiturn", "qa", "ppl"])
def test_a_batch_is_answered_as_its_samples_alone(task: str) -> None:
    """Of the same tokens: what one sequence is fed, reads and predicts does not depend on the others."""
    model, tokenizer = demo()
    plain = Judge(model, tokenizer)
    samples = [make(task, 400, seed) for seed in range(2)]
    texts = plain.read(samples)
    variants = [Variant("full", 1.0), Variant("infinigen", 0.1), Variant("snapkv", 0.1), Variant("h2o", 0.1)]
    for variant in variants:
        together, _, _ = plain.answer(variant, texts)
        for b, sample in enumerate(samples):
            alone = texts._replace(
                samples=[sample], prompts=[texts.prompts[b]],
                prefilled=prefill_once(model, [texts.prompts[b].text]),
            )  # fmt: skip
            one, _, _ = plain.answer(variant, alone)
            if together.logs is not None and one.logs is not None:
                torch.testing.assert_close(together.logs[b], one.logs[0], atol=2e-3, rtol=1e-3)
                continue
            # Later questions are filled up to the longest, so that they are other tokens alone.
            many, single = together.answers[b][0], one.answers[0][0]
            torch.testing.assert_close(many.logs, single.logs[: len(many.logs)], atol=2e-3, rtol=1e-3)
            assert many.text == single.text


def test_prompts_of_a_batch_have_the_same_lengths_and_lose_nothing() -> None:
    prompts = [Prompt([1, 2, 3, 4], [5]), Prompt([1, 2], [3, 4, 5])]
    for before, after in zip(prompts, align(prompts, 9), strict=True):
        whole = after.text + after.question
        assert (len(after.text), len(after.question)) == (2, 3)
        assert [token for token in whole if token != 9] == before.text + before.question
    assert align(prompts[:1], 9) == prompts[:1]


def test_long_generation_follows_what_the_full_cache_wrote(tmp_path: Path) -> None:
    """A run that is resumed feeds the same words again, and says how far methods drift along the way."""
    plan = PLAN._replace(tasks=("longgen",), form="completion", limit=2, batch=2, trace=0, lengths=(256,))
    run_eval(plan, tmp_path)
    rows = read_rows(tmp_path / RESULTS)
    by_method = {(row.method, row.seed): row for row in rows}
    for seed in (0, 1):
        words = by_method["full", seed].turns[0]["written"]
        assert len(words) == 128
        assert len(by_method["window", seed].turns[0]["kl_along"]) == 8
    write_rows(tmp_path / RESULTS, [row for row in rows if row.method != "window"])
    run_eval(plan, tmp_path)
    again = {(row.method, row.seed): row for row in read_rows(tmp_path / RESULTS)}
    assert {key: row.kl for key, row in again.items()} == {key: row.kl for key, row in by_method.items()}


def test_closeness_is_zero_to_itself_and_counts_other_choices() -> None:
    logs = torch.randn(70, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    other = logs.roll(1, -1)
    near, record = compare_turn(logs, logs)
    assert (near.kl, near.same, record["kl"], record["top1"]) == (0, 70, 0, 1)
    far, record = compare_turn(logs, other)
    wanted = (logs.exp().double() * (logs - other).double()).sum(-1)
    assert far.kl == pytest.approx(float(wanted.sum()), rel=1e-5)
    assert record["kl_along"] == pytest.approx([float(part.mean()) for part in wanted.chunk(8)], abs=1e-5)


def test_a_hybrid_is_held_to_its_cap_on_the_layers_that_it_manages() -> None:
    """The layers that are left to Hugging Face read all they hold, whatever the cap is."""
    (row,) = judge().answer(Variant("window", 0.1), judge().read([make("niah_multikey")]))[1]
    assert row.managed_read_fraction == row.read_fraction
    check_reads(replace(row, read_fraction=0.5))
    with pytest.raises(CacheStateError, match="of the managed layers"):
        check_reads(replace(row, managed_read_fraction=0.5))
