"""Answer and score a sample with each method, over one prefill, and prove what was read.

In: a loaded model, a sample. Out: rows. Every row with a fraction below one is checked: its decode steps read fewer
bytes than a full cache holds, and no more than the fraction allows; otherwise the run stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from farkv._axes import Tensor
from farkv.errors import CacheStateError, ConfigError, ProfileError
from farkv.evals.ask import Prompter, ask_turns, force_tokens
from farkv.evals.describe import Variant
from farkv.evals.methods import FULL, attach_options, find_method, make_method
from farkv.evals.prefill import Prefilled, fill_cache, prefill_once
from farkv.evals.row import Row
from farkv.evals.sample import Sample
from farkv.evals.score import SCORES
from farkv.hf.ask import Prompt
from farkv.hf.attach import attach, find_profile
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.receipt import Account
from farkv.trace import ReadTrace


class Reference(NamedTuple):
    """The full cache's row, and for `ppl` its log-probabilities."""

    row: Row
    logs: Tensor | None


class Output(NamedTuple):
    """One method's answers, or for `ppl` its log-probabilities."""

    answers: list[str]
    logs: Tensor | None
    seconds: float


class Judge:
    """Runs one model with every method and scores the answers."""

    def __init__(self, model: Any, tokenizer: Any, form: str = "auto", profile: Any = None):
        self.model, self.prompter = model, Prompter(tokenizer, form)
        self.profile = find_profile(model, profile)

    def read(self, sample: Sample) -> tuple[Prompt, Prefilled]:
        """Prefill a sample's text."""
        prompt = self.prompter.build(sample)
        return prompt, prefill_once(self.model, prompt.text)

    def attach(self, variant: Variant, n_bytes: int) -> Handle:
        """Attach a method.

        Raises:
            ConfigError: the method does not support this fraction, or lacks a profile.
        """
        known = find_method(variant.method)
        options = attach_options(known, self.profile, variant.fraction, n_bytes)
        return attach(
            self.model, make_method(variant.method, variant.fraction), profile=self.profile or False, **options
        )

    def find_skipped(self, variants: list[Variant]) -> dict[Variant, str]:
        """Return the variants that cannot run, and why, before anything is run."""
        skipped: dict[Variant, str] = {}
        for variant in variants:
            try:
                self.attach(variant, 1).detach()
            except (ConfigError, ProfileError) as error:
                skipped[variant] = str(error)
        return skipped

    def ask_full(self, sample: Sample, prompt: Prompt, prefilled: Prefilled) -> Reference:
        """Return the full cache's answer."""
        return self._judge(Variant(FULL, 1.0), sample, prompt, prefilled, None)[0]

    def ask_all(
        self, sample: Sample, variants: list[Variant], reference: Reference | None, *, traced: bool
    ) -> Iterator[tuple[Row, dict[str, Any] | None]]:
        """Yield every method's row, and the trace of its reads if requested."""
        prompt, prefilled = self.read(sample)
        if reference is None:
            reference = self.ask_full(sample, prompt, prefilled)
        for variant in variants:
            found, trace = self._judge(variant, sample, prompt, prefilled, reference, traced=traced)
            yield found.row, trace

    def _judge(
        self,
        variant: Variant,
        sample: Sample,
        prompt: Prompt,
        prefilled: Prefilled,
        reference: Reference | None,
        *,
        traced: bool = False,
    ) -> tuple[Reference, dict[str, Any] | None]:
        n_new = self.count_steps(sample, prompt)
        with self.attach(variant, count_bytes(prefilled)) as far:
            cache = fill_cache(far, prefilled, n_new)
            # Set after the text, so that only decode steps are traced.
            trace = ReadTrace(len(prompt.text), self.expect_steps(sample, prompt)) if traced else None
            cache.account.trace = trace
            output = self._run(far, cache, sample, prompt)
            row = self._make_row(variant, sample, prompt, output, far, cache)
        row = compare(row, output, reference, prompt)
        check_reads(row)
        reads = None if trace is None else {**name_row(row), **shorten(trace.to_dict())}
        return Reference(row, output.logs), reads

    def count_steps(self, sample: Sample, prompt: Prompt) -> int:
        """Return the maximum number of tokens of questions and answers."""
        turns = sum(self.prompter.limit(t) + len(self.prompter.follow(t)) + 4 for t in sample.turns)
        return len(prompt.question) + turns + 8

    def expect_steps(self, sample: Sample, prompt: Prompt) -> int:
        """Return the number of tokens fed if every answer is correct."""
        answers = sum(len(self.prompter.encode(t.answer)) for t in sample.turns)
        return len(prompt.question) + answers + sum(len(self.prompter.follow(t)) for t in sample.turns[1:]) - 1

    def _run(self, far: Handle, cache: FarCache, sample: Sample, prompt: Prompt) -> Output:
        if sample.continuation:
            return Output([], *force_tokens(far, cache, prompt.question))
        found = ask_turns(far, cache, self.prompter, sample, list(prompt.question))
        return Output([answer.text for answer in found.turns], None, found.seconds)

    def _make_row(
        self, variant: Variant, sample: Sample, prompt: Prompt, output: Output, far: Handle, cache: FarCache
    ) -> Row:
        receipt, account = far.receipt(cache), cache.account
        turns = [
            {"answer": answer, "expected": list(turn.expected), "score": SCORES[turn.score](answer, turn.expected)}
            for answer, turn in zip(output.answers, sample.turns, strict=True)
        ]
        read, held = count_step_bytes(account)
        depths = [d for d in sample.depths if d >= 0]
        return Row(
            task=sample.task, method=variant.method, fraction=variant.fraction, length=sample.length,
            seed=sample.seed, answer="\n".join(output.answers), expected=[e for t in sample.turns for e in t.expected],
            score=sum(t["score"] for t in turns) / len(turns) if turns else 0.0,
            read_fraction=receipt.read_fraction, index_fraction=receipt.index_fraction,
            resident_fraction=receipt.resident_fraction, kept_fraction=receipt.kept_fraction,
            prompt_sha=sample.prompt_sha, gated=False, tokens=prompt.n_tokens, steps=account.decode_steps,
            agrees=None, kl=None, nll=None, depth=depths[0] if depths else None, turns=turns,
            proof=prove(variant, account), bytes_per_step=read, full_bytes_per_step=held, decode_s=output.seconds,
            tokens_per_s=account.decode_steps / output.seconds if output.seconds else 0.0,
        )  # fmt: skip


def compare(row: Row, output: Output, reference: Reference | None, prompt: Prompt) -> Row:
    """Add the comparison with the full cache's answer, and for `ppl` with the true continuation."""
    if output.logs is None:
        same = None if reference is None else row.answer == reference.row.answer
        return replace(row, agrees=True if reference is None else same)
    import torch

    goal = torch.tensor(prompt.question[1:])
    logs = output.logs
    full = logs if reference is None else reference.logs
    assert full is not None
    return replace(
        row,
        score=float((logs.argmax(-1) == goal).float().mean()),
        nll=float(-logs[torch.arange(len(goal)), goal].mean()),
        kl=float((full.exp() * (full - logs)).sum(-1).mean()),
        agrees=bool((full.argmax(-1) == logs.argmax(-1)).all()),
    )


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
    if row.read_fraction > row.fraction + more / max(1, row.tokens):
        raise CacheStateError(
            f"eval: {row.method} at {row.fraction} read {row.read_fraction:.4f} of the KV bytes of "
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
