"""Answer and score a sample with each method, over one prefill, and prove what was read.

In: a loaded model, a sample. Out: rows. Every row with a fraction below one is checked: its decode steps read fewer
bytes than a full cache holds, and no more than the fraction allows; otherwise the run stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from farkv._axes import Tensor
from farkv.account import Account
from farkv.errors import CacheStateError, ConfigError, ProfileError
from farkv.evals.ask import Answer, Asker, align, force_tokens
from farkv.evals.describe import Variant
from farkv.evals.forced import average, compare_continuation, compare_turn
from farkv.evals.methods import FULL, attach_options, find_method, make_method
from farkv.evals.prefill import Prefilled, fill_cache, prefill_once
from farkv.evals.prompter import Prompter
from farkv.evals.row import Row
from farkv.evals.sample import Sample, Turn
from farkv.evals.score import SCORES
from farkv.hf.attach import attach, find_profile
from farkv.hf.handle import Handle
from farkv.hf.prompt import Prompt
from farkv.trace import ReadTrace


class Texts(NamedTuple):
    """Samples that were read together: their tokens, and every layer's keys, values and queries."""

    samples: list[Sample]
    prompts: list[Prompt]
    prefilled: Prefilled

    @property
    def n_tokens(self) -> int:
        """Tokens of each text."""
        return len(self.prompts[0].text)


class Output(NamedTuple):
    """One method's answers to every sample, or for `ppl` its log-probabilities, [B, n, V]."""

    answers: list[list[Answer]]
    logs: Tensor | None
    seconds: float


class Judge:
    """Runs one model with every method and scores the answers."""

    def __init__(self, model: Any, tokenizer: Any, form: str = "code", profile: Any = None):
        self.model, self.prompter = model, Prompter(tokenizer, form)
        self.profile = find_profile(model, profile)

    def read(self, samples: list[Sample], *, with_question: bool = False) -> Texts:
        """Prefill samples' texts, and their first questions for methods that read them there."""
        prompts = [self.prompter.build(sample) for sample in samples]
        if samples[0].continuation:
            least = min(len(prompt.question) for prompt in prompts)
            prompts = [Prompt(prompt.text, prompt.question[:least]) for prompt in prompts]
        prompts = align(prompts, self.prompter.encode("\n")[-1])
        asked = with_question and bool(samples[0].turns)
        questions = [prompt.question[:-1] for prompt in prompts] if asked else None
        return Texts(samples, prompts, prefill_once(self.model, [p.text for p in prompts], questions=questions))

    def attach(self, variant: Variant, n_bytes: int) -> Handle:
        """Attach a method.

        Raises:
            ConfigError: the method does not support this fraction, or lacks a profile.
        """
        known = find_method(variant.method)
        options = attach_options(known, self.profile, variant.fraction, n_bytes)
        method = make_method(variant.method, variant.fraction)
        return attach(self.model, method, profile=self.profile or False, **options)

    def find_skipped(self, variants: list[Variant]) -> dict[Variant, str]:
        """Return the variants that cannot run, and why, before anything is run."""
        skipped: dict[Variant, str] = {}
        for variant in variants:
            try:
                self.attach(variant, 1).detach()
            except (ConfigError, ProfileError) as error:
                skipped[variant] = str(error)
        return skipped

    def judge(
        self,
        samples: list[Sample],
        variants: list[Variant],
        *,
        written: list[list[int]] | None = None,
        traced: bool = False,
    ) -> Iterator[tuple[Row, dict[str, Any] | None]]:
        """Yield the full cache's rows, then every method's, and the trace of its reads if requested.

        Args:
            samples: of one task and length, with as many turns; they are answered as one batch.
            written: what the full cache wrote before, of samples without a right answer.
            traced: not with several samples.
        """
        texts = self.read(samples, with_question=any(find_method(v.method).aware for v in variants))
        full, rows, _ = self.answer(Variant(FULL, 1.0), texts, None, written)
        yield from ((row, None) for row in rows)
        if samples[0].n_written:
            written = [answers[0].fed for answers in full.answers]
        for variant in variants:
            _, rows, trace = self.answer(variant, texts, full, written, traced=traced)
            yield from ((row, trace) for row in rows)

    def answer(
        self,
        variant: Variant,
        texts: Texts,
        full: Output | None = None,
        written: list[list[int]] | None = None,
        *,
        traced: bool = False,
    ) -> tuple[Output, list[Row], dict[str, Any] | None]:
        """Return one method's output, its rows compared with the full cache's output, and its reads."""
        aware = find_method(variant.method).aware and bool(texts.samples[0].turns)
        with self.attach(variant, count_bytes(texts.prefilled)) as far:
            cache = fill_cache(far, texts.prefilled, self.count_steps(texts), with_question=aware)
            # Set after the text, so that only decode steps are traced.
            trace = ReadTrace(texts.n_tokens, self.expect_steps(texts)) if traced else None
            cache.account.trace = trace
            questions = [p.question[-1:] if aware else p.question for p in texts.prompts]
            if texts.samples[0].continuation:
                output = Output([], *force_tokens(far, cache, questions))
            else:
                asked = Asker(far, cache, self.prompter, written).ask(texts.samples, questions)
                output = Output(asked.answers, None, asked.seconds)
            rows = self._make_rows(variant, texts, output, far.receipt(cache), cache.account)
        rows = [replace(row, query_aware=aware) for row in compare(rows, texts, output, full or output)]
        for row in rows:
            check_reads(row)
        reads = None if trace is None else {**name_row(rows[0]), **shorten(trace.to_dict())}
        return output, rows, reads

    def count_steps(self, texts: Texts) -> int:
        """Return the maximum number of tokens of questions and answers, of one sample."""

        def count(sample: Sample) -> int:
            # Shorter questions and answers are filled up to the longest: twice their own length is room enough.
            return 2 * sum(self.prompter.limit(t) + len(self.prompter.follow(t)) + 4 for t in sample.turns)

        return len(texts.prompts[0].question) + max(map(count, texts.samples)) + texts.samples[0].n_written + 8

    def expect_steps(self, texts: Texts) -> int:
        """Return the number of tokens fed to one sample alone."""
        sample, prompter = texts.samples[0], self.prompter
        answers = sum(len(prompter.encode_answer(t)) for t in sample.turns) + sample.n_written
        follows = sum(len(prompter.follow(t)) + len(prompter.line_end) for t in sample.turns[1:])
        return len(texts.prompts[0].question) + answers + follows - 1

    def _make_rows(self, variant: Variant, texts: Texts, output: Output, receipt: Any, account: Account) -> list[Row]:
        """Return every sample's row; what was read is the mean over them."""
        n, (read, held) = len(texts.samples), count_step_bytes(account)
        rate = n * account.decode_steps / output.seconds if output.seconds else 0.0
        rows: list[Row] = []
        for b, sample in enumerate(texts.samples):
            said = output.answers[b] if output.answers else []
            turns = [describe_turn(answer, turn) for answer, turn in zip(said, sample.turns, strict=True)]
            depths = [d for d in sample.depths if d >= 0]
            rows.append(Row(
                task=sample.task, method=variant.method, fraction=variant.fraction, length=sample.length,
                seed=sample.seed, answer="\n".join(answer.text for answer in said),
                expected=[e for t in sample.turns for e in t.expected],
                score=sum(t["score"] for t in turns) / len(turns) if turns else 0.0,
                read_fraction=receipt.read_fraction, index_fraction=receipt.index_fraction,
                resident_fraction=receipt.resident_fraction, kept_fraction=receipt.kept_fraction,
                prompt_sha=sample.prompt_sha, gated=False, tokens=texts.prompts[b].n_tokens,
                steps=account.decode_steps, agrees=None, kl=None, nll=None, depth=depths[0] if depths else None,
                turns=turns, proof=prove(variant, account), bytes_per_step=read / n, full_bytes_per_step=held / n,
                decode_s=output.seconds / n, tokens_per_s=rate, managed_read_fraction=receipt.managed_read_fraction,
            ))  # fmt: skip
        return rows


def describe_turn(answer: Answer, turn: Turn) -> dict[str, Any]:
    """Return a turn's record; what was written in place of a right answer is kept, to be fed again."""
    if turn.score == "none":
        return {"answer": answer.text, "expected": [], "score": 0.0, "written": answer.fed}
    score = SCORES[turn.score](answer.text, turn.expected)
    return {"answer": answer.text, "expected": list(turn.expected), "score": score}


def compare(rows: list[Row], texts: Texts, output: Output, full: Output) -> list[Row]:
    """Add the comparison with the full cache's predictions, and for `ppl` with the true continuation."""
    if output.logs is None or full.logs is None:
        pairs = zip(rows, full.answers, output.answers, strict=True)
        return [compare_answers(row, theirs, ours, texts.samples[b]) for b, (row, theirs, ours) in enumerate(pairs)]
    found: list[Row] = []
    for row, prompt, theirs, ours in zip(rows, texts.prompts, full.logs, output.logs, strict=True):
        same = bool((theirs.argmax(-1) == ours.argmax(-1)).all())
        goal = torch.tensor(prompt.question[1:])
        found.append(replace(row, **compare_continuation(theirs, ours, goal), agrees=same))
    return found


def compare_answers(row: Row, theirs: list[Answer], ours: list[Answer], sample: Sample) -> Row:
    """Add to one sample's row how near its answers' predictions are to the full cache's."""
    pairs = [compare_turn(full.logs, own.logs) for full, own in zip(theirs, ours, strict=True)]
    kl, top1 = average([closeness for closeness, _ in pairs])
    turns = [turn | record for turn, (_, record) in zip(row.turns, pairs, strict=True)]
    agrees = [full.text for full in theirs] == [own.text for own in ours]
    row = replace(row, turns=turns, kl=kl, top1=top1, agrees=agrees)
    # Where there is no right answer, right is what the full cache would say next.
    return replace(row, score=top1, agrees=top1 == 1) if sample.n_written else row


def prove(variant: Variant, account: Account) -> str:
    """Return what the counted reads prove about this answer."""
    if not account.decode_steps:
        return "unproven"
    if variant.fraction >= 1:
        return "everything"
    return "every key" if find_method(variant.method).reads_keys else "sparse"


def check_reads(row: Row) -> None:
    """Check that a method read no more than its fraction: its figures would be invalid.

    Raises:
        CacheStateError: it read more records than the fraction allows, or as many bytes as a full cache holds.
    """
    if row.fraction >= 1 or row.steps == 0:
        return
    # One record per head is always read; methods that keep decoded tokens grow by one record per step.
    more = 1 + (row.steps if find_method(row.method).grows else 0)
    managed = row.read_fraction if row.managed_read_fraction is None else row.managed_read_fraction
    if managed > row.fraction + more / max(1, row.tokens):
        raise CacheStateError(
            f"eval: {row.method} at {row.fraction} read {managed:.4f} of the KV bytes of the managed layers of "
            f"{row.task}/{row.length}/{row.seed}; expected at most {row.fraction}: the result is not valid for this cap"
        )
    if row.bytes_per_step >= row.full_bytes_per_step:
        raise CacheStateError(
            f"eval: {row.method} at {row.fraction} read {row.bytes_per_step:.0f} bytes per step, the full cache of "
            f"{row.task}/{row.length}/{row.seed} has {row.full_bytes_per_step:.0f}; expected fewer: no saving is proven"
        )


def count_step_bytes(account: Account) -> tuple[float, float]:
    """Return the KV and index bytes read per decode step, and the bytes that a full cache holds."""
    held = sum(c.held * account.record_bytes.get(i, 1) for i, c in account.layers.items())
    steps = max(1, account.decode_steps)
    return held * (account.read_fraction() + account.index_fraction()) / steps, held / steps


def count_bytes(prefilled: Prefilled) -> int:
    """Return the KV bytes of a prefilled text."""
    steps = [step for layers in prefilled.passes for step in layers.values()]
    return sum((s.k.numel() + s.v.numel()) * s.k.element_size() for s in steps)


def shorten(trace: dict[str, Any]) -> dict[str, Any]:
    """Round the fractions of a trace to four decimals: a line has thousands of them."""
    return {**trace, "read": [[[round(x, 4) for x in step] for step in layer] for layer in trace["read"]]}


def name_row(row: Row) -> dict[str, Any]:
    """Return the keys that identify the row of a trace."""
    return {**row.key._asdict(), "prompt_sha": row.prompt_sha}
